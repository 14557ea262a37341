//! The main graph: its nodes and values indexed for dataflow, and the edits that can be written back.
//!
//! Reading decodes nodes, inputs, outputs, type annotations and small constants. The original bytes of every element are
//! kept beside it, so [`Graph::serialize`] copies what an edit does not mention.

use super::constant::{Constant, Data};
use super::proto::{AttributeProto, AttributeType, NodeProto, TypeProto, ValueInfoProto};
use super::wire::{self, Field};
use bytes::Bytes;
use prost::Message;
use std::collections::{HashMap, HashSet};

pub(super) const FIELD_NODE: u32 = 1;
pub(super) const FIELD_INITIALIZER: u32 = 5;
pub(super) const FIELD_INPUT: u32 = 11;
pub(super) const FIELD_OUTPUT: u32 = 12;
pub(super) const FIELD_VALUE_INFO: u32 = 13;
/// `type` of a `ValueInfoProto`.
const FIELD_VALUE_TYPE: u32 = 2;

/// A node: decoded, and the bytes it came from.
#[derive(Clone, Debug)]
pub struct Node {
    pub proto: NodeProto,
    pub raw: Bytes,
    /// Names of outer values that the node's subgraphs use; consumers as much as its inputs are.
    pub captured: Vec<String>,
    attributes: Vec<AttributeProto>,
}

impl Node {
    /// Operator name without its domain.
    pub fn op(&self) -> &str {
        self.proto.op_type.as_deref().unwrap_or("")
    }

    /// Domain, with `ai.onnx` written as the empty string.
    pub fn domain(&self) -> &str {
        match self.proto.domain.as_deref() {
            None | Some("ai.onnx") => "",
            Some(domain) => domain,
        }
    }

    /// Whether this is the ONNX operator `op`.
    pub fn is(&self, op: &str) -> bool {
        self.op() == op && self.domain().is_empty()
    }

    /// The name to show people: the node's, or that of its first output.
    pub fn label(&self) -> &str {
        match self.proto.name.as_deref() {
            Some(name) if !name.is_empty() => name,
            _ => self
                .proto
                .output
                .first()
                .map_or("(unnamed)", String::as_str),
        }
    }

    /// Input `i`, `None` where it is left out.
    pub fn input(&self, i: usize) -> Option<&str> {
        self.proto
            .input
            .get(i)
            .map(String::as_str)
            .filter(|n| !n.is_empty())
    }

    /// Output `i`; empty if it is left out.
    pub fn output(&self, i: usize) -> &str {
        self.proto.output.get(i).map_or("", String::as_str)
    }

    pub fn attributes(&self) -> &[AttributeProto] {
        &self.attributes
    }

    pub fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.attributes.iter().find(|a| a.name == name)
    }

    pub fn int(&self, name: &str) -> Option<i64> {
        self.attribute(name).and_then(|a| a.i)
    }

    pub fn float(&self, name: &str) -> Option<f32> {
        self.attribute(name).and_then(|a| a.f)
    }

    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        self.attribute(name).map(|a| a.ints.as_slice())
    }

    /// Whether any attribute is a subgraph.
    pub fn has_subgraph(&self) -> bool {
        self.attributes
            .iter()
            .any(|a| a.g.is_some() || !a.graphs.is_empty())
    }

    /// Its subgraphs, each with the name of the attribute that it is.
    pub fn subgraphs(&self) -> impl Iterator<Item = (&str, &Bytes)> {
        self.attributes.iter().flat_map(|a| {
            let graphs = a.g.iter().chain(&a.graphs);
            graphs.map(|graph| (a.name.as_str(), graph))
        })
    }

    /// The nodes of its subgraphs, of which those that cannot be read are left out.
    pub fn inner(&self) -> Vec<Node> {
        let graphs = self.subgraphs();
        graphs
            .flat_map(|(_, graph)| Self::of_graph(graph))
            .collect()
    }

    /// The nodes of a serialized graph, of which those that cannot be read are left out.
    pub fn of_graph(graph: &Bytes) -> Vec<Node> {
        let fields = wire::split(graph).unwrap_or_default().into_iter();
        fields
            .filter_map(|f| Self::read(f.message(FIELD_NODE)?.clone()))
            .collect()
    }

    /// Reads a serialized node; `None` if it is none.
    pub fn read(raw: Bytes) -> Option<Self> {
        Self::parse(raw, 0).ok()
    }

    /// How many names and numbers it holds.
    fn content(&self) -> usize {
        let in_attributes = |a: &AttributeProto| 1 + a.ints.len() + a.floats.len() + a.graphs.len();
        let attributes: usize = self.attributes.iter().map(in_attributes).sum();
        1 + self.proto.input.len() + self.proto.output.len() + self.captured.len() + attributes
    }

    /// Reads a node; `depth` counts the subgraphs around it.
    fn parse(raw: Bytes, depth: usize) -> Result<Self, String> {
        wire::split(&raw).map_err(|e| format!("bad node: {e}"))?;
        let proto = NodeProto::decode(raw.clone()).map_err(|e| format!("bad node: {e}"))?;
        let attributes = proto
            .attribute
            .iter()
            .map(|a| {
                wire::split(a).map_err(|e| e.to_string())?;
                AttributeProto::decode(a.clone()).map_err(|e| e.to_string())
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| {
                let name = proto.name.as_deref().unwrap_or("");
                format!("bad attribute of node {name}: {e}")
            })?;
        let mut captured = Vec::new();
        for graph in attributes.iter().flat_map(|a| a.g.iter().chain(&a.graphs)) {
            captured.extend(free_names(graph, depth)?);
        }
        Ok(Self {
            proto,
            raw,
            captured,
            attributes,
        })
    }
}

/// ONNX control flow nests a few levels; deeper is hostile and would exhaust the stack.
pub(super) const MAX_SUBGRAPH_DEPTH: usize = 32;

/// Names and numbers that the nodes of a model may have, together: far more than any, and few enough for any machine.
const MAX_CONTENT: usize = 1 << 22;

/// A type or a shape is a few dozen bytes; more is hostile, and many times as much once decoded.
const MAX_TYPE_BYTES: usize = 1 << 14;

/// Names that a serialized subgraph uses but does not define.
fn free_names(graph: &Bytes, depth: usize) -> Result<Vec<String>, String> {
    if depth > MAX_SUBGRAPH_DEPTH {
        return Err(format!(
            "subgraphs are nested more than {MAX_SUBGRAPH_DEPTH} deep"
        ));
    }
    let fields = wire::split(graph).map_err(|e| format!("bad subgraph: {e}"))?;
    let mut used = Vec::new();
    let mut defined = HashSet::new();
    for field in fields {
        let Some(payload) = field.payload else {
            continue;
        };
        match field.number {
            FIELD_NODE => {
                let node = Node::parse(payload, depth + 1)?;
                used.extend(node.proto.input.iter().cloned());
                used.extend(node.captured);
                defined.extend(node.proto.output);
            }
            FIELD_INITIALIZER => defined.extend(Constant::read(&payload).map(|(name, _)| name)),
            FIELD_INPUT => defined.extend(ValueInfoProto::decode(payload).map(|v| v.name)),
            FIELD_OUTPUT => used.extend(ValueInfoProto::decode(payload).map(|v| v.name)),
            _ => {}
        }
    }
    used.retain(|n| !n.is_empty() && !defined.contains(n));
    Ok(used)
}

/// `nodes` so that each comes after what it reads: unchanged if they are, as ONNX wants it. Some converters do not care,
/// and ONNX Runtime does not either; then what is needed moves up, just before the node that needs it.
///
/// # Errors
/// A value that is produced twice, or that depends on itself.
pub fn in_order(nodes: Vec<Node>) -> Result<Vec<Node>, String> {
    let mut producer: HashMap<&str, usize> = HashMap::new();
    for (index, node) in nodes.iter().enumerate() {
        for output in node.proto.output.iter().filter(|o| !o.is_empty()) {
            if producer.insert(output, index).is_some() {
                return Err(format!("the value `{output}` is produced twice"));
            }
        }
    }
    let needs = |node: &Node| -> Vec<usize> {
        let inputs = node.proto.input.iter().chain(&node.captured);
        inputs
            .filter_map(|v| producer.get(v.as_str()).copied())
            .collect()
    };
    let mut order = Vec::with_capacity(nodes.len());
    let mut placed = vec![false; nodes.len()];
    let mut open = vec![false; nodes.len()];
    // Each node waits with what it has not looked at yet: to begin anew after every result would take the square of its inputs.
    let mut pending: Vec<(usize, std::vec::IntoIter<usize>)> = Vec::new();
    for start in 0..nodes.len() {
        let mut next = (!placed[start]).then_some(start);
        loop {
            if let Some(node) = next {
                if std::mem::replace(&mut open[node], true) {
                    let waiting = pending.last().map_or(node, |(waiting, _)| *waiting);
                    let (a, b) = (nodes[waiting].label(), nodes[node].label());
                    return Err(format!(
                        "the nodes `{a}` and `{b}` need each other's results"
                    ));
                }
                pending.push((node, needs(&nodes[node]).into_iter()));
            }
            let Some((node, needed)) = pending.last_mut() else {
                break;
            };
            next = needed.find(|&n| !placed[n]);
            if next.is_none() {
                placed[*node] = true;
                order.push(*node);
                pending.pop();
            }
        }
    }
    if order.iter().enumerate().all(|(i, &n)| i == n) {
        return Ok(nodes);
    }
    let mut nodes: Vec<Option<Node>> = nodes.into_iter().map(Some).collect();
    Ok(order.into_iter().filter_map(|i| nodes[i].take()).collect())
}

/// A graph input that must be fed (or may be, where it has a default initializer).
#[derive(Clone, Debug)]
pub struct GraphInput {
    pub name: String,
    pub elem_type: i32,
    /// Dimensions as declared: `Ok(size)` or `Err(name)`; `None` if the rank is unknown.
    pub dims: Option<Vec<Result<i64, String>>>,
    pub has_default: bool,
}

/// The main graph, indexed by value name.
#[derive(Debug)]
pub struct Graph {
    /// Version of the ONNX operators; 0 if the model does not say.
    pub opset: i64,
    pub nodes: Vec<Node>,
    pub inputs: Vec<GraphInput>,
    pub outputs: Vec<String>,
    pub initializers: HashMap<String, Constant>,
    pub value_info: HashMap<String, TypeProto>,
    producers: HashMap<String, (usize, usize)>,
    consumers: HashMap<String, Vec<usize>>,
    /// The names in `inputs` and in `outputs`.
    fed: HashSet<String>,
    returned: HashSet<String>,
    fields: Vec<Field>,
}

impl Graph {
    /// Reads the graph of a branch; `None` if it is none.
    pub fn read(graph: &Bytes) -> Option<Self> {
        Self::parse(graph).ok()
    }

    pub(super) fn parse(graph: &Bytes) -> Result<Self, String> {
        let fields = wire::split(graph).map_err(|e| format!("bad graph: {e}"))?;
        let mut nodes = Vec::new();
        let mut content = 0usize;
        let mut initializers = HashMap::new();
        let mut inputs = Vec::new();
        let mut outputs = Vec::new();
        let mut value_info = HashMap::new();
        for field in &fields {
            let Some(payload) = field.payload.clone() else {
                continue;
            };
            let value = |what: &str| {
                if payload.len() > MAX_TYPE_BYTES {
                    let size = payload.len();
                    return Err(format!(
                        "a graph {what} of {size} bytes, expected at most {MAX_TYPE_BYTES}"
                    ));
                }
                ValueInfoProto::decode(payload.clone())
                    .map_err(|e| format!("bad graph {what}: {e}"))
            };
            match field.number {
                FIELD_NODE => {
                    let node = Node::parse(payload, 0)?;
                    content += node.content();
                    if content > MAX_CONTENT {
                        return Err(format!(
                            "its nodes have more than {MAX_CONTENT} names and numbers"
                        ));
                    }
                    nodes.push(node);
                }
                FIELD_INITIALIZER => {
                    let (name, constant) = Constant::read(&payload).ok_or("bad initializer")?;
                    initializers.insert(name, constant);
                }
                FIELD_INPUT => inputs.push(value("input")?),
                FIELD_OUTPUT => outputs.push(value("output")?),
                FIELD_VALUE_INFO => {
                    let value = value("value_info")?;
                    if let Some(ty) = value.r#type {
                        value_info.insert(value.name, ty);
                    }
                }
                _ => {}
            }
        }
        for output in &outputs {
            if let Some(ty) = &output.r#type {
                value_info.insert(output.name.clone(), ty.clone());
            }
        }
        let inputs: Vec<GraphInput> = inputs
            .into_iter()
            .map(|input| {
                let tensor = input.r#type.and_then(|t| t.tensor_type).unwrap_or_default();
                let dims = tensor.shape.map(|s| {
                    s.dim
                        .into_iter()
                        .map(|d| d.dim_value.ok_or_else(|| d.dim_param.unwrap_or_default()))
                        .collect()
                });
                let has_default = initializers.contains_key(&input.name);
                GraphInput {
                    name: input.name,
                    elem_type: tensor.elem_type,
                    dims,
                    has_default,
                }
            })
            .collect();
        let nodes = in_order(nodes)?;
        let mut producers = HashMap::new();
        let mut consumers: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, node) in nodes.iter().enumerate() {
            for (slot, output) in node.proto.output.iter().enumerate() {
                if !output.is_empty() {
                    producers.insert(output.clone(), (index, slot));
                }
            }
            for input in node.proto.input.iter().chain(&node.captured) {
                if !input.is_empty() {
                    let list = consumers.entry(input.clone()).or_default();
                    if list.last() != Some(&index) {
                        list.push(index);
                    }
                }
            }
        }
        let outputs: Vec<String> = outputs.into_iter().map(|o| o.name).collect();
        let fed = inputs.iter().map(|i| i.name.clone()).collect();
        let returned = outputs.iter().cloned().collect();
        Ok(Self {
            opset: 0,
            nodes,
            inputs,
            outputs,
            initializers,
            value_info,
            producers,
            consumers,
            fed,
            returned,
            fields,
        })
    }

    /// The node that produces `value` and its output slot.
    pub fn producer(&self, value: &str) -> Option<(&Node, usize)> {
        self.producer_index(value)
            .map(|(index, slot)| (&self.nodes[index], slot))
    }

    pub fn producer_index(&self, value: &str) -> Option<(usize, usize)> {
        self.producers.get(value).copied()
    }

    /// Indices of the nodes that use `value`, each once, in file order.
    pub fn consumers(&self, value: &str) -> &[usize] {
        self.consumers.get(value).map_or(&[], Vec::as_slice)
    }

    pub fn is_input(&self, value: &str) -> bool {
        self.fed.contains(value)
    }

    pub fn is_output(&self, value: &str) -> bool {
        self.returned.contains(value)
    }

    /// The only node that uses `value`, if it is the only use.
    pub fn only_consumer(&self, value: &str) -> Option<usize> {
        match self.consumers(value) {
            [only] if !self.is_output(value) => Some(*only),
            _ => None,
        }
    }

    /// The constant behind `value`: an initializer that no graph input overrides, or a `Constant` node.
    pub fn constant(&self, value: &str) -> Option<Constant> {
        if let Some(constant) = self.initializers.get(value) {
            // An initializer that is also a graph input is a default that callers may override.
            return (!self.is_input(value)).then(|| constant.clone());
        }
        let (node, _) = self.producer(value)?;
        if !node.is("Constant") {
            return None;
        }
        if let Some(tensor) = node.attribute("value").and_then(|a| a.t.as_ref()) {
            return Constant::read(tensor).map(|(_, c)| c);
        }
        let scalar = |elem_type, data| Constant {
            elem_type,
            dims: vec![],
            data: Some(data),
        };
        let list = |elem_type, n: usize, data| Constant {
            elem_type,
            dims: vec![n as i64],
            data: Some(data),
        };
        use super::proto::elem_type::{FLOAT, INT64};
        let attribute = node.attributes.first()?;
        match (
            attribute.name.as_str(),
            AttributeType::try_from(attribute.r#type).ok()?,
        ) {
            ("value_int", _) => Some(scalar(INT64, Data::Ints(vec![attribute.i?]))),
            ("value_float", _) => Some(scalar(FLOAT, Data::Floats(vec![f64::from(attribute.f?)]))),
            ("value_ints", _) => Some(list(
                INT64,
                attribute.ints.len(),
                Data::Ints(attribute.ints.clone()),
            )),
            ("value_floats", _) => Some(list(
                FLOAT,
                attribute.floats.len(),
                Data::Floats(attribute.floats.iter().map(|&f| f64::from(f)).collect()),
            )),
            _ => None,
        }
    }

    /// Every name of the graph: values, and the nodes' own names.
    pub fn names(&self) -> HashSet<String> {
        let mut names: HashSet<String> = self.inputs.iter().map(|i| i.name.clone()).collect();
        names.extend(self.initializers.keys().cloned());
        names.extend(self.value_info.keys().cloned());
        for node in &self.nodes {
            names.extend(node.proto.output.iter().cloned());
            names.extend(node.proto.name.iter().cloned());
            names.extend(node.captured.iter().cloned());
        }
        names
    }

    pub(super) fn fields(&self) -> &[Field] {
        &self.fields
    }

    pub(super) fn serialize(&self, edit: &GraphEdit) -> Vec<Bytes> {
        let mut pieces: Vec<Bytes> = Vec::with_capacity(self.fields.len() * 2);
        let push = |pieces: &mut Vec<Bytes>, number: u32, message: &Bytes| {
            pieces.push(wire::header(number, message.len()).into());
            pieces.push(message.clone());
        };
        let mut pending_nodes = edit.nodes.as_deref();
        for field in &self.fields {
            let dropped = match (field.number, &field.payload) {
                (FIELD_NODE, Some(_)) => edit.nodes.is_some(),
                (FIELD_INITIALIZER, Some(p)) => {
                    !edit.removed_initializers.is_empty()
                        && Constant::read(p)
                            .is_some_and(|(name, _)| edit.removed_initializers.contains(&name))
                }
                (FIELD_VALUE_INFO, Some(p)) => {
                    !edit.removed_value_info.is_empty()
                        && ValueInfoProto::decode(p.clone())
                            .is_ok_and(|v| edit.removed_value_info.contains(&v.name))
                }
                (FIELD_OUTPUT, Some(p)) => match edit.retyped(p) {
                    Some(output) => {
                        push(&mut pieces, FIELD_OUTPUT, &output);
                        true
                    }
                    None => false,
                },
                _ => false,
            };
            if field.message(FIELD_NODE).is_some() {
                for node in pending_nodes.take().unwrap_or_default() {
                    push(&mut pieces, FIELD_NODE, node);
                }
            }
            if !dropped {
                pieces.push(field.raw.clone());
            }
        }
        for (number, messages) in [
            (FIELD_INITIALIZER, &edit.added_initializers),
            (FIELD_INPUT, &edit.added_inputs),
            (FIELD_OUTPUT, &edit.added_outputs),
            (FIELD_VALUE_INFO, &edit.added_value_info),
        ] {
            for message in messages {
                push(&mut pieces, number, message);
            }
        }
        pieces
    }
}

/// What to change in a graph when it is written. The default changes nothing.
#[derive(Debug, Default)]
pub struct GraphEdit {
    /// The whole node list, in order, as serialized `NodeProto`s; `None` keeps the file's.
    pub nodes: Option<Vec<Bytes>>,
    pub removed_initializers: HashSet<String>,
    pub removed_value_info: HashSet<String>,
    pub added_initializers: Vec<Bytes>,
    pub added_inputs: Vec<Bytes>,
    pub added_outputs: Vec<Bytes>,
    pub added_value_info: Vec<Bytes>,
    /// Outputs that are declared with another type.
    pub retyped_outputs: HashMap<String, TypeProto>,
}

impl GraphEdit {
    /// The declaration `output` with its new type, everything else as it was; `None` if it keeps its type.
    fn retyped(&self, output: &Bytes) -> Option<Bytes> {
        let name = ValueInfoProto::decode(output.clone()).ok()?.name;
        let ty = self.retyped_outputs.get(&name)?.encode_to_vec();
        let fields = wire::split(output).ok()?.into_iter();
        let kept = fields.filter(|f| f.number != FIELD_VALUE_TYPE);
        let mut bytes: Vec<u8> = kept.flat_map(|f| f.raw).collect();
        bytes.extend(wire::header(FIELD_VALUE_TYPE, ty.len()));
        bytes.extend(ty);
        Some(bytes.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_with_another_type_keeps_its_other_fields() {
        // name, type, and field 3 (doc_string), which the struct does not know.
        let mut output = ValueInfoProto::tensor("out", 1, Some(vec![None])).encode_to_vec();
        let doc = [&wire::header(3, 3)[..], b"why"].concat();
        output.extend(&doc);
        let wanted = ValueInfoProto::tensor("out", 1, Some(vec![Some(8)]));
        let edit = GraphEdit {
            retyped_outputs: HashMap::from([("out".into(), wanted.r#type.clone().unwrap())]),
            ..GraphEdit::default()
        };
        let retyped = edit.retyped(&output.into()).unwrap();
        assert_eq!(ValueInfoProto::decode(retyped.clone()).unwrap(), wanted);
        assert!(retyped.windows(doc.len()).any(|part| part == doc));
        let other = ValueInfoProto::tensor("other", 1, None).encode_to_vec();
        assert!(edit.retyped(&other.into()).is_none());
    }
}
