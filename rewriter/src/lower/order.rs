//! The order of nodes in the file: the exporter's, unless a module with several results needs something later.

use crate::onnx::Node;
use bytes::Bytes;
use std::collections::HashMap;

/// `nodes` so that each comes after what it reads. Already so: unchanged. Otherwise what is needed moves up, just before the
/// node that needs it.
pub fn topological(nodes: Vec<Bytes>) -> Vec<Bytes> {
    let decoded: Option<Vec<Node>> = nodes.iter().map(|raw| Node::read(raw.clone())).collect();
    // Nodes that cannot be read were refused when the file was opened, or are ours.
    let Some(decoded) = decoded else { return nodes };
    let mut producer: HashMap<&str, usize> = HashMap::new();
    for (index, node) in decoded.iter().enumerate() {
        for output in node.proto.output.iter().filter(|o| !o.is_empty()) {
            producer.insert(output, index);
        }
    }
    let mut order = Vec::with_capacity(nodes.len());
    let mut placed = vec![false; nodes.len()];
    for start in 0..nodes.len() {
        let mut pending = vec![(start, 0)];
        while let Some((node, next)) = pending.pop() {
            if placed[node] {
                continue;
            }
            let needed: Vec<usize> = decoded[node]
                .proto
                .input
                .iter()
                .chain(&decoded[node].captured)
                .filter_map(|v| producer.get(v.as_str()).copied())
                .filter(|&p| !placed[p] && p != node)
                .collect();
            match needed.first() {
                // A cycle cannot be: every patch keeps what depends on what. The bound only keeps a bug from hanging.
                Some(&first) if next <= nodes.len() => {
                    pending.push((node, next + 1));
                    pending.push((first, 0));
                }
                _ => {
                    placed[node] = true;
                    order.push(node);
                }
            }
        }
    }
    order.into_iter().map(|i| nodes[i].clone()).collect()
}
