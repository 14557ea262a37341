//! Attention inside the subgraphs of If, Loop and Scan: never rewritten, always named.
//!
//! A branch may not run, a body runs several times a step: neither has a place in a plan.

use super::Reason;
use crate::onnx::{Graph, Node};
use ditfastattn_contract::operators::DOMAIN;

/// A softmax or an attention operator inside a subgraph.
pub struct Inner {
    pub label: String,
    pub op: String,
    pub reason: Reason,
}

/// Every one of the model, with the reason that names the subgraph it is in.
pub fn sites(graph: &Graph) -> Vec<Inner> {
    let mut found = Vec::new();
    for node in &graph.nodes {
        look(node, node.label(), &mut found);
    }
    found
}

fn look(node: &Node, outermost: &str, found: &mut Vec<Inner>) {
    for (name, body) in node.subgraphs() {
        for inner in Node::of_graph(body) {
            let ours = inner.domain() == DOMAIN.as_str();
            if !ours && (inner.is("Softmax") || inner.op().contains("Attention")) {
                let text = format!(
                    "attention inside the subgraph `{name}` of the {} `{}`, which is not looked into",
                    node.op(),
                    node.label()
                );
                found.push(Inner {
                    label: inner.label().to_owned(),
                    op: inner.op().to_owned(),
                    reason: Reason::new(text, [outermost]),
                });
            }
            look(&inner, outermost, found);
        }
    }
}
