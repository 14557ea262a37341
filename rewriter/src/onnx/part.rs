//! A part of a model as a model of its own: some of its nodes, with the weights that they use and no others.

use super::file::{FIELD_GRAPH, ModelFile};
use super::graph::{FIELD_INITIALIZER, FIELD_INPUT, FIELD_NODE, FIELD_OUTPUT, FIELD_VALUE_INFO};
use super::proto::ValueInfoProto;
use super::{Constant, wire};
use bytes::Bytes;
use prost::Message;
use std::collections::HashSet;

impl ModelFile {
    /// The nodes with these indices, in this order, as a serialized model.
    ///
    /// `inputs` are `ValueInfoProto`s of what the nodes read from elsewhere. `outputs` get no type, which ONNX Runtime infers.
    /// Weights outside the file are referred to as before. Everything around the graph is kept.
    pub fn part(&self, nodes: &[usize], inputs: &[Bytes], outputs: &[String]) -> Vec<u8> {
        let nodes: Vec<_> = nodes.iter().map(|&i| &self.graph.nodes[i]).collect();
        let used: HashSet<&str> = nodes
            .iter()
            .flat_map(|n| n.proto.input.iter().chain(&n.captured))
            .chain(outputs)
            .map(String::as_str)
            .collect();
        let made: HashSet<&str> = nodes
            .iter()
            .flat_map(|n| n.proto.output.iter())
            .filter(|o| !outputs.contains(o))
            .map(String::as_str)
            .collect();
        let mut graph = Vec::new();
        let mut put = |number: u32, message: &[u8]| {
            graph.extend(wire::header(number, message.len()));
            graph.extend(message);
        };
        for node in &nodes {
            put(FIELD_NODE, &node.raw);
        }
        for field in self.graph.fields() {
            let Some(payload) = &field.payload else {
                continue;
            };
            let keep = match field.number {
                FIELD_INITIALIZER => {
                    Constant::read(payload).is_some_and(|(name, _)| used.contains(name.as_str()))
                }
                FIELD_VALUE_INFO => ValueInfoProto::decode(payload.clone())
                    .is_ok_and(|v| made.contains(v.name.as_str())),
                FIELD_NODE | FIELD_INPUT | FIELD_OUTPUT => false,
                _ => true,
            };
            if keep {
                put(field.number, payload);
            }
        }
        for input in inputs {
            put(FIELD_INPUT, input);
        }
        for name in outputs {
            let output = ValueInfoProto {
                name: name.clone(),
                r#type: None,
            };
            put(FIELD_OUTPUT, &output.encode_to_vec());
        }
        let mut model = Vec::new();
        for field in self.fields() {
            if field.message(FIELD_GRAPH).is_some() {
                model.extend(wire::header(FIELD_GRAPH, graph.len()));
                model.append(&mut graph);
            } else {
                model.extend(&field.raw);
            }
        }
        model
    }
}
