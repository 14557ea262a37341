//! Downstream from the attention core: layout, perhaps a cut into two streams, one product with a weight each, its bias.

use super::anchor::Core;
use super::batch::Batch;
use super::source::{is_weight, projected};
use crate::onnx::{Graph, Node};
use crate::shapes::{self, Facts, LAYOUT, QUANTIZE, SIZE};

/// Where the module ends.
#[derive(Clone, Debug, PartialEq)]
pub struct Sinks {
    /// One value per stream.
    pub values: Vec<String>,
    /// Whether each is an output projection's result; without one AST reuses the core's result.
    pub projected: bool,
}

/// The sinks of `core`. Every one has the batch outermost, because its halves are put one after the other.
pub fn find(graph: &Graph, facts: &Facts, batch: &Batch, core: &Core) -> Sinks {
    let mut ends = Vec::new();
    walk(graph, &core.out.value, &mut ends);
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

fn walk(graph: &Graph, from: &str, ends: &mut Vec<End>) {
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
                    walk(graph, piece, ends);
                }
                return;
            }
            cuts if cuts
                .iter()
                .all(|n| n.is("Slice") && n.input(0) == Some(at.as_str())) =>
            {
                for cut in cuts {
                    walk(graph, cut.output(0), ends);
                }
                return;
            }
            _ => return end(ends, at, false),
        }
    }
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
