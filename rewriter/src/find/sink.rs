//! Downstream from the attention core: layout, perhaps a gate or a norm, perhaps a cut into two streams, one product with a
//! weight each, its bias.

use super::anchor::Core;
use super::batch::Batch;
use super::module::Scene;
use super::source::{is_weight, projected};
use crate::onnx::{Graph, Node};
use crate::shapes::{self, ELEMENT, Facts, LAYOUT, NORM, QUANTIZE, SIZE, SUM};
use std::collections::HashSet;

/// Where the module ends.
#[derive(Clone, Debug, PartialEq)]
pub struct Sinks {
    /// One value per stream.
    pub values: Vec<String>,
    /// Whether each is an output projection's result; without one AST reuses the core's result.
    pub projected: bool,
}

/// The sinks of `core`. Every one has the batch outermost, because its halves are put one after the other.
pub fn find(scene: &Scene, core: &Core) -> Sinks {
    let &Scene {
        graph,
        facts,
        batch,
        ..
    } = scene;
    let mut ends = Vec::new();
    walk(scene, &core.out.value, &mut ends);
    let ends: Vec<End> = ends
        .into_iter()
        .map(|end| to_batch_major(graph, facts, batch, end))
        .collect();
    if ends.iter().any(|e| e.projected) {
        Sinks {
            values: ends.into_iter().map(|e| e.value).collect(),
            projected: true,
        }
    } else {
        Sinks {
            values: vec![core.out.value.clone()],
            projected: false,
        }
    }
}

struct End {
    value: String,
    projected: bool,
}

/// A module has as many streams as a model has kinds of tokens; more are no streams.
const MAX_STREAMS: usize = 4;

fn walk(scene: &Scene, from: &str, ends: &mut Vec<End>) {
    let graph = scene.graph;
    let mut at = from.to_owned();
    loop {
        let users = data_consumers(graph, &at);
        let end = |ends: &mut Vec<End>, value: String, projected| {
            ends.push(End { value, projected });
        };
        if graph.is_output(&at) || ends.len() >= MAX_STREAMS {
            return end(ends, at, false);
        }
        match users.as_slice() {
            [] => return,
            [quantize] if quantize.is("DynamicQuantizeLinear") => {
                return match quantized(graph, quantize) {
                    Some(value) => end(ends, value, true),
                    None => end(ends, at, false),
                };
            }
            [node] if is_layout(node) && node.input(0) == Some(at.as_str()) => {
                at = node.output(0).to_owned();
            }
            [node] if projected(graph, node) == Some(at.as_str()) && !mixes_tokens(node) => {
                return end(ends, with_bias(graph, node.output(0)), true);
            }
            [node] if node.is("Split") && node.input(0) == Some(at.as_str()) => {
                for piece in node.proto.output.iter().filter(|o| !o.is_empty()) {
                    walk(scene, piece, ends);
                }
                return;
            }
            cuts if cuts
                .iter()
                .all(|n| n.is("Slice") && n.input(0) == Some(at.as_str())) =>
            {
                // By name, not as the file has them: the order of the sinks is part of what explicit state is called.
                let mut pieces: Vec<&str> = cuts.iter().map(|n| n.output(0)).collect();
                pieces.sort_unstable();
                for piece in pieces {
                    walk(scene, piece, ends);
                }
                return;
            }
            _ => {
                return match behind_gate(scene, &at) {
                    Some(value) => end(ends, value, true),
                    None => end(ends, at, false),
                };
            }
        }
    }
}

/// A gate or a norm is a few nodes.
const MAX_GATE: usize = 32;

/// The result of the one projection that everything made of `from` goes into, token by token: behind a gate on attention's
/// result, or a norm of it. A sum with anything but a weight is the residual stream, and what is neither made of the latents nor
/// of the time is a mask with rows of its own: neither is the module's.
fn behind_gate(scene: &Scene, from: &str) -> Option<String> {
    let graph = scene.graph;
    let mut made: HashSet<&str> = HashSet::from([from]);
    let mut pending = vec![from];
    let mut between: Vec<&Node> = Vec::new();
    let mut projection: Option<&Node> = None;
    while let Some(at) = pending.pop() {
        if graph.is_output(at) || made.len() > MAX_GATE {
            return None;
        }
        for node in data_consumers(graph, at) {
            if projected(graph, node) == Some(at) && !mixes_tokens(node) {
                if projection.is_some_and(|p| p.output(0) != node.output(0)) {
                    return None;
                }
                projection = Some(node);
                continue;
            }
            let is_gate = shapes::is(node, ELEMENT | NORM) || is_layout(node);
            if !is_gate || node.has_subgraph() {
                return None;
            }
            between.push(node);
            for result in node.proto.output.iter().filter(|o| !o.is_empty()) {
                if made.insert(result) {
                    pending.push(result);
                }
            }
        }
    }
    let of_gate = |value: &str| {
        let on = |input: &str| scene.dependence.on(value, input);
        on(&scene.inputs.latents)
            || on(&scene.inputs.timestep)
            || !scene.dependence.on_anything(value)
    };
    let belongs = |node: &&Node| {
        let inputs = node.proto.input.iter().map(String::as_str);
        let mut others =
            inputs.filter(|v| !v.is_empty() && !made.contains(v) && !is_weight(graph, v));
        others.all(|v| !shapes::is(node, SUM) && of_gate(v))
    };
    projection
        .filter(|_| between.iter().all(belongs))
        .map(|p| with_bias(graph, p.output(0)))
}

/// A convolution over more than one position is no projection of tokens.
fn mixes_tokens(node: &Node) -> bool {
    node.is("Conv")
        && node
            .ints("kernel_shape")
            .is_none_or(|k| k.iter().any(|&size| size != 1))
}

fn is_layout(node: &Node) -> bool {
    shapes::is(node, LAYOUT | QUANTIZE) && !node.is("DynamicQuantizeLinear")
}

/// The nodes that use `value` as data; reading its shape does not count.
fn data_consumers<'g>(graph: &'g Graph, value: &str) -> Vec<&'g Node> {
    graph
        .consumers(value)
        .iter()
        .map(|&i| &graph.nodes[i])
        .filter(|n| !shapes::is(n, SIZE))
        .collect()
}

fn only_user<'g>(graph: &'g Graph, value: &str) -> Option<&'g Node> {
    match data_consumers(graph, value)[..] {
        [only] if !graph.is_output(value) => Some(only),
        _ => None,
    }
}

/// `projection` and the constant that is added to it.
fn with_bias(graph: &Graph, projection: &str) -> String {
    let bias = only_user(graph, projection).filter(|add| {
        add.is("Add")
            && add
                .proto
                .input
                .iter()
                .all(|i| i == projection || is_weight(graph, i))
    });
    bias.map_or(projection, |add| add.output(0)).to_owned()
}

/// DynamicQuantizeLinear → MatMulInteger → Cast → Mul by the scales → Add: a projection in int8.
fn quantized(graph: &Graph, quantize: &Node) -> Option<String> {
    let product = only_user(graph, quantize.output(0))
        .filter(|n| projected(graph, n) == Some(quantize.output(0)))?;
    let mut at = product.output(0);
    if product.is("MatMulInteger") {
        let cast = only_user(graph, at).filter(|n| n.is("Cast"))?;
        let scaled = only_user(graph, cast.output(0)).filter(|n| n.is("Mul"))?;
        at = scaled.output(0);
    }
    Some(with_bias(graph, at))
}

/// Follows layout nodes to the next value in which the batch is outermost; `end` itself if there is none.
fn to_batch_major(graph: &Graph, facts: &Facts, batch: &Batch, end: End) -> End {
    let mut at = end.value.as_str();
    loop {
        if batch.is_outermost(facts, at) {
            return End {
                value: at.to_owned(),
                ..end
            };
        }
        match only_user(graph, at) {
            Some(node) if is_layout(node) && node.input(0) == Some(at) => at = node.output(0),
            _ => return end,
        }
    }
}
