//! Attention without a softmax: nothing to window, so it is named and left alone.

use super::source::is_weight;
use crate::onnx::{Graph, Node};

/// Products of two activations whose result goes straight into another such product, through layout at most: the
/// (v·kᵀ)·q of linear attention. The last product of each chain.
pub fn sites(graph: &Graph) -> Vec<&Node> {
    let is_product =
        |n: &Node| n.is("MatMul") && !n.proto.input.iter().any(|i| is_weight(graph, i));
    graph
        .nodes
        .iter()
        .filter(|n| is_product(n))
        .filter(|n| {
            n.proto
                .input
                .iter()
                .any(|i| behind_layout(graph, i).is_some_and(is_product))
        })
        .collect()
}

fn behind_layout<'g>(graph: &'g Graph, value: &'g str) -> Option<&'g Node> {
    let mut at = value;
    loop {
        let (node, _) = graph.producer(at)?;
        match node.op() {
            "Cast" | "Transpose" | "Reshape" | "Identity" => at = node.input(0)?,
            _ => return Some(node),
        }
    }
}
