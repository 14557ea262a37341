//! The order of nodes in the file: the exporter's, unless a module with several results needs something later.

use crate::onnx::{Node, in_order};
use bytes::Bytes;

/// `nodes` so that each comes after what it reads.
pub fn topological(nodes: Vec<Bytes>) -> Vec<Bytes> {
    let decoded: Option<Vec<Node>> = nodes.iter().map(|raw| Node::read(raw.clone())).collect();
    // The exporter's nodes were read before, and ours are well-formed and need nothing that needs them.
    match decoded.map(in_order) {
        Some(Ok(ordered)) => ordered.into_iter().map(|n| n.raw).collect(),
        _ => nodes,
    }
}
