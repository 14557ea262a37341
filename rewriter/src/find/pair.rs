//! Guidance that the graph itself makes: one row goes in, and its conditional and unconditional form are put one behind the
//! other, as speech models are exported. Owns where that happens; those halves are then the halves of guidance.

use super::source::Dependence;
use crate::onnx::{Graph, Node};
use crate::shapes::{self, Dim, Facts, REPEAT};
use std::collections::BTreeSet;

/// The nodes that put two forms of the latents' rows one behind the other, and everything else that is doubled like them; none
/// if the latents are not.
pub fn pairs(
    graph: &Graph,
    facts: &Facts,
    dependence: &Dependence,
    latents: &str,
) -> BTreeSet<usize> {
    let Some(rows) = facts.leading(latents) else {
        return BTreeSet::new();
    };
    // A batch that was exported has the halves that the caller put there.
    if facts.static_batch.is_some() {
        return BTreeSet::new();
    }
    let nodes = graph.nodes.iter().enumerate();
    let doubling: Vec<(usize, &Node)> = nodes
        .filter(|(_, node)| doubles(facts, node, rows))
        .filter(|(_, node)| dependence.on_anything(node.output(0)))
        .collect();
    let of_latents = |(_, node): &(usize, &Node)| {
        let halves = halves(node);
        halves.iter().all(|v| dependence.on(v, latents))
    };
    if !doubling.iter().any(of_latents) {
        return BTreeSet::new();
    }
    doubling.into_iter().map(|(index, _)| index).collect()
}

/// Whether all of `sources`, which feed the layers, have twice the latents' rows: then the rows were doubled in front of every
/// layer, not somewhere inside one.
pub fn are_behind<'v>(
    facts: &Facts,
    latents: &str,
    sources: impl Iterator<Item = &'v String>,
) -> bool {
    let Some(doubled) = facts
        .leading(latents)
        .and_then(|rows| rows.times(&2.into()))
    else {
        return false;
    };
    let is_doubled = |source: &String| {
        let rows = facts.leading(source).and_then(|rows| rows.over(&doubled));
        rows.is_some_and(|rest| rest.is_whole())
    };
    let mut sources = sources.peekable();
    sources.peek().is_some() && sources.all(is_doubled)
}

/// The operands that become rows of the result.
fn halves(node: &Node) -> Vec<&str> {
    let operands = if node.is("Concat") { usize::MAX } else { 1 };
    let inputs = node.proto.input.iter().take(operands);
    inputs.map(String::as_str).collect()
}

/// Whether the result of `node` has twice as many rows as its operands, which have `rows` each.
fn doubles(facts: &Facts, node: &Node, rows: &Dim) -> bool {
    let halves = halves(node);
    let is_pair = match node.is("Concat") {
        true => {
            halves.len() == 2
                && node
                    .int("axis")
                    .is_some_and(|axis| is_first(facts, node, axis))
        }
        false => shapes::is(node, REPEAT),
    };
    is_pair
        && halves.iter().all(|v| facts.leading(v) == Some(rows))
        && rows.times(&2.into()).as_ref() == facts.leading(node.output(0))
}

fn is_first(facts: &Facts, node: &Node, axis: i64) -> bool {
    let rank = facts.shape(node.output(0)).map(<[Dim]>::len);
    rank.is_some_and(|rank| shapes::axis(axis, rank) == Some(0))
}
