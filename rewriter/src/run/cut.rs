//! Where a model with explicit state is cut: behind every layer's end, so that a run can begin at any layer.
//!
//! Segment 0 is everything that no layer leads to (embeddings, conditioning, the prompt's keys and values); segment l + 1 begins
//! with layer l and ends before layer l + 1. Owns which nodes belong where and which values cross; runs nothing.

use crate::lower::Lowered;
use crate::onnx::{Graph, Node};
use crate::shapes::{self, PRODUCT, PROJECTION, RANDOM};
use ditfastattn_contract::operators::ATTENTION;
use std::collections::{BTreeSet, HashMap, HashSet};

/// One part of the model.
#[derive(Debug, PartialEq)]
pub struct Segment {
    /// Indices of the nodes, in order; constants are in every segment that uses them.
    pub nodes: Vec<usize>,
    /// Values from outside: graph inputs, state, and what earlier segments give.
    pub reads: Vec<String>,
    /// Values that later segments read, that layers leave behind, or that the model returns.
    pub gives: Vec<String>,
    /// Matrix products among the nodes, those in subgraphs included: what the segment's share of a forward pass is counted by.
    pub products: usize,
}

/// Cuts the graph of a lowered model (see [`crate::lower::DirectiveSource::Directives`]) into one segment more than it has layers.
///
/// `outputs` are the values that the exported model returned.
pub fn cut(graph: &Graph, lowered: &Lowered, outputs: &[String]) -> Vec<Segment> {
    Cutter::new(graph, lowered).segments(outputs)
}

struct Cutter<'a> {
    graph: &'a Graph,
    /// Values that the caller provides although nodes compute them.
    provided: HashSet<&'a str>,
    /// What each layer leaves behind.
    kept: HashSet<&'a str>,
    /// Per node the segment that it belongs to; `None` for constants.
    place: Vec<Option<usize>>,
    segments: usize,
}

impl<'a> Cutter<'a> {
    fn new(graph: &'a Graph, lowered: &'a Lowered) -> Self {
        let provided = lowered
            .skip
            .iter()
            .chain(lowered.state.iter().map(|s| &s.residual_rows))
            .map(String::as_str)
            .collect();
        let kept = lowered
            .state
            .iter()
            .flat_map(|s| s.sinks.iter().chain([&s.present_residual]))
            .map(String::as_str)
            .collect();
        let mut cutter = Self {
            graph,
            provided,
            kept,
            place: Vec::new(),
            segments: lowered.skip.len() + 1,
        };
        let layer: HashMap<&str, usize> = lowered
            .skip
            .iter()
            .enumerate()
            .map(|(l, s)| (s.as_str(), l))
            .collect();
        for node in &graph.nodes {
            let begins = node
                .is("If")
                .then(|| node.input(0).and_then(|skip| layer.get(skip)))
                .flatten();
            let place = match begins {
                Some(l) => Some(l + 1),
                None => cutter.behind(node),
            };
            cutter.place.push(place);
        }
        cutter
    }

    /// The latest segment that `node` reads from; `None` if it depends on nothing that is fed.
    fn behind(&self, node: &Node) -> Option<usize> {
        let random = shapes::is(node, RANDOM);
        let read = needs(node).filter_map(|value| {
            if self.provided.contains(value) || self.is_fed(value) {
                return Some(0);
            }
            self.graph
                .producer_index(value)
                .and_then(|(i, _)| self.place.get(i).copied().flatten())
        });
        read.chain(random.then_some(0)).max()
    }

    fn is_fed(&self, value: &str) -> bool {
        let input = self.graph.inputs.iter().find(|i| i.name == value);
        input.is_some_and(|i| !i.has_default)
    }

    fn segments(&self, outputs: &[String]) -> Vec<Segment> {
        let needed = self.needed(outputs);
        let mut segments: Vec<Segment> = (0..self.segments)
            .map(|s| self.segment(s, &needed))
            .collect();
        // What crosses: read by another segment, left behind, or returned.
        let read: Vec<HashSet<String>> = segments
            .iter()
            .map(|s| s.reads.iter().cloned().collect())
            .collect();
        for (s, segment) in segments.iter_mut().enumerate() {
            let crosses = |value: &&String| {
                self.kept.contains(value.as_str())
                    || outputs.contains(value)
                    || read[s + 1..].iter().any(|r| r.contains(*value))
            };
            let made = segment
                .nodes
                .iter()
                .filter(|&&i| self.place[i] == Some(s) || outputs_constant(self, i, s))
                .flat_map(|&i| self.graph.nodes[i].proto.output.iter());
            segment.gives = made
                .filter(|o| !o.is_empty())
                .filter(crosses)
                .cloned()
                .collect();
        }
        segments
    }

    /// Nodes that the outputs or the state need.
    fn needed(&self, outputs: &[String]) -> BTreeSet<usize> {
        let mut needed = BTreeSet::new();
        let mut open: Vec<&str> = outputs.iter().map(String::as_str).collect();
        open.extend(&self.kept);
        while let Some(value) = open.pop() {
            if self.provided.contains(value) {
                continue;
            }
            if let Some((index, _)) = self.graph.producer_index(value)
                && needed.insert(index)
            {
                open.extend(needs(&self.graph.nodes[index]));
            }
        }
        needed
    }

    fn segment(&self, s: usize, needed: &BTreeSet<usize>) -> Segment {
        let mut nodes: BTreeSet<usize> = needed
            .iter()
            .copied()
            .filter(|&i| self.place[i] == Some(s) || (s == 0 && outputs_constant(self, i, s)))
            .collect();
        let mut reads = BTreeSet::new();
        let mut open: Vec<usize> = nodes.iter().copied().collect();
        while let Some(index) = open.pop() {
            for value in needs(&self.graph.nodes[index]) {
                let producer = self.graph.producer_index(value).map(|(i, _)| i);
                if self.provided.contains(value) || self.is_fed(value) {
                    reads.insert(value.to_owned());
                } else if let Some(i) = producer {
                    match self.place[i] {
                        None => {
                            if nodes.insert(i) {
                                open.push(i);
                            }
                        }
                        Some(place) if place != s => {
                            reads.insert(value.to_owned());
                        }
                        Some(_) => {}
                    }
                }
            }
        }
        let products = nodes.iter().map(|&i| products(&self.graph.nodes[i])).sum();
        Segment {
            nodes: nodes.into_iter().collect(),
            reads: reads.into_iter().collect(),
            gives: Vec::new(),
            products,
        }
    }
}

/// A constant that the model returns is returned by segment 0.
fn outputs_constant(cutter: &Cutter<'_>, node: usize, segment: usize) -> bool {
    segment == 0
        && cutter.place[node].is_none()
        && cutter.graph.nodes[node]
            .proto
            .output
            .iter()
            .any(|o| cutter.graph.is_output(o))
}

fn needs(node: &Node) -> impl Iterator<Item = &str> {
    node.proto
        .input
        .iter()
        .chain(&node.captured)
        .map(String::as_str)
        .filter(|v| !v.is_empty())
}

/// Matrix products of a node; a layer's are in its branch.
fn products(node: &Node) -> usize {
    match node.op() {
        _ if shapes::is(node, PRODUCT | PROJECTION) => 1,
        op if op == ATTENTION.as_str() => 2,
        _ => node.inner().iter().map(products).sum(),
    }
}
