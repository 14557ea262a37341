//! Small models for tests, written as text: one line per thing.
//!
//! ```text
//! opset 17                                   opset my 1
//! input x float [b, n, 32]                   output y float [b, n, 32]
//! weight w [32, 32]                          ints shape [0, 0, 4, 8]
//! y = my::Attn(x, w, _) heads=4 scale=0.5 perm=[0, 1] mode="a" axis=$axis then_branch=@name
//! graph name … end                           function my Attn (x, w) (y) heads, scale=1.0 … end
//! ```
//!
//! `$axis` is a reference to a function's attribute, `@name` a graph that was written above. Weights have no data.

use super::proto::{
    AttributeProto, AttributeType, DimensionProto, NodeProto, OperatorSetIdProto, TensorProto,
    TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto, elem_type,
};
use super::{ModelFile, wire};
use prost::Message;
use std::collections::HashMap;
use std::path::Path;

/// The model that `text` describes.
pub fn model(text: &str) -> ModelFile {
    ModelFile::parse(Path::new("model.onnx"), bytes(text).into()).unwrap()
}

/// The same, serialized.
pub fn bytes(text: &str) -> Vec<u8> {
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
    let mut graphs = HashMap::new();
    let (mut main, mut around) = (Vec::new(), Vec::new());
    put(&mut around, 1, None, Some(8));
    while let Some(line) = lines.next() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[0] {
            "opset" => {
                let domain = if words.len() == 3 { words[1] } else { "" };
                put(
                    &mut around,
                    8,
                    Some(opset(domain, words.last().unwrap())),
                    None,
                );
            }
            "graph" => {
                let mut graph = Vec::new();
                for line in lines.by_ref().take_while(|l| *l != "end") {
                    element(&mut graph, line, &graphs);
                }
                graphs.insert(words[1].to_owned(), graph);
            }
            "function" => {
                let mut function = head(line);
                for line in lines.by_ref().take_while(|l| *l != "end") {
                    match line.strip_prefix("opset ") {
                        Some(import) => {
                            let (domain, version) = import.rsplit_once(' ').unwrap_or(("", import));
                            put(&mut function, 9, Some(opset(domain, version)), None);
                        }
                        None => put(&mut function, 7, Some(node(line, &graphs)), None),
                    }
                }
                put(&mut around, 25, Some(function), None);
            }
            _ => element(&mut main, line, &graphs),
        }
    }
    put(&mut around, 7, Some(main), None);
    around
}

fn put(to: &mut Vec<u8>, number: u32, message: Option<Vec<u8>>, varint: Option<u8>) {
    match (message, varint) {
        (Some(message), _) => {
            to.extend(wire::header(number, message.len()));
            to.extend(message);
        }
        (None, Some(value)) => to.extend([(number << 3) as u8, value]),
        (None, None) => {}
    }
}

fn opset(domain: &str, version: &str) -> Vec<u8> {
    let (domain, version) = (domain.to_owned(), version.parse().unwrap());
    OperatorSetIdProto { domain, version }.encode_to_vec()
}

/// `function my Attn (x, w) (y) heads, scale=1.0`
fn head(line: &str) -> Vec<u8> {
    let (name, rest) = line.split_once('(').unwrap();
    let (inputs, rest) = rest.split_once(')').unwrap();
    let (outputs, attributes) = rest.split_once('(').unwrap().1.split_once(')').unwrap();
    let words: Vec<&str> = name.split_whitespace().collect();
    let mut function = Vec::new();
    let string = |s: &str| Some(s.as_bytes().to_vec());
    put(&mut function, 1, string(words[2]), None);
    for input in list(inputs) {
        put(&mut function, 4, string(input), None);
    }
    for output in list(outputs) {
        put(&mut function, 5, string(output), None);
    }
    for one in list(attributes) {
        match one.split_once('=') {
            Some((name, value)) => {
                let default = attribute(name, value, &HashMap::new());
                put(&mut function, 11, Some(default), None);
            }
            None => put(&mut function, 6, string(one), None),
        }
    }
    put(&mut function, 10, string(words[1]), None);
    function
}

fn list(text: &str) -> Vec<&str> {
    let parts = text.split(',').map(str::trim);
    parts.filter(|p| !p.is_empty()).collect()
}

fn brackets(line: &str) -> Vec<&str> {
    let (_, rest) = line.split_once('[').unwrap();
    list(rest.strip_suffix(']').unwrap())
}

/// One line of a graph.
fn element(graph: &mut Vec<u8>, line: &str, graphs: &HashMap<String, Vec<u8>>) {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[0] {
        "input" | "output" | "value" => {
            let number = match words[0] {
                "input" => 11,
                "output" => 12,
                _ => 13,
            };
            put(graph, number, Some(value(line)), None);
        }
        "weight" | "ints" => {
            let numbers: Vec<i64> = brackets(line).iter().map(|n| n.parse().unwrap()).collect();
            let ints = words[0] == "ints";
            let tensor = TensorProto {
                name: words[1].into(),
                dims: match ints {
                    true => vec![numbers.len() as i64],
                    false => numbers.clone(),
                },
                data_type: if ints {
                    elem_type::INT64
                } else {
                    elem_type::FLOAT
                },
                int64_data: if ints { numbers } else { Vec::new() },
                ..TensorProto::default()
            };
            put(graph, 5, Some(tensor.encode_to_vec()), None);
        }
        _ => put(graph, 1, Some(node(line, graphs)), None),
    }
}

/// `input x float [b, n, 32]`
fn value(line: &str) -> Vec<u8> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let dimension = |text: &str| match text.parse() {
        Ok(size) => DimensionProto {
            dim_value: Some(size),
            dim_param: None,
        },
        Err(_) => DimensionProto {
            dim_value: None,
            dim_param: Some(text.into()),
        },
    };
    let shape = line.contains('[').then(|| TensorShapeProto {
        dim: brackets(line).into_iter().map(dimension).collect(),
    });
    let elem_type = match words.get(2) {
        Some(&"float16") => elem_type::FLOAT16,
        Some(&"int64") => elem_type::INT64,
        Some(&"int32") => elem_type::INT32,
        Some(&"bool") => elem_type::BOOL,
        Some(_) => elem_type::FLOAT,
        None => 0,
    };
    let tensor_type = Some(TensorTypeProto { elem_type, shape });
    ValueInfoProto {
        name: words[1].into(),
        r#type: (elem_type != 0).then_some(TypeProto { tensor_type }),
    }
    .encode_to_vec()
}

/// `a, b = my::Op(x, _, y) axis=-1`
fn node(line: &str, graphs: &HashMap<String, Vec<u8>>) -> Vec<u8> {
    let (outputs, rest) = line.split_once('=').unwrap();
    let (op, rest) = rest.split_once('(').unwrap();
    let (inputs, attributes) = rest.split_once(')').unwrap();
    let (domain, op) = match op.trim().split_once("::") {
        Some((domain, op)) => (Some(domain.to_owned()), op),
        None => (None, op.trim()),
    };
    let names = |text: &str| {
        let names = list(text).into_iter();
        names
            .map(|n| if n == "_" { "" } else { n }.to_owned())
            .collect()
    };
    let output: Vec<String> = names(outputs);
    let mut attribute_list = Vec::new();
    let mut rest = attributes.trim();
    while let Some((name, after)) = rest.split_once('=') {
        let end = match after.strip_prefix('[') {
            Some(inside) => inside.find(']').unwrap() + 2,
            None => after.find(' ').unwrap_or(after.len()),
        };
        attribute_list.push(attribute(name.trim(), &after[..end], graphs).into());
        rest = after[end..].trim();
    }
    NodeProto {
        name: Some(format!(
            "node_{}",
            output.iter().find(|o| !o.is_empty()).map_or("", |o| o)
        )),
        input: names(inputs),
        output,
        op_type: Some(op.into()),
        domain,
        attribute: attribute_list,
        ..NodeProto::default()
    }
    .encode_to_vec()
}

fn attribute(name: &str, value: &str, graphs: &HashMap<String, Vec<u8>>) -> Vec<u8> {
    if let Some(graph) = value.strip_prefix('@') {
        return AttributeProto::graph(name, graphs[graph].clone().into()).encode_to_vec();
    }
    if let Some(reference) = value.strip_prefix('$') {
        let mut bytes = AttributeProto {
            name: name.into(),
            r#type: AttributeType::Int as i32,
            ..AttributeProto::default()
        }
        .encode_to_vec();
        put(&mut bytes, 21, Some(reference.as_bytes().to_vec()), None);
        return bytes;
    }
    if value.starts_with('[') {
        let ints = brackets(value).iter().map(|n| n.parse().unwrap()).collect();
        return AttributeProto::ints(name, ints).encode_to_vec();
    }
    if let Some(text) = value.strip_prefix('"') {
        return AttributeProto::string(name, text.trim_end_matches('"')).encode_to_vec();
    }
    match value.parse() {
        Ok(int) => AttributeProto::int(name, int),
        Err(_) => AttributeProto::float(name, value.parse().unwrap()),
    }
    .encode_to_vec()
}
