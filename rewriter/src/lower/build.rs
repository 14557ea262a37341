//! Pieces that every patch is made of: fresh names, nodes, type annotations, subgraphs.

use crate::onnx::{AttributeProto, Graph, NodeProto, TensorProto, ValueInfoProto, elem_type};
use crate::shapes::{Dim, Fact};
use bytes::Bytes;
use prost::Message;
use std::collections::HashSet;

/// Hands out names that the graph does not have.
pub struct Names(HashSet<String>);

impl Names {
    pub fn new(graph: &Graph) -> Self {
        Self(graph.names())
    }

    /// `wanted`, or `wanted_1`, `wanted_2` … if it is taken.
    pub fn fresh(&mut self, wanted: &str) -> String {
        let mut name = wanted.to_owned();
        let mut suffix = 0;
        while !self.0.insert(name.clone()) {
            suffix += 1;
            name = format!("{wanted}_{suffix}");
        }
        name
    }

    /// Takes exactly `name`; `false` if the graph has it.
    pub fn claim(&mut self, name: &str) -> bool {
        self.0.insert(name.to_owned())
    }
}

/// A node of the attention domain, or (`domain` empty) of ONNX itself.
pub fn node(
    domain: &str,
    op: &str,
    name: String,
    inputs: &[&str],
    outputs: &[&str],
    attributes: &[AttributeProto],
) -> Bytes {
    let strings = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    NodeProto {
        input: strings(inputs),
        output: strings(outputs),
        name: Some(name),
        op_type: Some(op.into()),
        attribute: attributes
            .iter()
            .map(|a| a.encode_to_vec().into())
            .collect(),
        domain: (!domain.is_empty()).then(|| domain.into()),
        ..NodeProto::default()
    }
    .encode_to_vec()
    .into()
}

/// A type annotation with known sizes only; symbolic sizes stay open, and so does the batch that ASC halves.
pub fn value_info(name: &str, fact: &Fact) -> Bytes {
    let sizes = |dims: &Vec<Dim>| dims.iter().map(Dim::known).collect();
    annotation(name, fact.elem_type, fact.shape.as_ref().map(sizes))
}

/// As [`value_info`], with any number of rows: those of a state, of which there are none at the start.
pub fn any_rows(name: &str, fact: &Fact) -> Bytes {
    let sizes = fact.shape.as_ref().map(|dims| {
        let mut sizes: Vec<_> = dims.iter().map(Dim::known).collect();
        if let Some(rows) = sizes.first_mut() {
            *rows = None;
        }
        sizes
    });
    annotation(name, fact.elem_type, sizes)
}

/// As [`value_info`], with the rank only.
pub fn any_sizes(name: &str, fact: &Fact) -> Bytes {
    let sizes = fact.shape.as_ref().map(|dims| vec![None; dims.len()]);
    annotation(name, fact.elem_type, sizes)
}

/// A type annotation with these sizes, `None` for an open one.
pub fn sized(name: &str, elem_type: i32, sizes: &[Option<i64>]) -> Bytes {
    annotation(name, elem_type, Some(sizes.to_vec()))
}

fn annotation(name: &str, elem_type: i32, sizes: Option<Vec<Option<i64>>>) -> Bytes {
    ValueInfoProto::tensor(name, elem_type, sizes)
        .encode_to_vec()
        .into()
}

/// Nodes in the making: every helper appends to them and returns the name of its result.
pub struct Writer<'n> {
    pub nodes: Vec<Bytes>,
    pub names: &'n mut Names,
    /// Types of results that the graph does not name: an op's result must have one.
    pub value_info: Vec<Bytes>,
}

impl<'n> Writer<'n> {
    pub fn new(names: &'n mut Names) -> Self {
        Self {
            nodes: Vec::new(),
            names,
            value_info: Vec::new(),
        }
    }

    /// One ONNX node with one result called `output` (made fresh).
    pub fn push(
        &mut self,
        op: &str,
        output: &str,
        inputs: &[&str],
        attributes: &[AttributeProto],
    ) -> String {
        let output = self.names.fresh(output);
        self.push_as(op, &output, inputs, attributes);
        output
    }

    /// One ONNX node whose result is exactly `output`.
    pub fn push_as(
        &mut self,
        op: &str,
        output: &str,
        inputs: &[&str],
        attributes: &[AttributeProto],
    ) {
        let name = self
            .names
            .fresh(&format!("{output}/{}", op.to_ascii_lowercase()));
        self.nodes
            .push(node("", op, name, inputs, &[output], attributes));
    }

    /// A vector of integers, such as a shape.
    pub fn ints(&mut self, near: &str, values: &[i64]) -> String {
        self.int_tensor(near, vec![values.len() as i64], values)
    }

    /// Integers of any shape.
    pub fn int_tensor(&mut self, near: &str, dims: Vec<i64>, values: &[i64]) -> String {
        let raw = values.iter().flat_map(|i| i.to_le_bytes()).collect();
        self.constant(near, elem_type::INT64, dims, raw)
    }

    /// One integer without axes.
    pub fn int(&mut self, near: &str, value: i64) -> String {
        self.constant(near, elem_type::INT64, vec![], value.to_le_bytes().to_vec())
    }

    pub fn bools(&mut self, near: &str, values: &[bool]) -> String {
        let raw = values.iter().map(|&b| u8::from(b)).collect();
        self.constant(near, elem_type::BOOL, vec![values.len() as i64], raw)
    }

    /// One float32 without axes.
    pub fn float(&mut self, near: &str, value: f64) -> String {
        let raw = (value as f32).to_le_bytes().to_vec();
        self.constant(near, elem_type::FLOAT, vec![], raw)
    }

    fn constant(&mut self, near: &str, data_type: i32, dims: Vec<i64>, raw: Vec<u8>) -> String {
        let tensor = TensorProto {
            dims,
            data_type,
            raw_data: Some(raw.into()),
            ..TensorProto::default()
        };
        let attribute = AttributeProto::tensor("value", &tensor);
        self.push("Constant", &format!("{near}/constant"), &[], &[attribute])
    }
}

/// The body of an `If` branch: no inputs.
#[derive(Clone, PartialEq, prost::Message)]
struct Branch {
    #[prost(bytes = "bytes", repeated, tag = "1")]
    node: Vec<Bytes>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(bytes = "bytes", repeated, tag = "12")]
    output: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "13")]
    value_info: Vec<Bytes>,
}

/// An `If` between two branches.
pub fn either(name: String, condition: &str, yes: Bytes, no: Bytes, results: &[&str]) -> Bytes {
    let branches = [
        AttributeProto::graph("then_branch", yes),
        AttributeProto::graph("else_branch", no),
    ];
    node("", "If", name, &[condition], results, &branches)
}

pub fn branch(
    name: String,
    nodes: Vec<Bytes>,
    output: Vec<Bytes>,
    value_info: Vec<Bytes>,
) -> Bytes {
    Branch {
        node: nodes,
        name,
        output,
        value_info,
    }
    .encode_to_vec()
    .into()
}
