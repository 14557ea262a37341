//! Which tokens of a sequence are image and which are text.
//!
//! A joint sequence is made by a Concat of something that depends on the latents with something that does not (prompt,
//! class, time, registers). From there the pieces are followed token by token; attention mixes them, but a query's token
//! stays what it was. So a text stream is recognised in the last block as in the first.
//!
//! Where the trail of such a sequence ends without its axis ending, everything behind that node is *lost*: it may hold text,
//! and nobody may say that it holds none.

use super::Core;
use crate::onnx::{Graph, Node};
use crate::shapes::{self, AxisFate, AxisOffset, Dim, Facts, LAYOUT, REPEAT, Value};
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
    place: AxisOffset,
    pieces: Vec<Piece>,
}

/// What is known about one value.
#[derive(Clone, Debug, Default, PartialEq)]
struct Flow {
    /// Some of it depends on the latents, attention of the same sequence aside.
    image: bool,
    sequence: Option<Sequence>,
    /// The node behind which the kinds of tokens are not known any more.
    lost: Option<usize>,
}

/// The text tokens of one attention.
#[derive(Clone, Debug, PartialEq)]
pub enum Text {
    /// There is none: the tokens are those of the latents, on the whole way from there.
    None,
    /// The trail of a sequence of both kinds ends at this node: whether there is any is not known.
    Lost { node: String, why: &'static str },
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
            Self::Lost { .. } => None,
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
                    ..Flow::default()
                },
            )]),
        };
        for (index, node) in graph.nodes.iter().enumerate() {
            for (out, name) in node.proto.output.iter().enumerate() {
                if name.is_empty() {
                    continue;
                }
                let flow = match results.get(name.as_str()) {
                    Some(core) => streams.through_attention(facts, core),
                    None => streams.through(graph, facts, index, out),
                };
                if flow != Flow::default() {
                    streams.flows.insert(name.clone(), flow);
                }
            }
        }
        streams
    }

    /// The text tokens of the attention `core`.
    pub fn text(&self, graph: &Graph, facts: &Facts, core: &Core) -> Text {
        let pieces = match self.queries(facts, core) {
            Ok(Some(pieces)) => pieces,
            Ok(None) => return Text::None,
            Err(lost) => {
                let node = &graph.nodes[lost.unwrap_or(core.anchor)];
                return Text::Lost {
                    node: node.label().to_owned(),
                    why: shapes::why_lost(node),
                };
            }
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
    ///
    /// # Errors
    /// Nobody knows; the node behind which that is so, the attention's own if there is none.
    fn queries(&self, facts: &Facts, core: &Core) -> Result<Option<&[Piece]>, Option<usize>> {
        let Some(flow) = self.flows.get(&core.q.value) else {
            return Ok(None);
        };
        if flow.lost.is_some() {
            return Err(flow.lost);
        }
        let Some(sequence) = &flow.sequence else {
            return Ok(None);
        };
        match shapes::axis_at(facts, &core.q.value, &sequence.place) {
            Some(axis) if Some(axis) == core.q.token_axis() => Ok(Some(&sequence.pieces)),
            // Rows or heads of one kind each.
            Some(_) => Ok(None),
            None => Err(None),
        }
    }

    fn flow(&self, value: &str) -> Flow {
        self.flows.get(value).cloned().unwrap_or_default()
    }

    /// Every token attends to all, and stays what it is.
    fn through_attention(&self, facts: &Facts, core: &Core) -> Flow {
        let image = self.flow(&core.q.value).image;
        let place = || {
            let shape = facts.shape(&core.out.value)?;
            Dim::product(shape.get(..core.out.token_axis()?)?)
        };
        let (sequence, lost) = match self.queries(facts, core) {
            Ok(None) => (None, None),
            Ok(Some(pieces)) => match place() {
                Some(place) => {
                    let pieces = pieces.to_vec();
                    (Some(Sequence { place, pieces }), None)
                }
                None => (None, Some(core.anchor)),
            },
            Err(node) => (None, node.or(Some(core.anchor))),
        };
        Flow {
            image,
            sequence,
            lost,
        }
    }

    fn through(&self, graph: &Graph, facts: &Facts, index: usize, out: usize) -> Flow {
        let node = &graph.nodes[index];
        // A size, or the scale and zero point of a quantisation, is the same for every token.
        if shapes::is(node, shapes::SIZE) || (node.is("DynamicQuantizeLinear") && out > 0) {
            return Flow::default();
        }
        let mut inputs: Vec<Flow> = node.proto.input.iter().map(|i| self.flow(i)).collect();
        if matches!(node.op(), "ScatterND" | "ScatterElements" | "TensorScatter") {
            let written = if node.is("TensorScatter") { 1 } else { 2 };
            match inputs.get(written) {
                // Slices of a sequence that are put back where they were, rotated: it stays what it was.
                Some(new) if inputs[0].image == new.image => inputs.truncate(1),
                Some(new) => {
                    // Tokens of one kind in a buffer of the other, unless that is empty.
                    let other = node.input(if new.image { 0 } else { written });
                    if !other.is_some_and(|v| is_filler(graph, facts, v)) {
                        return Flow {
                            image: true,
                            lost: Some(index),
                            ..Flow::default()
                        };
                    }
                }
                None => {}
            }
        }
        let captured: Vec<Flow> = node.captured.iter().map(|i| self.flow(i)).collect();
        let all = || inputs.iter().chain(&captured);
        let image = all().any(|f| f.image);
        let gone = |lost| Flow {
            image,
            sequence: None,
            lost: Some(lost),
        };
        if let Some(lost) = all().find_map(|f| f.lost) {
            return gone(lost);
        }
        if captured.iter().any(|f| f.sequence.is_some()) {
            return gone(index);
        }
        if node.is("Concat") {
            match concat(facts, node, &inputs) {
                Joined::Sequence(sequence) => {
                    return Flow {
                        image,
                        sequence: Some(sequence),
                        lost: None,
                    };
                }
                Joined::Unknown => return gone(index),
                Joined::Elsewhere => {}
            }
        }
        match cut(facts, node, out, &inputs) {
            Some(Ok(flow)) => return flow,
            Some(Err(())) => return gone(index),
            None => {}
        }
        // Everything else keeps the pieces of the operands that have them, or loses them.
        let mut sequence: Option<Sequence> = None;
        for (slot, flow) in inputs.iter().enumerate() {
            let Some(before) = &flow.sequence else {
                // What has no pieces is the same for every token: a table, a modulation.
                continue;
            };
            let moved = match shapes::trace_axis(facts, node, slot, &before.place, out) {
                AxisFate::At(place) => Sequence {
                    place,
                    pieces: before.pieces.clone(),
                },
                AxisFate::Ends => continue,
                AxisFate::Lost => return gone(index),
            };
            match &mut sequence {
                None => sequence = Some(moved),
                Some(all) if same_cuts(all, &moved) => {
                    for (a, b) in all.pieces.iter_mut().zip(&moved.pieces) {
                        a.image |= b.image;
                    }
                }
                Some(_) => return gone(index),
            }
        }
        // A modulation that depends on the latents would make everything image.
        if sequence.is_some() && inputs.iter().any(|f| f.image && f.sequence.is_none()) {
            return gone(index);
        }
        Flow {
            image,
            sequence,
            lost: None,
        }
    }
}

/// Whether `value` is an empty buffer: one number everywhere, or a constant, made when the model was traced.
fn is_filler(graph: &Graph, facts: &Facts, value: &str) -> bool {
    if facts.of(value).scalar().is_some() || graph.initializers.contains_key(value) {
        return true;
    }
    let Some((node, 0)) = graph.producer(value) else {
        return false;
    };
    node.is("ConstantOfShape")
        || node.is("Constant")
        || (shapes::is(node, LAYOUT | REPEAT)
            && node.input(0).is_some_and(|v| is_filler(graph, facts, v)))
}

fn same_cuts(a: &Sequence, b: &Sequence) -> bool {
    a.place == b.place
        && a.pieces.len() == b.pieces.len()
        && a.pieces
            .iter()
            .zip(&b.pieces)
            .all(|(a, b)| a.tokens == b.tokens)
}

/// What a Concat makes of its operands' tokens.
enum Joined {
    /// The pieces of its operands, in order.
    Sequence(Sequence),
    /// It joins something else: all of one kind, or along another axis than the pieces'.
    Elsewhere,
    /// Tokens of both kinds, nobody knows how.
    Unknown,
}

fn concat(facts: &Facts, node: &Node, inputs: &[Flow]) -> Joined {
    let is_joint = || inputs.iter().any(|f| f.image) && inputs.iter().any(|f| !f.image);
    let unknown = || match is_joint() || inputs.iter().any(|f| f.sequence.is_some()) {
        true => Joined::Unknown,
        false => Joined::Elsewhere,
    };
    let place = || {
        let shape = facts.shape(node.output(0))?;
        let axis = shapes::axis(node.int("axis").unwrap_or(0), shape.len())?;
        Some((axis, Dim::product(&shape[..axis])?))
    };
    let Some((axis, place)) = place() else {
        return unknown();
    };
    let mut pieces = Vec::new();
    for (input, flow) in node.proto.input.iter().zip(inputs) {
        match &flow.sequence {
            Some(s) if shapes::axis_at(facts, input, &s.place) == Some(axis) => {
                pieces.extend(s.pieces.iter().cloned());
            }
            // Pieces along another axis: this is no Concat of a sequence.
            Some(_) => return Joined::Elsewhere,
            None => {
                let Some(tokens) = facts.shape(input).and_then(|s| s.get(axis)) else {
                    return unknown();
                };
                pieces.push(Piece {
                    tokens: tokens.clone(),
                    image: flow.image,
                    measured: (input.clone(), axis),
                });
            }
        }
    }
    match is_mixed(&pieces) {
        true => Joined::Sequence(Sequence { place, pieces }),
        false => Joined::Elsewhere,
    }
}

/// A Slice, Split or Gather along the sequence takes some of its pieces, or nobody knows which. `None`: it is no such node.
fn cut(facts: &Facts, node: &Node, out: usize, inputs: &[Flow]) -> Option<Result<Flow, ()>> {
    let sequence = inputs.first()?.sequence.as_ref()?;
    let source = node.input(0)?;
    let axis = shapes::axis_at(facts, source, &sequence.place)?;
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
        _ => return None,
    };
    Some(match pieces {
        Some(pieces) if is_mixed(&pieces) => Ok(Flow {
            image: true,
            sequence: Some(Sequence {
                place: sequence.place.clone(),
                pieces,
            }),
            lost: None,
        }),
        Some(pieces) => Ok(Flow {
            image: pieces.iter().any(|p| p.image),
            ..Flow::default()
        }),
        None => Err(()),
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
