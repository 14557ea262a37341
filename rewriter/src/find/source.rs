//! Where q, k and v come from: the inputs of their projections, and the graph inputs those depend on.

use crate::onnx::{Graph, Node};
use crate::shapes::{
    self, COPY, Dim, Facts, LAYOUT, PROJECTION, QUANTIZE, RESHAPE, SCALE, SIZE, SUM,
};
use std::collections::{BTreeSet, HashMap, HashSet};

/// For every value, the graph inputs it depends on. `Shape` breaks dependence: a size is not data.
#[derive(Debug)]
pub struct Dependence {
    of: HashMap<String, BTreeSet<usize>>,
    inputs: HashMap<String, usize>,
}

impl Dependence {
    pub fn new(graph: &Graph) -> Self {
        let inputs: HashMap<String, usize> = graph
            .inputs
            .iter()
            .enumerate()
            .map(|(i, input)| (input.name.clone(), i))
            .collect();
        let mut of: HashMap<String, BTreeSet<usize>> = inputs
            .iter()
            .map(|(name, &i)| (name.clone(), BTreeSet::from([i])))
            .collect();
        for node in &graph.nodes {
            let mut set = BTreeSet::new();
            if !shapes::is(node, SIZE) {
                for input in node.proto.input.iter().chain(&node.captured) {
                    set.extend(of.get(input).into_iter().flatten());
                }
            }
            for output in &node.proto.output {
                of.insert(output.clone(), set.clone());
            }
        }
        Self { of, inputs }
    }

    /// Whether `value` depends on the graph input called `input`.
    pub fn on(&self, value: &str, input: &str) -> bool {
        let Some(index) = self.inputs.get(input) else {
            return false;
        };
        self.of.get(value).is_some_and(|set| set.contains(index))
    }

    pub fn on_anything(&self, value: &str) -> bool {
        self.of.get(value).is_some_and(|set| !set.is_empty())
    }
}

/// Whether `value` is a weight: constant, or computed from constants only.
pub fn is_weight(graph: &Graph, value: &str) -> bool {
    let mut at = value;
    loop {
        if graph.initializers.contains_key(at) {
            return true;
        }
        match graph.producer(at) {
            Some((node, _)) if node.is("Constant") => return true,
            Some((node, _))
                if shapes::is(node, LAYOUT | QUANTIZE | SCALE)
                    && node.proto.input.iter().skip(1).all(|i| is_small(graph, i)) =>
            {
                match node.input(0) {
                    Some(input) => at = input,
                    None => return false,
                }
            }
            _ => return false,
        }
    }
}

/// Scales, axes and the like: constants, or nothing.
fn is_small(graph: &Graph, value: &str) -> bool {
    value.is_empty()
        || graph.initializers.contains_key(value)
        || graph
            .producer(value)
            .is_some_and(|(node, _)| node.is("Constant"))
}

/// The data operand of a projection: a product with a weight. `None` if `node` is no projection.
pub fn projected<'n>(graph: &Graph, node: &'n Node) -> Option<&'n str> {
    let (a, b) = (node.input(0)?, node.input(1));
    if !shapes::is(node, PROJECTION) {
        return None;
    }
    match (is_weight(graph, a), b.is_some_and(|b| is_weight(graph, b))) {
        (false, true) => Some(a),
        (true, false) => b,
        _ => None,
    }
}

/// The value behind casts and reshapes, so that two spellings of one tensor compare equal.
pub fn root<'g>(graph: &'g Graph, value: &'g str) -> &'g str {
    let mut at = value;
    while let Some((node, slot)) = graph.producer(at) {
        let transparent = slot == 0 && shapes::is(node, COPY | RESHAPE | QUANTIZE);
        match node.input(0) {
            Some(input) if transparent => at = input,
            _ => break,
        }
    }
    at
}

/// Inputs of the projections that `value` is computed from, as they stand in the graph; without any projection, the graph
/// inputs. Values that depend on nothing fed (position tables) are no source, nor is what is the same for all tokens (a shift
/// by the time).
pub fn sources(
    graph: &Graph,
    facts: &Facts,
    dependence: &Dependence,
    value: &str,
) -> BTreeSet<String> {
    let mut projections = BTreeSet::new();
    let mut inputs = BTreeSet::new();
    let mut seen = HashSet::new();
    let mut pending = vec![value];
    while let Some(at) = pending.pop() {
        if !seen.insert(at) || !dependence.on_anything(at) {
            continue;
        }
        let Some((node, slot)) = graph.producer(at) else {
            inputs.insert(at.to_owned());
            continue;
        };
        if node.is("DynamicQuantizeLinear") && slot > 0 {
            continue;
        }
        match projected(graph, node) {
            Some(data) => {
                if dependence.on_anything(data) {
                    projections.insert(data.to_owned());
                }
            }
            None => pending.extend(
                node.proto
                    .input
                    .iter()
                    .map(String::as_str)
                    .filter(|i| !i.is_empty() && !is_broadcast(facts, node, i)),
            ),
        }
    }
    // A low-rank adapter is a projection of a projection of the same source.
    let adapters: Vec<String> = projections
        .iter()
        .filter(|data| {
            projection_behind(graph, data).is_some_and(|source| projections.contains(source))
        })
        .cloned()
        .collect();
    for adapter in &adapters {
        projections.remove(adapter);
    }
    if projections.is_empty() {
        inputs
    } else {
        projections
    }
}

/// Whether the addition or multiplication `node` repeats its operand `value` along an axis.
fn is_broadcast(facts: &Facts, node: &Node, value: &str) -> bool {
    let shapes = facts.shape(value).zip(facts.shape(node.output(0)));
    let Some((operand, result)) = shapes.filter(|_| shapes::is(node, SUM | SCALE)) else {
        return false;
    };
    let skipped = result.len().saturating_sub(operand.len());
    let is_one = |d: &Dim| d.known() == Some(1);
    let repeats = |(a, b): (&Dim, &Dim)| is_one(a) && !is_one(b);
    result[..skipped].iter().any(|d| !is_one(d))
        || operand.iter().zip(&result[skipped..]).any(repeats)
}

/// What `value` is a projection of, if it is one (scaled, perhaps).
fn projection_behind<'g>(graph: &'g Graph, value: &'g str) -> Option<&'g str> {
    let mut at = value;
    loop {
        let (node, _) = graph.producer(at)?;
        if let Some(source) = projected(graph, node) {
            return Some(source);
        }
        if !shapes::is(node, COPY | RESHAPE | SCALE) {
            return None;
        }
        at = node.input(0)?;
    }
}
