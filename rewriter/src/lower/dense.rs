//! Who computes attention at steps that stay dense: the op, or the exporter's own nodes, which then stay beside it.
//!
//! Owns that choice and the second `If` it takes, inside the layer's own. Knows nothing about which of the two is faster.

use super::LowerError;
use super::build::{self, Writer};
use super::layer::Lowering;
use crate::find::Survey;
use crate::onnx::Graph;
use std::collections::HashMap;

/// Who computes attention over all keys of all rows that leaves no R.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dense {
    /// The op, as at every other step.
    #[default]
    Library,
    /// The host, with the nodes that the exporter wrote.
    Host,
}

/// The layers that keep the exporter's attention beside the op: all or none. ONNX Runtime (seen in 1.32) ends the process when it
/// moves a DequantizeLinear towards an inner `If`, so models with such nodes are left to the op.
pub fn layers(graph: &Graph, survey: &Survey, dense: Dense) -> Vec<usize> {
    let quantised = graph.nodes.iter().any(|n| n.op() == "DequantizeLinear");
    match dense {
        Dense::Host if !quantised => survey.layers().map(|l| l.index).collect(),
        _ => Vec::new(),
    }
}

impl Lowering<'_> {
    /// Writes the layer's attention; its result has the name of the exporter's. `present` is R after it where the graph carries
    /// the state.
    ///
    /// # Errors
    /// Nodes of the exporter's that cannot be moved.
    pub fn attend(
        &self,
        w: &mut Writer<'_>,
        renamed: &HashMap<String, String>,
        present: &str,
    ) -> Result<(), LowerError> {
        let Some(dense) = self.step.dense.get(&self.layer.index) else {
            self.attention(renamed, present).write(w);
            return Ok(());
        };
        let (prefix, out) = (self.prefix, &self.layer.core.out.value);
        let before = std::mem::take(&mut w.nodes);
        let [ours, theirs] = ["attended", "dense"].map(|what| {
            let result = w.names.fresh(&format!("{prefix}/{what}"));
            let mut renamed = renamed.clone();
            renamed.insert(out.clone(), result.clone());
            (result, renamed)
        });
        // The op attends to some rows, the host to all: an `If` whose outputs had sizes would insist on them.
        let branch = |place: &str, nodes, types, result: &str| {
            let outputs = vec![build::any_sizes(result, &self.fact(out))];
            build::branch(format!("{prefix}/{place}"), nodes, outputs, types)
        };
        let types = std::mem::take(&mut w.value_info);
        self.attention(&ours.1, present).write(w);
        let ours = branch(
            "by_library",
            std::mem::take(&mut w.nodes),
            std::mem::replace(&mut w.value_info, types),
            &ours.0,
        );
        for &index in self.replaced {
            let node = &self.graph.nodes[index];
            let moved = self.moved_node(node, &theirs.1, None, false, w.names)?;
            w.nodes.push(moved);
        }
        let nodes = std::mem::replace(&mut w.nodes, before);
        let theirs = branch("by_host", nodes, Vec::new(), &theirs.0);
        let name = w.names.fresh(&format!("{prefix}/dense_if"));
        let result = renamed.get(out).unwrap_or(out);
        w.nodes
            .push(build::either(name, dense, theirs, ours, &[result]));
        Ok(())
    }
}
