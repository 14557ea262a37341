//! Which tokens of a sequence are image and which are text.
//!
//! A joint sequence is made by a Concat of something that depends on the latents with something that does not (prompt,
//! class, time, registers). From there the pieces are followed token by token; attention mixes them, but a query's token
//! stays what it was. So a text stream is recognised in the last block as in the first.

use super::Core;
use crate::onnx::{Graph, Node};
use crate::shapes::{self, Dim, Facts, Place, Value};
use std::collections::HashMap;

/// Neighbouring tokens of one kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    pub tokens: Dim,
    /// Whether they are image tokens.
    pub image: bool,
    /// A value and the axis of it that is as long as this piece.
    pub measured: (String, usize),
}

/// A sequence whose tokens are of both kinds.
#[derive(Clone, Debug, PartialEq)]
struct Sequence {
    place: Place,
    pieces: Vec<Piece>,
}

/// What is known about one value.
#[derive(Clone, Debug, Default, PartialEq)]
struct Flow {
    /// Some of it depends on the latents, attention of the same sequence aside.
    image: bool,
    sequence: Option<Sequence>,
}

/// The text tokens of one attention.
#[derive(Clone, Debug, PartialEq)]
pub enum Text {
    /// No text that the graph shows.
    None,
    /// Text on one side of the image.
    Known { pieces: Vec<Piece>, at_start: bool },
    /// Text on both sides of the image, or between its parts.
    Scattered,
}

impl Text {
    /// How many tokens are text, if that is a number.
    pub fn known(&self) -> Option<i64> {
        match self {
            Self::None => Some(0),
            Self::Known { pieces, .. } => known_tokens(pieces),
            Self::Scattered => None,
        }
    }
}

#[derive(Debug)]
pub struct Streams {
    flows: HashMap<String, Flow>,
}

impl Streams {
    /// Follows `latents` through `graph`, past the attentions `cores`.
    pub fn new(graph: &Graph, facts: &Facts, latents: &str, cores: &[Core]) -> Self {
        let results: HashMap<&str, &Core> =
            cores.iter().map(|c| (c.out.value.as_str(), c)).collect();
        let mut streams = Self {
            flows: HashMap::from([(
                latents.to_owned(),
                Flow {
                    image: true,
                    sequence: None,
                },
            )]),
        };
        for node in &graph.nodes {
            for (out, name) in node.proto.output.iter().enumerate() {
                if name.is_empty() {
                    continue;
                }
                let flow = match results.get(name.as_str()) {
                    Some(core) => streams.through_attention(facts, core),
                    None => streams.through(facts, node, out),
                };
                if flow != Flow::default() {
                    streams.flows.insert(name.clone(), flow);
                }
            }
        }
        streams
    }

    /// The text tokens of the attention `core`.
    pub fn text(&self, facts: &Facts, core: &Core) -> Text {
        let Some(pieces) = self.queries(facts, core) else {
            return Text::None;
        };
        let is_image: Vec<bool> = pieces.iter().map(|p| p.image).collect();
        let text = || pieces.iter().filter(|p| !p.image).cloned().collect();
        let first = is_image.iter().position(|&i| i);
        let last = is_image.iter().rposition(|&i| i);
        match (first, last) {
            (Some(first), Some(last)) if is_image[first..=last].iter().all(|&i| i) => {
                match (first, last + 1 == pieces.len()) {
                    (0, true) => Text::None,
                    (0, false) => Text::Known {
                        pieces: text(),
                        at_start: false,
                    },
                    (_, true) => Text::Known {
                        pieces: text(),
                        at_start: true,
                    },
                    (_, false) => Text::Scattered,
                }
            }
            (Some(_), _) => Text::Scattered,
            _ => Text::None,
        }
    }

    /// The pieces of a core's query sequence, if it has any.
    fn queries(&self, facts: &Facts, core: &Core) -> Option<&[Piece]> {
        let sequence = self.flows.get(&core.q.value)?.sequence.as_ref()?;
        let axis = shapes::exact_axis(facts, &core.q.value, &sequence.place)?;
        (Some(axis) == core.q.token_axis()).then_some(&sequence.pieces)
    }

    fn flow(&self, value: &str) -> Flow {
        self.flows.get(value).cloned().unwrap_or_default()
    }

    /// Every token attends to all, and stays what it is.
    fn through_attention(&self, facts: &Facts, core: &Core) -> Flow {
        let image = self.flow(&core.q.value).image;
        let sequence = (|| {
            let pieces = self.queries(facts, core)?.to_vec();
            let shape = facts.shape(&core.out.value)?;
            let place = Dim::product(shape.get(..core.out.token_axis()?)?)?;
            Some(Sequence { place, pieces })
        })();
        Flow { image, sequence }
    }

    fn through(&self, facts: &Facts, node: &Node, out: usize) -> Flow {
        // A size, or the scale and zero point of a quantisation, is the same for every token.
        if shapes::is(node, shapes::SIZE) || (node.is("DynamicQuantizeLinear") && out > 0) {
            return Flow::default();
        }
        let mut inputs: Vec<Flow> = node.proto.input.iter().map(|i| self.flow(i)).collect();
        // Slices of a sequence that are put back where they were, rotated: it stays what it was.
        if matches!(node.op(), "ScatterND" | "ScatterElements") && inputs[0].sequence.is_some() {
            inputs.truncate(1);
        }
        let captured = node.captured.iter().map(|i| self.flow(i).image);
        let image = inputs.iter().any(|f| f.image) || captured.into_iter().any(|i| i);
        if node.is("Concat")
            && let Some(sequence) = concat(facts, node, &inputs)
        {
            return Flow {
                image,
                sequence: Some(sequence),
            };
        }
        if let Some(flow) = cut(facts, node, out, &inputs) {
            return flow;
        }
        // Everything else keeps the pieces of the operands that have them, or loses them.
        let mut sequence: Option<Sequence> = None;
        for (slot, flow) in inputs.iter().enumerate() {
            let moved = flow.sequence.as_ref().and_then(|s| {
                Some(Sequence {
                    place: shapes::follow(facts, node, slot, &s.place, out)?,
                    pieces: s.pieces.clone(),
                })
            });
            match (&mut sequence, moved) {
                (None, Some(moved)) => sequence = Some(moved),
                (Some(all), Some(moved)) if same_cuts(all, &moved) => {
                    for (a, b) in all.pieces.iter_mut().zip(&moved.pieces) {
                        a.image |= b.image;
                    }
                }
                (Some(_), Some(_)) => {
                    return Flow {
                        image,
                        sequence: None,
                    };
                }
                // What has no pieces is the same for every token: a table, a modulation. Depending on the latents it would
                // make everything image.
                (_, None) => {}
            }
        }
        if inputs.iter().any(|f| f.image && f.sequence.is_none()) {
            sequence = None;
        }
        Flow { image, sequence }
    }
}

fn same_cuts(a: &Sequence, b: &Sequence) -> bool {
    a.place == b.place
        && a.pieces.len() == b.pieces.len()
        && a.pieces
            .iter()
            .zip(&b.pieces)
            .all(|(a, b)| a.tokens == b.tokens)
}

/// A Concat along the sequence: the pieces of its operands, in order.
fn concat(facts: &Facts, node: &Node, inputs: &[Flow]) -> Option<Sequence> {
    let shape = facts.shape(node.output(0))?;
    let axis = shapes::axis(node.int("axis").unwrap_or(0), shape.len())?;
    let place = Dim::product(&shape[..axis])?;
    let mut pieces = Vec::new();
    for (input, flow) in node.proto.input.iter().zip(inputs) {
        match &flow.sequence {
            Some(s) if shapes::exact_axis(facts, input, &s.place) == Some(axis) => {
                pieces.extend(s.pieces.iter().cloned());
            }
            // Pieces along another axis: this is no Concat of a sequence.
            Some(_) => return None,
            None => pieces.push(Piece {
                tokens: facts.shape(input)?.get(axis)?.clone(),
                image: flow.image,
                measured: (input.clone(), axis),
            }),
        }
    }
    is_mixed(&pieces).then_some(Sequence { place, pieces })
}

/// A Slice, Split or Gather along the sequence takes some of its pieces. `None`: it is no such node.
fn cut(facts: &Facts, node: &Node, out: usize, inputs: &[Flow]) -> Option<Flow> {
    let sequence = inputs.first()?.sequence.as_ref()?;
    let source = node.input(0)?;
    let axis = shapes::exact_axis(facts, source, &sequence.place)?;
    let rank = facts.shape(source)?.len();
    let along = |a: i64| shapes::axis(a, rank) == Some(axis);
    let total = &facts.shape(source)?[axis];
    let pieces = match node.op() {
        "Split" if along(node.int("axis").unwrap_or(0)) => {
            let sizes: Vec<Dim> = node
                .proto
                .output
                .iter()
                .map(|o| facts.shape(o)?.get(axis).cloned())
                .collect::<Option<_>>()
                .unwrap_or_default();
            split_at(&sequence.pieces, &sizes, out)
        }
        "Slice" => {
            let axes = match node.ints("axes") {
                Some(axes) => axes.to_vec(),
                None => facts.of(node.input(3)?).known_ints()?,
            };
            let i = axes.iter().position(|&a| along(a))?;
            let bound = |attribute: &str, input: usize| match node.ints(attribute) {
                Some(list) => list.get(i).map(|&n| Dim::from(n)),
                None => match facts.of(node.input(input)?).value? {
                    Value::Ints(list) => list.get(i).cloned(),
                    Value::Floats(_) => None,
                },
            };
            bound("starts", 1)
                .zip(bound("ends", 2))
                .and_then(|(from, to)| between(&sequence.pieces, total, &from, &to))
        }
        "Gather" if along(node.int("axis").unwrap_or(0)) => None,
        _ => return None,
    };
    Some(match pieces {
        Some(pieces) if is_mixed(&pieces) => Flow {
            image: true,
            sequence: Some(Sequence {
                place: sequence.place.clone(),
                pieces,
            }),
        },
        Some(pieces) => Flow {
            image: pieces.iter().any(|p| p.image),
            sequence: None,
        },
        None => Flow {
            image: inputs[0].image,
            sequence: None,
        },
    })
}

/// Part `out` of `pieces` cut into parts of `sizes` tokens.
fn split_at(pieces: &[Piece], sizes: &[Dim], out: usize) -> Option<Vec<Piece>> {
    let mut rest = pieces;
    for (part, size) in sizes.iter().enumerate() {
        let n = (1..=rest.len()).find(|&n| length(&rest[..n]).as_ref() == Some(size));
        // Two pieces whose sum has no name: the last part takes what is left.
        let n = n.or_else(|| (part + 1 == sizes.len()).then_some(rest.len()))?;
        if part == out {
            return Some(rest[..n].to_vec());
        }
        rest = &rest[n..];
    }
    None
}

/// The tokens of one piece, or of several whose sizes are numbers.
fn length(pieces: &[Piece]) -> Option<Dim> {
    match pieces {
        [one] => Some(one.tokens.clone()),
        many => known_tokens(many).map(Dim::from),
    }
}

/// The tokens of all pieces, where each is a number.
fn known_tokens(pieces: &[Piece]) -> Option<i64> {
    pieces.iter().map(|p| p.tokens.known()).sum()
}

/// Whether there are tokens of both kinds.
fn is_mixed(pieces: &[Piece]) -> bool {
    pieces.iter().any(|p| p.image) && pieces.iter().any(|p| !p.image)
}

/// The pieces from token `from` to token `to`; bounds may count from the end.
fn between(pieces: &[Piece], total: &Dim, from: &Dim, to: &Dim) -> Option<Vec<Piece>> {
    let n = pieces.len();
    let edge = |at: &Dim| -> Option<usize> {
        match at.known() {
            Some(0) => return Some(0),
            Some(end) if end >= i64::from(i32::MAX) => return Some(n),
            _ => {}
        }
        if at == total {
            return Some(n);
        }
        if at.is_negative() {
            let back = at.times(&(-1).into())?;
            return (0..n).find(|&i| length(&pieces[i..]).as_ref() == Some(&back));
        }
        (1..n).find(|&i| length(&pieces[..i]).as_ref() == Some(at))
    };
    let (from, to) = (edge(from)?, edge(to)?);
    (from <= to).then(|| pieces[from..to].to_vec())
}
