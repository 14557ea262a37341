//! Pieces that every patch is made of: fresh names, nodes, type annotations, subgraphs.

use crate::onnx::{
    AttributeProto, DimensionProto, Graph, NodeProto, TensorShapeProto, TensorTypeProto, TypeProto,
    ValueInfoProto,
};
use crate::shapes::Fact;
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
    let shape = fact.shape.as_ref().map(|dims| TensorShapeProto {
        dim: dims
            .iter()
            .map(|d| DimensionProto {
                dim_value: d.known(),
                dim_param: None,
            })
            .collect(),
    });
    let tensor_type = TensorTypeProto {
        elem_type: fact.elem_type,
        shape,
    };
    ValueInfoProto {
        name: name.into(),
        r#type: Some(TypeProto {
            tensor_type: Some(tensor_type),
        }),
    }
    .encode_to_vec()
    .into()
}

/// The body of an `If` branch: no inputs, one output.
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

pub fn branch(name: String, nodes: Vec<Bytes>, output: Bytes, value_info: Vec<Bytes>) -> Bytes {
    Branch {
        node: nodes,
        name,
        output: vec![output],
        value_info,
    }
    .encode_to_vec()
    .into()
}
