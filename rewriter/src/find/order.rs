//! The numbers of layers, which a plan's columns stand for: by the graph, never by the order of nodes in the file.
//!
//! A layer that depends on another comes after it. Layers that do not depend on one another come in the order in which their
//! results join the residual stream: the first sum downstream with something that depends on the latents too. Where two join
//! apart from each other, the operand order of the node in which they first meet decides. Optimisers sort nodes anew, and a
//! plan means the same before and after.

use super::source::Dependence;
use crate::onnx::{Graph, Node};
use crate::shapes::{self, SUM};
use std::cmp::Ordering;

/// The places of `results`, which are layers' results, in the order of their numbers.
pub fn order(
    graph: &Graph,
    dependence: &Dependence,
    latents: &str,
    results: &[&str],
) -> Vec<usize> {
    let depths = depths(graph);
    let layers: Vec<Behind> = results
        .iter()
        .map(|result| Behind::new(graph, dependence, latents, &depths, result))
        .collect();
    let producer = |i: usize| graph.producer_index(results[i]).map(|(node, _)| node);
    let depends = |later: usize, earlier: usize| {
        later != earlier && producer(later).is_some_and(|node| layers[earlier].reaches[node])
    };
    let count = layers.len();
    let mut waits_for: Vec<usize> = (0..count)
        .map(|i| (0..count).filter(|&other| depends(i, other)).count())
        .collect();
    let mut left: Vec<usize> = (0..count).collect();
    // Where the graph leaves a tie, depth and names break it, never the file.
    left.sort_by_key(|&i| (producer(i).map(|node| depths[node]), results[i]));
    let mut ordered = Vec::with_capacity(count);
    while !left.is_empty() {
        let free: Vec<usize> = left
            .iter()
            .copied()
            .filter(|&i| waits_for[i] == 0)
            .collect();
        let precedes = |a: usize, b: usize| {
            a != b && layers[a].joins_before(graph, &depths, &layers[b]) == Ordering::Less
        };
        let is_first = |i: &usize| !free.iter().any(|&other| precedes(other, *i));
        // Layers that wait for one another are in no graph that can be computed.
        let next = free.iter().copied().find(is_first);
        let next = next.or(free.first().copied()).unwrap_or(left[0]);
        left.retain(|&i| i != next);
        for &i in &left {
            waits_for[i] = waits_for[i].saturating_sub(usize::from(depends(i, next)));
        }
        ordered.push(next);
    }
    ordered
}

/// Per node, the nodes on the longest way to it: the same in whatever order the file has them.
fn depths(graph: &Graph) -> Vec<usize> {
    let mut depths: Vec<usize> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let inputs = node.proto.input.iter().chain(&node.captured);
        let before = inputs.filter_map(|v| graph.producer_index(v));
        let deepest = before.map(|(producer, _)| depths[producer] + 1).max();
        depths.push(deepest.unwrap_or(0));
    }
    depths
}

/// What lies behind the result of one layer.
struct Behind {
    /// Per node of the graph, whether it depends on the result.
    reaches: Vec<bool>,
    /// The node in which the result joins the stream, and the operand that it comes in by.
    join: Option<(usize, usize)>,
}

impl Behind {
    fn new(
        graph: &Graph,
        dependence: &Dependence,
        latents: &str,
        depths: &[usize],
        result: &str,
    ) -> Self {
        let mut reaches = vec![false; graph.nodes.len()];
        let mut pending = vec![result];
        while let Some(value) = pending.pop() {
            for &user in graph.consumers(value) {
                if !std::mem::replace(&mut reaches[user], true) {
                    let outputs = graph.nodes[user].proto.output.iter();
                    pending.extend(outputs.map(String::as_str));
                }
            }
        }
        let is_own = |value: &String| {
            let producer = graph.producer_index(value);
            value == result || producer.is_some_and(|(node, _)| reaches[node])
        };
        let joins = |&(index, node): &(usize, &Node)| {
            let other = |v: &String| !is_own(v) && dependence.on(v, latents);
            reaches[index] && is_sum(node) && node.proto.input.iter().any(other)
        };
        let nodes = graph.nodes.iter().enumerate();
        let first = nodes
            .filter(joins)
            .min_by_key(|(index, node)| (depths[*index], node.output(0)));
        let join = first.and_then(|(index, node)| {
            let slot = node.proto.input.iter().position(is_own)?;
            Some((index, slot))
        });
        Self { reaches, join }
    }

    /// Whether this layer's result joins the stream before the other's; `Equal`: the graph does not say.
    fn joins_before(&self, graph: &Graph, depths: &[usize], other: &Self) -> Ordering {
        let (Some((a, a_slot)), Some((b, b_slot))) = (self.join, other.join) else {
            return Ordering::Equal;
        };
        if a == b {
            return a_slot.cmp(&b_slot);
        }
        // The later join is one of a stream that the earlier has gone into.
        match (self.reaches[b], other.reaches[a]) {
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
            _ => self.meets_before(graph, depths, other),
        }
    }

    /// By the operands of the first node that needs both.
    fn meets_before(&self, graph: &Graph, depths: &[usize], other: &Self) -> Ordering {
        let slot = |node: usize, this: &Self, that: &Self| {
            graph.nodes[node].proto.input.iter().position(|v| {
                let producer = graph.producer_index(v);
                producer.is_some_and(|(p, _)| this.reaches[p] && !that.reaches[p])
            })
        };
        let meeting = |&node: &usize| {
            let slots = slot(node, self, other).zip(slot(node, other, self));
            slots.map(|(a, b)| ((depths[node], graph.nodes[node].output(0)), a.cmp(&b)))
        };
        let both = (0..graph.nodes.len()).filter(|&n| self.reaches[n] && other.reaches[n]);
        let first = both.filter_map(|node| meeting(&node)).min_by_key(|m| m.0);
        first.map_or(Ordering::Equal, |(_, order)| order)
    }
}

fn is_sum(node: &Node) -> bool {
    shapes::is(node, SUM) || node.op().starts_with("Skip")
}
