//! The table of operators: everything that this crate knows of an ONNX operator, in one row each.
//!
//! A row says what an operator does to shapes and values, where an axis of its input lies in its result, and what it is to
//! the search for attention. Rows stand beside the rules they name, in a file per family; adding an operator touches that
//! file only. What has no rule says why. Owns no graph and no order of work: [`super::infer`] walks, [`super::axis`] follows.

mod attention;
mod context;
mod control;
mod conv;
mod elementwise;
mod layout;
mod matmul;
mod norm;
mod pick;
mod quantize;
mod reduce;
mod sizes;

use super::axis::{AxisOffset, AxisStep};
use super::infer::Fact;
use crate::onnx::Node;
pub use context::axis;
pub(super) use context::{Context, is_integer};
use std::collections::HashMap;
use std::ops::{BitOr, Range};
use std::sync::LazyLock;

/// Facts about the results of a node.
#[derive(Clone, Copy)]
pub enum Shape {
    /// About the first result; nothing is said of others.
    First(fn(&mut Context) -> Option<Fact>),
    /// About all.
    All(fn(&mut Context) -> Option<Vec<Fact>>),
    /// There is no rule, and why.
    Open(&'static str),
}

/// Where an axis of an input lies in a result.
#[derive(Clone, Copy)]
pub enum Axis {
    /// An axis of input 0 stays at its place in the first result: elements keep their order.
    Same,
    /// As `Same`, for any of the first inputs.
    SameOf(usize),
    /// Numpy broadcasting of all inputs: axes count from the end.
    Aligned,
    By(fn(&AxisStep) -> Option<AxisOffset>),
    /// It has no place in any result, and why.
    Lost(&'static str),
}

/// What an operator is to the search for attention; a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class(u16);

/// The result is input 0, element for element, perhaps in another type.
pub const COPY: Class = Class(1);
/// The elements of input 0 in their order, in another shape.
pub const RESHAPE: Class = Class(1 << 1);
/// The elements of input 0 with axes in another order.
pub const TRANSPOSE: Class = Class(1 << 2);
/// The elements of input 0, some of them several times.
pub const REPEAT: Class = Class(1 << 3);
/// To or from integers with a scale.
pub const QUANTIZE: Class = Class(1 << 4);
/// A matrix product of its first two inputs.
pub const PRODUCT: Class = Class(1 << 5);
/// With a weight as one operand it is a projection of the other.
pub const PROJECTION: Class = Class(1 << 6);
/// A multiplication or division, element by element.
pub const SCALE: Class = Class(1 << 7);
/// An addition or subtraction, element by element.
pub const SUM: Class = Class(1 << 8);
/// Reads the size of its input and nothing else.
pub const SIZE: Class = Class(1 << 9);
/// Attention, or a softmax, in one operator.
pub const ANCHOR: Class = Class(1 << 10);
/// Its results differ from run to run.
pub const RANDOM: Class = Class(1 << 11);
/// Picks or joins elements of small vectors: with `RESHAPE` and `COPY` what shape arithmetic is made of.
pub const PICK: Class = Class(1 << 12);
/// Each element of the result is made of the elements in its place, perhaps of several inputs.
pub const ELEMENT: Class = Class(1 << 14);
/// A norm over the channels of a token, or a reduction that one is made of.
pub const NORM: Class = Class(1 << 15);
/// Attention without a softmax.
pub const LINEAR: Class = Class(1 << 13);
/// Nothing is computed: the same tensor or its elements in another order, another type, another shape.
pub const LAYOUT: Class = Class(COPY.0 | RESHAPE.0 | TRANSPOSE.0);
const NONE: Class = Class(0);

impl BitOr for Class {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The axes of a tensor of some rank along which an operator lets elements see one another.
type Along = fn(&Node, usize) -> Option<Range<usize>>;

/// Whether an axis ends in a node: it is summed over, or one element of it is picked. The result has no such axis.
type Ends = fn(&AxisStep) -> bool;

/// One operator.
pub struct Op {
    domain: &'static str,
    name: &'static str,
    shape: Shape,
    axis: Axis,
    class: Class,
    along: Option<Along>,
    ends: Option<Ends>,
}

/// The row of an operator of ai.onnx.
const fn op(name: &'static str, shape: Shape, axis: Axis) -> Op {
    Op {
        domain: "",
        name,
        shape,
        axis,
        class: NONE,
        along: None,
        ends: None,
    }
}

/// The row of an operator of com.microsoft, which ONNX Runtime's optimizers leave in the graphs they save.
const fn ms(name: &'static str, shape: Shape, axis: Axis) -> Op {
    Op {
        domain: MICROSOFT,
        ..op(name, shape, axis)
    }
}

impl Op {
    const fn is(self, class: Class) -> Self {
        Self {
            class: Class(self.class.0 | class.0),
            ..self
        }
    }

    const fn along(self, along: Along) -> Self {
        Self {
            along: Some(along),
            ..self
        }
    }

    const fn ends(self, ends: Ends) -> Self {
        Self {
            ends: Some(ends),
            ..self
        }
    }
}

const MICROSOFT: &str = "com.microsoft";
const NCHWC: &str = "com.microsoft.nchwc";

/// All rows, file by file.
fn rows() -> impl Iterator<Item = &'static Op> {
    [
        layout::OPS,
        elementwise::OPS,
        pick::OPS,
        sizes::OPS,
        matmul::OPS,
        conv::OPS,
        norm::OPS,
        reduce::OPS,
        quantize::OPS,
        attention::OPS,
        control::OPS,
    ]
    .into_iter()
    .flatten()
}

static TABLE: LazyLock<HashMap<(&str, &str), &'static Op>> =
    LazyLock::new(|| rows().map(|op| ((op.domain, op.name), op)).collect());

/// The row of `node`'s operator.
fn of(node: &Node) -> Option<&'static Op> {
    TABLE.get(&(node.domain(), node.op())).copied()
}

/// Whether the operator of `node` is in the table.
pub fn has_row(node: &Node) -> bool {
    of(node).is_some()
}

/// Whether `node` is of one of the classes in `class`.
pub fn is(node: &Node, class: Class) -> bool {
    of(node).is_some_and(|op| op.class.0 & class.0 != 0)
}

/// Facts about the results of the node in `context`: one per output, empty where nothing is known.
pub(super) fn outputs(context: &mut Context) -> Vec<Fact> {
    let count = context.node.proto.output.len();
    let mut facts = match of(context.node).map(|op| op.shape) {
        Some(Shape::First(rule)) => rule(context).into_iter().collect(),
        Some(Shape::All(rule)) => rule(context).unwrap_or_default(),
        Some(Shape::Open(_)) | None => Vec::new(),
    };
    facts.resize(count, Fact::default());
    facts
}

/// Where the axis in `step` lies in the result; `None` where it is lost.
pub(super) fn propagate(step: &AxisStep) -> Option<AxisOffset> {
    let slots = match of(step.node)?.axis {
        Axis::Same => 1,
        Axis::SameOf(slots) => slots,
        Axis::Aligned => return step.aligned(),
        Axis::By(rule) => return rule(step),
        Axis::Lost(_) => return None,
    };
    (step.slot < slots && step.out == 0).then(|| step.place.clone())
}

/// Whether the axis in `step` ends in its node.
pub(super) fn ends(step: &AxisStep) -> bool {
    let ends = of(step.node).and_then(|op| op.ends);
    ends.is_some_and(|ends| ends(step))
}

/// Why nothing is said of the results of `node`.
pub fn why_unknown(node: &Node) -> &'static str {
    match of(node).map(|op| op.shape) {
        None => "an operator without a rule",
        Some(Shape::Open(why)) => why,
        Some(_) => "its sizes are not known before the model runs",
    }
}

/// Why an axis has no place behind `node`.
pub fn why_lost(node: &Node) -> &'static str {
    match of(node).map(|op| op.axis) {
        None => "an operator without a rule",
        Some(Axis::Lost(why)) => why,
        Some(_) => "its elements are mixed, cut or joined there in a way that is not followed",
    }
}

/// Whether elements of axis `axis` of a tensor of `rank` axes see one another in `node`, as far as its axis rule keeps that
/// axis at all: a softmax over it, a norm.
pub(super) fn mixes(node: &Node, axis: usize, rank: usize) -> bool {
    let along = of(node).and_then(|op| op.along);
    along.is_some_and(|along| along(node, rank).is_none_or(|axes| axes.contains(&axis)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{AttributeProto, Constant, Data, Graph, NodeProto, elem_type};
    use crate::shapes::{BATCH, Dim, Facts, Symbols, Value};
    use prost::Message;
    use std::collections::HashSet;

    /// A node and what is given of its inputs, for the tests of rules.
    pub struct Given {
        proto: NodeProto,
        inputs: Vec<Fact>,
        symbols: Symbols,
        static_batch: Option<i64>,
        results: Vec<Fact>,
        pub repaired: Option<Vec<i64>>,
        pub batch_is_bound: bool,
    }

    impl Given {
        pub fn domain(domain: &str, op: &str) -> Self {
            let mut symbols = Symbols::default();
            assert_eq!(symbols.named("batch"), BATCH);
            Self {
                proto: NodeProto {
                    op_type: Some(op.into()),
                    domain: Some(domain.into()),
                    output: vec!["out0".into()],
                    ..NodeProto::default()
                },
                inputs: Vec::new(),
                symbols,
                static_batch: None,
                results: Vec::new(),
                repaired: None,
                batch_is_bound: false,
            }
        }

        pub fn new(op: &str) -> Self {
            Self::domain("", op)
        }

        pub fn microsoft(op: &str) -> Self {
            Self::domain(MICROSOFT, op)
        }

        fn with(mut self, attribute: AttributeProto) -> Self {
            self.proto.attribute.push(attribute.encode_to_vec().into());
            self
        }

        pub fn int(self, name: &str, value: i64) -> Self {
            self.with(AttributeProto::int(name, value))
        }

        pub fn text(self, name: &str, value: &str) -> Self {
            self.with(AttributeProto::string(name, value))
        }

        pub fn ints_attribute(self, name: &str, values: &[i64]) -> Self {
            self.with(AttributeProto::ints(name, values.to_vec()))
        }

        pub fn static_batch(mut self, batch: i64) -> Self {
            self.static_batch = Some(batch);
            self
        }

        pub fn outputs(mut self, count: usize) -> Self {
            self.proto.output = (0..count).map(|i| format!("out{i}")).collect();
            self
        }

        fn dims(&mut self, names: &[&str]) -> Vec<Dim> {
            let one = |name: &&str| match name.parse::<i64>() {
                Ok(size) => size.into(),
                Err(_) => self.symbols.named(name).into(),
            };
            names.iter().map(one).collect()
        }

        fn given(&mut self, fact: Fact) -> &mut Self {
            self.proto.input.push(format!("in{}", self.inputs.len()));
            self.inputs.push(fact);
            self
        }

        pub fn input(&mut self, ty: i32, dims: &[&str]) -> &mut Self {
            let dims = self.dims(dims);
            self.given(Fact::of(ty, Some(dims)))
        }

        pub fn unknown(&mut self) -> &mut Self {
            self.given(Fact::default())
        }

        pub fn left_out(&mut self) -> &mut Self {
            self.given(Fact::default());
            *self.proto.input.last_mut().unwrap() = String::new();
            self
        }

        fn constant(&mut self, elem_type: i32, dims: Vec<i64>, data: Data) -> &mut Self {
            self.given(Fact::from(&Constant {
                elem_type,
                dims,
                data: Some(data),
            }))
        }

        pub fn ints(&mut self, values: &[i64]) -> &mut Self {
            let dims = vec![values.len() as i64];
            self.constant(elem_type::INT64, dims, Data::Ints(values.to_vec()))
        }

        pub fn bools(&mut self, values: &[i64]) -> &mut Self {
            let dims = vec![values.len() as i64];
            self.constant(elem_type::BOOL, dims, Data::Ints(values.to_vec()))
        }

        pub fn floats(&mut self, values: &[f64]) -> &mut Self {
            self.typed_floats(elem_type::FLOAT, values)
        }

        pub fn typed_floats(&mut self, ty: i32, values: &[f64]) -> &mut Self {
            let dims = vec![values.len() as i64];
            self.constant(ty, dims, Data::Floats(values.to_vec()))
        }

        /// A shape vector.
        pub fn sizes(&mut self, names: &[&str]) -> &mut Self {
            let value = Value::Ints(self.dims(names));
            let shape = vec![(names.len() as i64).into()];
            self.given(Fact {
                elem_type: elem_type::INT64,
                shape: Some(shape),
                value: Some(value),
            })
        }

        pub fn int_scalar(&mut self, name: &str) -> &mut Self {
            let value = Value::Ints(self.dims(&[name]));
            self.given(Fact {
                elem_type: elem_type::INT64,
                shape: Some(vec![]),
                value: Some(value),
            })
        }

        fn node(&self) -> Node {
            Node::read(self.proto.encode_to_vec().into()).unwrap()
        }

        /// What the rule says of all results.
        pub fn shows_all(&mut self) -> Vec<String> {
            let (graph, node) = (Graph::read(&Default::default()).unwrap(), self.node());
            let mut context = Context {
                graph: &graph,
                node: &node,
                inputs: &self.inputs,
                symbols: &mut self.symbols,
                static_batch: self.static_batch,
                repaired: None,
                batch_is_bound: false,
            };
            self.results = outputs(&mut context);
            let (repaired, bound) = (context.repaired, context.batch_is_bound);
            (self.repaired, self.batch_is_bound) = (repaired, bound);
            let results = self.results.iter();
            results.map(|fact| show(&self.symbols, fact)).collect()
        }

        /// What the rule says of the first result.
        pub fn shows(&mut self) -> String {
            self.shows_all().swap_remove(0)
        }

        /// Where axis `at` of input `slot` is in the first result, exactly; after `shows`.
        pub fn axis(&mut self, slot: usize, at: usize) -> Option<usize> {
            self.axis_to(slot, at, 0)
        }

        pub fn axis_to(&mut self, slot: usize, at: usize, out: usize) -> Option<usize> {
            self.followed(slot, at, out, crate::shapes::propagate_axis)
        }

        /// As `axis`, for elements that must know nothing of one another.
        pub fn axis_apart(&mut self, slot: usize, at: usize) -> Option<usize> {
            self.followed(slot, at, 0, crate::shapes::propagate_axis_apart)
        }

        /// What is given and what the rule said of it, by name.
        fn facts(&self) -> Facts {
            let inputs = self.proto.input.iter().cloned().zip(self.inputs.clone());
            let outputs = self.proto.output.iter().cloned().zip(self.results.clone());
            Facts::given(inputs.chain(outputs))
        }

        /// Whether axis `at` of input `slot` ends here.
        pub fn ends(&mut self, slot: usize, at: usize) -> bool {
            let facts = self.facts();
            let place = Dim::product(&self.inputs[slot].shape.as_ref().unwrap()[..at]).unwrap();
            let trail = crate::shapes::trace_axis(&facts, &self.node(), slot, &place, 0);
            trail == crate::shapes::AxisFate::Ends
        }

        fn followed(
            &mut self,
            slot: usize,
            at: usize,
            out: usize,
            follow: fn(&Facts, &Node, usize, &AxisOffset, usize) -> Option<AxisOffset>,
        ) -> Option<usize> {
            let facts = self.facts();
            let dims = facts.shape(&self.proto.input[slot])?.to_vec();
            let place = Dim::product(&dims[..at])?;
            let to = follow(&facts, &self.node(), slot, &place, out)?;
            crate::shapes::axis_at(&facts, &self.proto.output[out], &to)
        }
    }

    fn show(symbols: &Symbols, fact: &Fact) -> String {
        let list = |dims: &[Dim]| {
            let all: Vec<String> = dims.iter().map(|d| symbols.show(d)).collect();
            all.join(", ")
        };
        let Some(shape) = &fact.shape else {
            return "unknown".into();
        };
        let ty = match fact.elem_type {
            0 => "?",
            elem_type::UINT8 => "uint8",
            3 => "int8",
            ty => elem_type::name(ty),
        };
        let shape = format!("{ty} [{}]", list(shape));
        match &fact.value {
            None => shape,
            Some(Value::Ints(v)) => format!("{shape} = [{}]", list(v)),
            Some(Value::Floats(v)) => format!("{shape} = {v:?}"),
        }
    }

    /// The operators of ONNX 1.23 (opset 28) and of ONNX Runtime 1.32, by their own registries.
    const KNOWN: &str = include_str!("operators.txt");

    #[test]
    fn no_operator_has_two_rows() {
        let mut seen = HashSet::new();
        for op in rows() {
            assert!(
                seen.insert((op.domain, op.name)),
                "{} {}",
                op.domain,
                op.name
            );
        }
    }

    #[test]
    fn every_operator_has_a_row() {
        let known: HashSet<(&str, &str)> = KNOWN
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(domain, name)| (if domain == "ai.onnx" { "" } else { domain }, name))
            .collect();
        let mut missing: Vec<_> = known.iter().filter(|op| !TABLE.contains_key(*op)).collect();
        missing.sort();
        assert!(missing.is_empty(), "no row: {missing:?}");
        // Old operators are in exporters' files for ever, but in no registry.
        let retired = [
            ("", "SimplifiedLayerNormalization"),
            ("", "Scatter"),
            ("", "Upsample"),
        ];
        for op in rows().map(|op| (op.domain, op.name)) {
            assert!(
                known.contains(&op) || retired.contains(&op),
                "there is no {op:?}"
            );
        }
    }

    #[test]
    fn what_has_no_rule_says_why() {
        for op in rows() {
            let reasons = [
                match op.shape {
                    Shape::Open(why) => Some(why),
                    _ => None,
                },
                match op.axis {
                    Axis::Lost(why) => Some(why),
                    _ => None,
                },
            ];
            for why in reasons.into_iter().flatten() {
                assert!(why.len() > 8, "{}: {why:?} is no reason", op.name);
            }
        }
    }
}
