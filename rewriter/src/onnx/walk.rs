//! Every node of a serialized graph or function, however deep, without decoding what is around it.
//!
//! Owns the field numbers of nodes and attributes, and the limit on how deep graphs are nested. Changes nothing.

use super::graph::{FIELD_NODE, MAX_SUBGRAPH_DEPTH};
use super::wire::{self, Field};
use bytes::Bytes;

pub const NODE_INPUT: u32 = 1;
pub const NODE_OUTPUT: u32 = 2;
pub const NODE_NAME: u32 = 3;
pub const NODE_OP: u32 = 4;
pub const NODE_ATTRIBUTE: u32 = 5;
pub const NODE_DOMAIN: u32 = 7;
pub const NODE_OVERLOAD: u32 = 8;
pub const ATTRIBUTE_NAME: u32 = 1;
pub const ATTRIBUTE_GRAPH: u32 = 6;
pub const ATTRIBUTE_GRAPHS: u32 = 11;
pub const FUNCTION_NODE: u32 = 7;

pub fn split(message: &Bytes) -> Result<Vec<Field>, String> {
    wire::split(message).map_err(|e| e.to_string())
}

/// The last string field `number`, empty if there is none.
pub fn text(fields: &[Field], number: u32) -> String {
    let last = fields.iter().filter_map(|f| f.message(number)).last();
    last.map_or_else(String::new, |s| String::from_utf8_lossy(s).into_owned())
}

/// All string fields `number`.
pub fn texts(fields: &[Field], number: u32) -> Vec<String> {
    let all = fields.iter().filter_map(|f| f.message(number));
    all.map(|s| String::from_utf8_lossy(s).into_owned())
        .collect()
}

/// A domain as it is compared: ONNX's own is the empty string.
pub fn domain(name: String) -> String {
    match name == "ai.onnx" {
        true => String::new(),
        false => name,
    }
}

/// The subgraphs of a node.
pub fn subgraphs(node: &[Field]) -> Result<Vec<Bytes>, String> {
    let mut found = Vec::new();
    for attribute in node.iter().filter_map(|f| f.message(NODE_ATTRIBUTE)) {
        let fields = split(attribute)?;
        let graphs = fields.iter().filter_map(|f| {
            f.message(ATTRIBUTE_GRAPH)
                .or_else(|| f.message(ATTRIBUTE_GRAPHS))
        });
        found.extend(graphs.cloned());
    }
    Ok(found)
}

/// Calls `visit` with the fields of every node among the fields `number` of `message` (a graph or a function), and of those in
/// their subgraphs. It says whether to go on.
pub fn nodes(
    message: &Bytes,
    number: u32,
    depth: usize,
    visit: &mut dyn FnMut(&[Field]) -> bool,
) -> Result<bool, String> {
    if depth > MAX_SUBGRAPH_DEPTH {
        return Err(format!(
            "subgraphs are nested more than {MAX_SUBGRAPH_DEPTH} deep"
        ));
    }
    for node in split(message)?.iter().filter_map(|f| f.message(number)) {
        let node = split(node)?;
        if !visit(&node) {
            return Ok(false);
        }
        for graph in subgraphs(&node)? {
            if !nodes(&graph, FIELD_NODE, depth + 1, visit)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}
