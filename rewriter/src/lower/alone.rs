//! The exported model with each token alone: in place of every attention's result stand its values, so that no layer mixes tokens.
//!
//! What a token depends on by itself shows when such a model runs. Owns that exchange, and which part of the model it takes;
//! reads nothing off the result.

use super::attention::Attention;
use super::build::{Names, Writer};
use super::order;
use super::text::TextTokens;
use crate::find::{Core, Layer, Prep, Reason, Survey};
use crate::onnx::{AttributeProto, Graph, GraphEdit, ModelFile, ValueInfoProto};
use prost::Message;
use std::collections::{BTreeSet, HashMap, HashSet};

/// The part of `model` that computes `outputs` where the attention of all `layers` shows each token itself only.
///
/// # Errors
/// An attention whose values do not take the place of its result.
pub fn alone(
    model: &ModelFile,
    survey: &Survey,
    layers: &[&Layer],
    outputs: &[String],
) -> Result<Vec<u8>, Reason> {
    let graph = &model.graph;
    let mut names = Names::new(graph);
    let mut w = Writer::new(&mut names);
    let mut replaced = HashSet::new();
    for layer in layers {
        let core = &layer.core;
        replaced.extend(graph.producer_index(&core.out.value).map(|(node, _)| node));
        let label = graph.nodes[core.anchor].label();
        own_values(&mut w, survey, layer).map_err(|why| {
            Reason::new(format!("its values cannot be its result: {why}"), [label])
        })?;
    }
    let kept = graph.nodes.iter().enumerate();
    let kept = kept.filter(|(index, _)| !replaced.contains(index));
    let mut nodes = w.nodes;
    nodes.splice(0..0, kept.map(|(_, node)| node.raw.clone()));
    let edit = GraphEdit {
        nodes: Some(order::topological(nodes)),
        ..GraphEdit::default()
    };
    let bytes = model.serialize(&edit, None, &[]).concat();
    let whole = ModelFile::parse(&model.path, bytes.into())
        .map_err(|e| Reason::new(e.to_string(), [""; 0]))?;
    let nodes = needed(&whole.graph, outputs);
    Ok(whole.part(&nodes, &inputs(&whole.graph, &nodes), outputs))
}

/// Writes the values of `layer` in the layout of its result, under the result's name.
fn own_values(w: &mut Writer<'_>, survey: &Survey, layer: &Layer) -> Result<(), &'static str> {
    let core = &layer.core;
    let near = format!("alone/{}", core.anchor);
    let attention = Attention {
        survey,
        layer,
        ticket: "",
        text: &TextTokens::Never,
        io: None,
        prefix: &near,
        renamed: &HashMap::new(),
    };
    let at = attention.operand(w, &core.v, "v", &mut HashMap::new());
    let (at, layout) = all_heads(w, &near, core, at);
    let at = laid_out(w, &near, core, at, layout)?;
    let result = &core.out.value;
    match core.out.prep.as_slice() {
        [Prep::SplitHeads(_)] => {
            let shape = w.ints(&near, &[0, 0, -1]);
            w.push_as("Reshape", result, &[&at, &shape], &[]);
        }
        _ => w.push_as("Identity", result, &[&at], &[]),
    }
    Ok(())
}

/// A head of values for each head of queries, and its layout.
fn all_heads(w: &mut Writer<'_>, near: &str, core: &Core, at: String) -> (String, String) {
    let layout = core.v.layout.clone();
    let (Some(heads), Some(own), Some(axis)) = (core.heads, core.kv_heads, layout.find('H')) else {
        return (at, layout);
    };
    if heads == own {
        return (at, layout);
    }
    let shared: Vec<i64> = (0..heads).map(|head| head * own / heads).collect();
    let (shared, axis) = (
        w.ints(near, &shared),
        AttributeProto::int("axis", axis as i64),
    );
    (w.push("Gather", near, &[&at, &shared], &[axis]), layout)
}

/// `at`, which has the axes `layout`, with those of the result. Batch and heads may be one axis in either.
fn laid_out(
    w: &mut Writer<'_>,
    near: &str,
    core: &Core,
    at: String,
    layout: String,
) -> Result<String, &'static str> {
    let to = core.out.layout.as_str();
    let sizes = |w: &mut Writer<'_>, at: &str, axes: [i64; 2]| {
        let (shape, axes) = (w.push("Shape", near, &[at], &[]), w.ints(near, &axes));
        w.push("Gather", near, &[&shape, &axes], &[])
    };
    let reshaped = |w: &mut Writer<'_>, at: &str, first: &[i64], rest: String| {
        let (first, axis) = (w.ints(near, first), AttributeProto::int("axis", 0));
        let shape = w.push("Concat", near, &[&first, &rest], &[axis]);
        w.push("Reshape", near, &[at, &shape], &[])
    };
    match (layout.len(), to.len()) {
        (from, to_rank) if from == to_rank => transposed(w, near, at, &layout, to),
        (4, 3) => {
            let at = transposed(w, near, at, &layout, &format!("BH{}", &to[1..]))?;
            let rest = sizes(w, &at, [2, 3]);
            Ok(reshaped(w, &at, &[-1], rest))
        }
        (3, 4) => {
            let heads = core.heads.ok_or("the number of its heads is not known")?;
            let rest = sizes(w, &at, [1, 2]);
            let at = reshaped(w, &at, &[-1, heads], rest);
            transposed(w, near, at, &format!("BH{}", &layout[1..]), to)
        }
        _ => Err("its axes are not known"),
    }
}

fn transposed(
    w: &mut Writer<'_>,
    near: &str,
    at: String,
    from: &str,
    to: &str,
) -> Result<String, &'static str> {
    if from == to {
        return Ok(at);
    }
    let axes = to.chars().map(|letter| Some(from.find(letter)? as i64));
    let perm: Option<Vec<i64>> = axes.collect();
    let perm = perm.ok_or("its axes are others than those of the result")?;
    let perm = AttributeProto::ints("perm", perm);
    Ok(w.push("Transpose", near, &[&at], &[perm]))
}

/// The nodes that `outputs` are computed by, in order.
fn needed(graph: &Graph, outputs: &[String]) -> Vec<usize> {
    let mut needed = BTreeSet::new();
    let mut open: Vec<&str> = outputs.iter().map(String::as_str).collect();
    while let Some(value) = open.pop() {
        if let Some((index, _)) = graph.producer_index(value)
            && needed.insert(index)
        {
            let node = &graph.nodes[index];
            open.extend(
                node.proto
                    .input
                    .iter()
                    .chain(&node.captured)
                    .map(String::as_str),
            );
        }
    }
    needed.into_iter().collect()
}

/// Declarations of the inputs that `nodes` read.
fn inputs(graph: &Graph, nodes: &[usize]) -> Vec<bytes::Bytes> {
    let read: HashSet<&String> = nodes
        .iter()
        .map(|&index| &graph.nodes[index])
        .flat_map(|node| node.proto.input.iter().chain(&node.captured))
        .collect();
    let fed = graph.inputs.iter();
    let fed = fed.filter(|input| !input.has_default && read.contains(&input.name));
    fed.map(|input| {
        let sizes = input.dims.as_ref();
        let sizes = sizes.map(|dims| dims.iter().map(|d| d.clone().ok()).collect());
        let declared = ValueInfoProto::tensor(&input.name, input.elem_type, sizes);
        declared.encode_to_vec().into()
    })
    .collect()
}
