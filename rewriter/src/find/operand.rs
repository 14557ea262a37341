//! Reading an attention operand further upstream: transposes become a layout, scalar factors become the scale.
//!
//! The op reads q, k and v with any strides, so the exporter's head transposes, its Kᵀ in all spellings and its two
//! √scale multiplications need not run at all.

use crate::onnx::Graph;
use crate::shapes::{Dim, Facts};

/// A tensor the op reads or writes, and what its axes are.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    pub value: String,
    /// What a fused operator did to the tensor inside, and lowering has to write out; the op sees the result.
    pub prep: Vec<Prep>,
    /// One letter per axis, after `prep`: B batch, H head, S token, D channel; rank 3 has B for batch × heads.
    pub layout: String,
}

/// One step from a value of the graph to what the op reads. Of the op's result it is read backwards.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Prep {
    /// `[B, S, C]` · weights `[C, W]` (+ bias `[W]`): a projection inside a fused operator.
    Project {
        weights: String,
        bias: Option<String>,
    },
    /// Adds elements `from..to` of the vector `bias` to the last axis.
    AddBias { bias: String, from: i64, to: i64 },
    /// Elements `from..to` of the last axis.
    Columns { from: i64, to: i64 },
    /// [B, S, H·D] → [B, S, H, D].
    SplitHeads(i64),
    /// Multiplied by a tensor that is one number per head: a learnt temperature.
    Times(String),
    /// Brought to this element type: the op reads q, k and v in one.
    Cast(i32),
    /// One element of an axis, which disappears.
    Pick { axis: i64, index: i64 },
}

impl Operand {
    pub fn new(value: &str, layout: &str) -> Self {
        Self {
            value: value.into(),
            prep: Vec::new(),
            layout: layout.into(),
        }
    }

    /// [B, S, H·D], the heads side by side.
    pub fn packed(value: &str, heads: i64) -> Self {
        Self {
            value: value.into(),
            prep: vec![Prep::SplitHeads(heads)],
            layout: "BSHD".into(),
        }
    }

    /// Whether a projection is part of `prep`: then `value` is the projection's input.
    pub fn projects(&self) -> bool {
        self.prep.iter().any(|p| matches!(p, Prep::Project { .. }))
    }

    /// The names `prep` reads beside `value`: weights and biases.
    pub fn side_values(&self) -> impl Iterator<Item = &str> {
        self.prep
            .iter()
            .flat_map(|p| match p {
                Prep::Project { weights, bias } => [Some(weights), bias.as_ref()],
                Prep::AddBias { bias, .. } => [Some(bias), None],
                Prep::Times(factor) => [Some(factor), None],
                _ => [None, None],
            })
            .flatten()
            .map(String::as_str)
    }

    /// The element type of what the op reads, whose `prep` has no cast yet; 0 if unknown.
    pub fn elem_type(&self, facts: &Facts) -> i32 {
        let weights = self.prep.iter().find_map(|p| match p {
            Prep::Project { weights, .. } => Some(weights),
            _ => None,
        });
        facts.of(weights.unwrap_or(&self.value)).elem_type
    }

    /// The same in the type `to`, before it is multiplied.
    pub fn cast(mut self, to: i32) -> Self {
        let multiplied = self.prep.iter().position(|p| matches!(p, Prep::Times(_)));
        let at = multiplied.unwrap_or(self.prep.len());
        self.prep.insert(at, Prep::Cast(to));
        self
    }

    /// The shape after `prep`.
    pub fn shape(&self, facts: &Facts) -> Option<Vec<Dim>> {
        let mut dims = facts.shape(&self.value)?.to_vec();
        for step in &self.prep {
            match step {
                Prep::Project { weights, .. } => {
                    *dims.last_mut()? = facts.shape(weights)?.last()?.clone();
                }
                Prep::AddBias { .. } | Prep::Times(_) | Prep::Cast(_) => {}
                Prep::Columns { from, to } => *dims.last_mut()? = (to - from).into(),
                Prep::SplitHeads(heads) => {
                    let width = dims.pop()?;
                    dims.extend([(*heads).into(), width.over(&(*heads).into())?]);
                }
                Prep::Pick { axis, .. } => {
                    let axis = usize::try_from(*axis).ok().filter(|&a| a < dims.len())?;
                    dims.remove(axis);
                }
            }
        }
        Some(dims)
    }

    /// The size of the axis called `letter`.
    pub fn size(&self, facts: &Facts, letter: char) -> Option<Dim> {
        let axis = self.layout.find(letter)?;
        let shape = self.shape(facts)?;
        (shape.len() == self.layout.len()).then(|| shape[axis].clone())
    }

    /// The axis of `value` itself (not of what `prep` makes of it) that holds the tokens.
    pub fn token_axis(&self) -> Option<usize> {
        match self.prep.first() {
            None | Some(Prep::Times(_) | Prep::Cast(_)) => self.layout.find('S'),
            // Every fused operator takes [B, S, …].
            Some(_) => Some(1),
        }
    }
}

/// What the op can read: any order of four axes; of three, the folded batch and heads first.
pub fn is_supported(layout: &str) -> bool {
    match layout.len() {
        4 => true,
        3 => layout.starts_with('B'),
        _ => false,
    }
}

fn permuted(layout: &str, perm: &[i64]) -> Option<String> {
    // x = Transpose(y, perm): axis i of x is axis perm[i] of y.
    let letters: Vec<char> = layout.chars().collect();
    let mut result = vec!['?'; letters.len()];
    if perm.len() != letters.len() {
        return None;
    }
    for (letter, &axis) in letters.iter().zip(perm) {
        *result.get_mut(usize::try_from(axis).ok()?)? = *letter;
    }
    (!result.contains(&'?')).then(|| result.into_iter().collect())
}

/// Walks `operand` upstream while nothing but layout (and, with `scale`, a constant factor) is in the way. The factor is
/// multiplied into `scale`.
pub fn absorb(graph: &Graph, facts: &Facts, operand: &Operand, scale: Option<&mut f64>) -> Operand {
    if !operand.prep.is_empty() {
        return operand.clone();
    }
    let rank = operand.layout.len();
    let mut at = operand.clone();
    let mut factor = 1.0;
    let mut best = (at.clone(), factor);
    while let Some((node, _)) = graph.producer(&at.value) {
        if !node.domain().is_empty() {
            break;
        }
        let through = |value: Option<&str>| Some(Operand::new(value?, &at.layout));
        let next = match node.op() {
            "Identity" => through(node.input(0)),
            "Cast" => through(node.input(0).filter(|v| {
                facts.of(v).elem_type == facts.of(&at.value).elem_type && facts.of(v).elem_type != 0
            })),
            "Transpose" => node
                .ints("perm")
                .and_then(|perm| permuted(&at.layout, perm))
                .and_then(|layout| Some(Operand::new(node.input(0)?, &layout))),
            "Reshape" => node.input(0).and_then(|v| regrouped(facts, &at, v)),
            "Mul" | "Div" if scale.is_some() => {
                scalar_factor(facts, node.op(), node.input(0), node.input(1)).and_then(|(v, f)| {
                    factor *= f;
                    through(Some(v))
                })
            }
            _ => None,
        };
        let Some(next) = next else { break };
        at = next;
        if at.layout.len() == rank && is_supported(&at.layout) {
            best = (at.clone(), factor);
        }
    }
    if let Some(scale) = scale {
        *scale *= best.1;
    }
    best.0
}

/// `(tensor, factor)` of a multiplication or division by one known number.
pub fn scalar_factor<'g>(
    facts: &Facts,
    op: &str,
    a: Option<&'g str>,
    b: Option<&'g str>,
) -> Option<(&'g str, f64)> {
    let (a, b) = (a?, b?);
    let number = |v: &str| facts.of(v).scalar().filter(|f| f.is_finite() && *f != 0.0);
    match (op, number(a), number(b)) {
        ("Mul", _, Some(f)) => Some((a, f)),
        ("Mul", Some(f), None) => Some((b, f)),
        ("Div", _, Some(f)) => Some((a, 1.0 / f)),
        _ => None,
    }
}

/// The operand seen through a Reshape that only joins or splits batch and head: [B, H, a, b] ↔ [B·H, a, b].
fn regrouped(facts: &Facts, at: &Operand, input: &str) -> Option<Operand> {
    let (to, from) = (facts.shape(&at.value)?, facts.shape(input)?);
    if to == from {
        return Some(Operand::new(input, &at.layout));
    }
    let n = to.len();
    if from.len() < 2 || n < 2 || to[n - 2..] != from[from.len() - 2..] {
        return None;
    }
    let tail = &at.layout[at.layout.len() - 2..];
    let layout = match (n, from.len()) {
        (4, 3) if at.layout.starts_with("BH") => format!("B{tail}"),
        (3, 4) if at.layout.starts_with('B') => format!("BH{tail}"),
        _ => return None,
    };
    Some(Operand::new(input, &layout))
}

/// Follows the attention's result downstream through transposes that nothing else sees.
pub fn absorb_result(graph: &Graph, facts: &Facts, result: &Operand) -> Operand {
    let mut at = result.clone();
    if !at.prep.is_empty() {
        return at;
    }
    while let Some(index) = graph.only_consumer(&at.value) {
        let node = &graph.nodes[index];
        let layout = match node.op() {
            "Transpose" if node.domain().is_empty() => node.ints("perm").and_then(|perm| {
                let letters: Vec<char> = at.layout.chars().collect();
                perm.iter()
                    .map(|&p| letters.get(usize::try_from(p).ok()?).copied())
                    .collect::<Option<String>>()
            }),
            "Identity" => Some(at.layout.clone()),
            "Cast" if facts.of(node.output(0)).elem_type == facts.of(&at.value).elem_type => {
                Some(at.layout.clone())
            }
            _ => None,
        };
        // The op writes halves of a batch, so the batch comes first.
        let Some(layout) = layout.filter(|l| l.starts_with('B')) else {
            break;
        };
        at = Operand::new(node.output(0), &layout);
    }
    at
}
