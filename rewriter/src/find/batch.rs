//! Where the batch lies in every value. Halving a batch, and putting two halves one after the other, is only right where
//! the batch is outermost.

use crate::onnx::Graph;
use crate::shapes::{self, AxisOffset, BATCH, Dim, Facts};
use std::collections::HashMap;

#[derive(Debug)]
pub struct Batch {
    places: HashMap<String, AxisOffset>,
    /// The model was exported for a single row: it has no halves, so nothing can depend on their number.
    single: bool,
}

impl Batch {
    pub fn new(graph: &Graph, facts: &Facts) -> Self {
        let carries = |value: &str| {
            facts
                .shape(value)
                .is_some_and(|s| s.iter().any(|d| d.depends_on(BATCH)))
        };
        let single = facts.static_batch.is_none() && !graph.inputs.iter().any(|i| carries(&i.name));
        let mut places: HashMap<String, AxisOffset> = graph
            .inputs
            .iter()
            .filter(|i| leads(facts, &i.name))
            .map(|i| (i.name.clone(), Dim::from(1)))
            .collect();
        for (index, node) in graph.nodes.iter().enumerate() {
            if facts.pairs().contains(&index) {
                places.insert(node.output(0).to_owned(), Dim::from(1));
                continue;
            }
            for (out, name) in node.proto.output.iter().enumerate() {
                if name.is_empty() || !carries(name) {
                    continue;
                }
                let mut found: Option<AxisOffset> = None;
                let mut agree = true;
                for (slot, input) in node.proto.input.iter().enumerate() {
                    let Some(at) = places.get(input) else {
                        continue;
                    };
                    if let Some(to) = shapes::propagate_axis_apart(facts, node, slot, at, out) {
                        agree &= found.as_ref().is_none_or(|f| *f == to);
                        found = Some(to);
                    }
                }
                // A leading axis that is the batch and nothing else needs no proof: two halves put together again.
                if !agree || found.is_none() {
                    found = is_batch(facts, name).then(|| Dim::from(1));
                }
                if let Some(to) = found {
                    places.insert(name.clone(), to);
                }
            }
        }
        Self { places, single }
    }

    /// Whether the model was exported for a single row.
    pub fn is_single(&self) -> bool {
        self.single
    }

    /// Whether halves of `value`'s leading axis are halves of the batch, or there are none to take.
    pub fn has_halves(&self, facts: &Facts, value: &str) -> bool {
        self.single || self.is_outermost(facts, value)
    }

    /// Whether the rows of the batch lie one after the other in `value`, all of them. A leading axis that is the batch and
    /// nothing else shows it; one that is folded from several must have been followed all the way from the inputs.
    pub fn is_outermost(&self, facts: &Facts, value: &str) -> bool {
        let is_whole = facts
            .leading(value)
            .and_then(|d| d.over(facts.rows()))
            .is_some_and(|rest| rest.is_whole());
        is_batch(facts, value)
            || (leads(facts, value)
                && is_whole
                && self.places.get(value).and_then(Dim::known) == Some(1))
    }
}

fn is_batch(facts: &Facts, value: &str) -> bool {
    facts.leading(value) == Some(facts.rows())
}

/// Whether the leading axis of `value` grows with the batch.
pub fn leads(facts: &Facts, value: &str) -> bool {
    facts.leading(value).is_some_and(|d| d.depends_on(BATCH))
}
