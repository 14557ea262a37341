//! One forward pass over the graph that gives every value its [`Fact`].

use super::dim::{Dim, Symbol, Symbols};
use super::rules;
use crate::onnx::{Constant, Data, Graph, Node, TypeProto};
use std::collections::{BTreeSet, HashMap, HashSet};

/// The batch dimension of the latents; with classifier-free guidance in one run, both halves.
pub const BATCH: Symbol = Symbol(0);

/// The value of a small tensor, in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Integers (shape arithmetic), each possibly symbolic.
    Ints(Vec<Dim>),
    Floats(Vec<f64>),
}

/// What is known about one value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fact {
    /// ONNX element type; 0 if unknown.
    pub elem_type: i32,
    pub shape: Option<Vec<Dim>>,
    pub value: Option<Value>,
}

impl Fact {
    pub fn of(elem_type: i32, shape: Option<Vec<Dim>>) -> Self {
        Self {
            elem_type,
            shape,
            value: None,
        }
    }

    pub fn rank(&self) -> Option<usize> {
        self.shape.as_ref().map(Vec::len)
    }

    /// The only element, if it is a known number.
    pub fn scalar(&self) -> Option<f64> {
        match self.value.as_ref()? {
            Value::Ints(v) if v.len() == 1 => v[0].known().map(|i| i as f64),
            Value::Floats(v) if v.len() == 1 => Some(v[0]),
            _ => None,
        }
    }

    /// All elements, if they are known integers.
    pub fn known_ints(&self) -> Option<Vec<i64>> {
        match self.value.as_ref()? {
            Value::Ints(v) => v.iter().map(Dim::known).collect(),
            Value::Floats(_) => None,
        }
    }

    /// Whether the shape, or the value of a shape vector, changes with the batch. `None` if that is not known.
    pub fn depends_on_batch(&self) -> Option<bool> {
        let in_shape = self.shape.as_ref()?.iter().any(|d| d.depends_on(BATCH));
        let in_value = match &self.value {
            Some(Value::Ints(v)) => v.iter().any(|d| d.depends_on(BATCH)),
            Some(Value::Floats(_)) => false,
            // A rank-1 (or 0) integer tensor of unknown value may well be a shape.
            None if rules::is_integer(self.elem_type) && self.rank()? <= 1 => return None,
            None => false,
        };
        Some(in_shape || in_value)
    }
}

impl From<&Constant> for Fact {
    fn from(constant: &Constant) -> Self {
        let value = constant.data.as_ref().map(|data| match data {
            Data::Ints(v) => Value::Ints(v.iter().map(|&i| i.into()).collect()),
            Data::Floats(v) => Value::Floats(v.clone()),
        });
        Self {
            elem_type: constant.elem_type,
            shape: Some(constant.dims.iter().map(|&d| d.into()).collect()),
            value,
        }
    }
}

/// Facts about a whole graph.
#[derive(Debug)]
pub struct Facts {
    pub symbols: Symbols,
    /// The batch the exporter baked in; `None` if the batch is dynamic.
    pub static_batch: Option<i64>,
    facts: HashMap<String, Fact>,
    batch_literals: HashMap<usize, Vec<i64>>,
    batch_bound: HashSet<usize>,
    pairs: BTreeSet<usize>,
    rows: Dim,
}

impl Facts {
    /// Facts about these values and no others.
    #[cfg(test)]
    pub(super) fn given(facts: impl Iterator<Item = (String, Fact)>) -> Self {
        Self {
            symbols: Symbols::default(),
            static_batch: None,
            facts: facts.collect(),
            batch_literals: HashMap::new(),
            batch_bound: HashSet::new(),
            pairs: BTreeSet::new(),
            rows: BATCH.into(),
        }
    }

    /// The rows in which guidance's halves lie one behind the other: the batch, or twice that where the graph makes them.
    pub fn rows(&self) -> &Dim {
        &self.rows
    }

    /// The nodes that make guidance's two halves of one row, if the graph does.
    pub fn pairs(&self) -> &BTreeSet<usize> {
        &self.pairs
    }

    /// The fact about `value`; nothing known if it is not in the graph.
    pub fn of(&self, value: &str) -> Fact {
        self.facts.get(value).cloned().unwrap_or_default()
    }

    pub fn shape(&self, value: &str) -> Option<&[Dim]> {
        self.facts.get(value)?.shape.as_deref()
    }

    /// The first dimension of `value`, if it has one that is known.
    pub fn leading(&self, value: &str) -> Option<&Dim> {
        self.shape(value)?.first()
    }

    /// The node at which the shape of `value` was lost: its operands have one, its result has none.
    pub fn lost_at<'g>(&self, graph: &'g Graph, value: &str) -> Option<&'g Node> {
        let mut at = value;
        for _ in 0..graph.nodes.len() {
            let (node, _) = graph.producer(at)?;
            let inputs = node.proto.input.iter().filter(|i| !i.is_empty());
            match inputs.into_iter().find(|i| self.shape(i).is_none()) {
                Some(unknown) => at = unknown,
                None => return Some(node),
            }
        }
        None
    }

    /// `[batch, 64, 72]`, or `unknown`.
    pub fn show(&self, value: &str) -> String {
        match self.shape(value) {
            Some(dims) => {
                format!(
                    "[{}]",
                    dims.iter()
                        .map(|d| self.symbols.show(d))
                        .collect::<Vec<_>>()
                        .join(", ")
                )
            }
            None => "unknown".into(),
        }
    }

    /// For a `Reshape` (by node index) whose constant target has the batch baked in: a target that works for any batch.
    pub fn batch_free_target(&self, node: usize) -> Option<&[i64]> {
        self.batch_literals.get(&node).map(Vec::as_slice)
    }

    /// Whether the node with this index meets an axis that grows with the batch with one of a fixed size: it works for that
    /// number of rows only.
    pub fn binds_batch(&self, node: usize) -> bool {
        self.batch_bound.contains(&node)
    }
}

/// Works through `graph` in order. `latents` names the input whose first dimension is the batch.
pub fn infer(graph: &Graph, latents: Option<&str>) -> Facts {
    infer_paired(graph, latents, BTreeSet::new())
}

/// As [`infer`]; `pairs` are the nodes that make guidance's halves of the latents' rows. Where those are a single row, the batch is
/// what these nodes make of it.
pub fn infer_paired(graph: &Graph, latents: Option<&str>, pairs: BTreeSet<usize>) -> Facts {
    let mut symbols = Symbols::default();
    assert_eq!(symbols.fresh("batch"), BATCH);
    let latent_dims = latents
        .and_then(|name| graph.inputs.iter().find(|i| i.name == name))
        .and_then(|i| i.dims.as_ref())
        .and_then(|dims| dims.first().cloned());
    // A batch of one has no halves to take: leaving it a plain 1 keeps broadcasting exact.
    let static_batch = latent_dims
        .as_ref()
        .and_then(|d| d.as_ref().ok())
        .copied()
        .filter(|&b| b > 1);
    // A name that is also that of another axis is not a private name for the batch: Flux's `img_ids` are [tokens, 3].
    let other_axes: HashSet<&str> = graph
        .inputs
        .iter()
        .flat_map(|i| i.dims.iter().flatten().skip(1))
        .filter_map(|d| d.as_ref().err())
        .map(String::as_str)
        .filter(|name| !name.is_empty())
        .collect();
    // Where the latents' name for the batch is used elsewhere too, the exporter was told that the batch is shared.
    let is_shared = latents.is_some_and(|latents| {
        graph.inputs.iter().any(|i| {
            i.name != latents
                && i.dims.as_ref().and_then(|d| d.first()) == latent_dims.as_ref()
                && matches!(latent_dims, Some(Err(_)))
        })
    });
    let mut facts = HashMap::new();
    for input in &graph.inputs {
        let is_position_table = input.name.to_ascii_lowercase().ends_with("_ids");
        let shape = input.dims.as_ref().map(|dims| {
            dims.iter()
                .enumerate()
                .map(|(axis, dim)| match dim {
                    Ok(size) if axis == 0 && Some(*size) == static_batch => BATCH.into(),
                    Ok(size) => Dim::from(*size),
                    Err(name) if Some(dim) == latent_dims.as_ref() && !name.is_empty() => {
                        BATCH.into()
                    }
                    // Exporters name the batch per input when they are not told that it is shared.
                    Err(name)
                        if axis == 0
                            && matches!(latent_dims, Some(Err(_)))
                            && !is_shared
                            && !is_position_table
                            && !other_axes.contains(name.as_str()) =>
                    {
                        BATCH.into()
                    }
                    Err(name) if name.is_empty() => symbols.fresh("?").into(),
                    Err(name) => symbols.named(name).into(),
                })
                .collect()
        });
        facts.insert(input.name.clone(), Fact::of(input.elem_type, shape));
    }
    for (name, constant) in &graph.initializers {
        if !facts.contains_key(name) {
            facts.insert(name.clone(), Fact::from(constant));
        }
    }
    let batch_name = match latent_dims {
        Some(Err(ref name)) if !name.is_empty() => Some(name.clone()),
        _ => None,
    };
    let makes_batch = !pairs.is_empty() && matches!(latent_dims, Some(Ok(1)));
    let static_batch = if makes_batch { Some(2) } else { static_batch };
    let mut walk = Walk {
        symbols,
        static_batch,
        makes_batch: if makes_batch {
            pairs.clone()
        } else {
            BTreeSet::new()
        },
        batch_name,
        facts,
        batch_literals: HashMap::new(),
        batch_bound: HashSet::new(),
    };
    walk.nodes(graph, 0);
    Facts {
        symbols: walk.symbols,
        static_batch,
        facts: walk.facts,
        batch_literals: walk.batch_literals,
        batch_bound: walk.batch_bound,
        rows: match pairs.is_empty() || makes_batch {
            true => BATCH.into(),
            false => Dim::from(BATCH).times(&2.into()).unwrap_or(BATCH.into()),
        },
        pairs,
    }
}

/// What is known so far.
struct Walk {
    symbols: Symbols,
    static_batch: Option<i64>,
    /// The nodes whose results' rows are the batch.
    makes_batch: BTreeSet<usize>,
    batch_name: Option<String>,
    facts: HashMap<String, Fact>,
    batch_literals: HashMap<usize, Vec<i64>>,
    batch_bound: HashSet<usize>,
}

/// Exporters nest conditions one or two deep.
const MAX_DEPTH: usize = 4;

impl Walk {
    /// Goes through `graph`, which lies inside `depth` conditions.
    fn nodes(&mut self, graph: &Graph, depth: usize) {
        for (index, node) in graph.nodes.iter().enumerate() {
            let inferred = if node.is("If") {
                self.condition(node, depth)
            } else {
                let inputs: Vec<Fact> = node
                    .proto
                    .input
                    .iter()
                    .map(|name| self.facts.get(name).cloned().unwrap_or_default())
                    .collect();
                let mut context = rules::Context {
                    graph,
                    node,
                    inputs: &inputs,
                    symbols: &mut self.symbols,
                    static_batch: self.static_batch,
                    repaired: None,
                    batch_is_bound: false,
                };
                let inferred = rules::outputs(&mut context);
                let (repaired, bound) = (context.repaired, context.batch_is_bound);
                if let Some(target) = repaired
                    && depth == 0
                {
                    self.batch_literals.insert(index, target);
                }
                if bound && depth == 0 {
                    self.batch_bound.insert(index);
                }
                inferred
            };
            for (slot, name) in node.proto.output.iter().enumerate() {
                let mut fact = inferred.get(slot).cloned().unwrap_or_default();
                if let Some(annotated) = graph.value_info.get(name) {
                    let annotated = from_annotation(
                        annotated,
                        &mut self.symbols,
                        self.batch_name.as_deref(),
                        self.static_batch,
                    );
                    if fact.elem_type == 0 {
                        fact.elem_type = annotated.elem_type;
                    }
                    if fact.shape.is_none() {
                        fact.shape = annotated.shape;
                    }
                }
                if depth == 0
                    && self.makes_batch.contains(&index)
                    && let Some(rows) = fact.shape.as_mut().and_then(|s| s.first_mut())
                {
                    *rows = BATCH.into();
                }
                self.facts.insert(name.clone(), fact);
            }
        }
    }

    /// TorchScript exports `squeeze` as a condition on a size: the branch that is taken, or what both agree on.
    fn condition(&mut self, node: &Node, depth: usize) -> Vec<Fact> {
        let taken = node
            .input(0)
            .and_then(|c| self.facts.get(c)?.known_ints()?.first().copied());
        let branches: &[&str] = match taken {
            Some(0) => &["else_branch"],
            Some(_) => &["then_branch"],
            None => &["then_branch", "else_branch"],
        };
        let mut results = branches.iter().map(|branch| {
            let body = node.attribute(branch)?.g.as_ref()?;
            let body = (depth < MAX_DEPTH).then(|| Graph::read(body))??;
            self.nodes(&body, depth + 1);
            let facts = body.outputs.iter();
            Some(
                facts
                    .map(|o| self.facts.get(o).cloned().unwrap_or_default())
                    .collect::<Vec<_>>(),
            )
        });
        let first = results.next().flatten().unwrap_or_default();
        match results.next() {
            Some(second) if second.as_ref() != Some(&first) => Vec::new(),
            _ => first,
        }
    }
}

fn from_annotation(
    ty: &TypeProto,
    symbols: &mut Symbols,
    batch_name: Option<&str>,
    static_batch: Option<i64>,
) -> Fact {
    let Some(tensor) = &ty.tensor_type else {
        return Fact::default();
    };
    let shape = tensor.shape.as_ref().map(|shape| {
        shape
            .dim
            .iter()
            .enumerate()
            .map(
                |(axis, dim)| match (dim.dim_value, dim.dim_param.as_deref()) {
                    (Some(size), _) if axis == 0 && Some(size) == static_batch => BATCH.into(),
                    (Some(size), _) => Dim::from(size),
                    (None, Some(name)) if Some(name) == batch_name => BATCH.into(),
                    (None, Some(name)) if !name.is_empty() => symbols.named(name).into(),
                    _ => symbols.fresh("?").into(),
                },
            )
            .collect()
    });
    Fact::of(tensor.elem_type, shape)
}
