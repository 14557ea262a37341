//! Attention without a softmax: nothing to window, so it is named and left alone.

use super::source::is_weight;
use crate::onnx::{Graph, Node};
use crate::shapes::{self, LAYOUT, LINEAR};

/// Operators of linear attention, and products of two activations whose result goes straight into another such product, through layout at most: the
/// (v·kᵀ)·q of linear attention. The last product of each chain.
pub fn sites(graph: &Graph) -> Vec<&Node> {
    let is_product =
        |n: &Node| n.is("MatMul") && !n.proto.input.iter().any(|i| is_weight(graph, i));
    let ends_chain = |n: &Node| {
        let mut inputs = n.proto.input.iter();
        is_product(n) && inputs.any(|i| behind_layout(graph, i).is_some_and(is_product))
    };
    let nodes = graph.nodes.iter();
    nodes
        .filter(|n| shapes::is(n, LINEAR) || ends_chain(n))
        .collect()
}

fn behind_layout<'g>(graph: &'g Graph, value: &'g str) -> Option<&'g Node> {
    let mut at = value;
    loop {
        let (node, _) = graph.producer(at)?;
        if !shapes::is(node, LAYOUT) {
            return Some(node);
        }
        at = node.input(0)?;
    }
}
