//! The patch of one layer: the module form wraps projections and attention in an `If`; the core form replaces
//! softmax(q·kᵀ)·v only.

use super::build::{self, Names};
use super::step::Step;
use super::{DOMAIN, LowerError};
use crate::find::{Core, Layer, Module, Operand, Survey};
use crate::onnx::{AttributeProto, Graph, Node, NodeProto, TensorProto, elem_type};
use crate::shapes::Fact;
use bytes::Bytes;
use prost::Message;
use std::collections::{BTreeSet, HashMap};

/// What to do for one layer.
pub struct Patch {
    /// Index of the node after whose place the new nodes go.
    pub position: usize,
    pub nodes: Vec<Bytes>,
    /// Nodes that leave the main graph for the branch.
    pub moved: BTreeSet<usize>,
    pub value_info: Vec<Bytes>,
}

pub fn build(
    graph: &Graph,
    survey: &Survey,
    layer: &Layer,
    step: &Step,
    names: &mut Names,
) -> Result<Patch, LowerError> {
    match &layer.module {
        Ok(module) => module_form(graph, survey, layer, module, step, names),
        Err(_) => Ok(core_form(graph, survey, layer, step, names)),
    }
}

/// What the names of this layer's new values and nodes begin with.
fn prefix(layer: &Layer) -> String {
    format!("dfa/layer_{}", layer.index)
}

fn position(graph: &Graph, value: &str) -> usize {
    graph.producer_index(value).map_or(0, |(index, _)| index)
}

fn annotated(graph: &Graph, value: &str) -> bool {
    graph.value_info.contains_key(value)
}

fn typed(mut fact: Fact, core: &Core) -> Fact {
    if fact.elem_type == 0 {
        fact.elem_type = core.elem_type;
    }
    fact
}

fn core_form(
    graph: &Graph,
    survey: &Survey,
    layer: &Layer,
    step: &Step,
    names: &mut Names,
) -> Patch {
    let core = &layer.core;
    let nodes = attention(layer, step, names, &HashMap::new());
    let mut value_info = Vec::new();
    if !annotated(graph, &core.out.value) && core.out.packed_heads.is_none() {
        value_info.push(build::value_info(
            &core.out.value,
            &typed(survey.facts.of(&core.out.value), core),
        ));
    }
    Patch {
        position: position(graph, &core.out.value),
        nodes,
        moved: BTreeSet::new(),
        value_info,
    }
}

/// The attention op itself, with the reshapes that packed heads need around it.
fn attention(
    layer: &Layer,
    step: &Step,
    names: &mut Names,
    renamed: &HashMap<String, String>,
) -> Vec<Bytes> {
    let core = &layer.core;
    let prefix = prefix(layer);
    let form = if layer.module.is_ok() {
        "module"
    } else {
        "core"
    };
    let name_here = |value: &String| renamed.get(value).unwrap_or(value).clone();
    let result = name_here(&core.out.value);
    let mut nodes = Vec::new();
    let mut operand = |operand: &Operand, role: &str| -> String {
        let value = name_here(&operand.value);
        let Some(heads) = operand.packed_heads else {
            return value;
        };
        let split = names.fresh(&format!("{prefix}/{role}_heads"));
        reshape(&mut nodes, names, &value, &split, &[0, 0, heads, -1]);
        split
    };
    let (q, k, v) = (
        operand(&core.q, "q"),
        operand(&core.k, "k"),
        operand(&core.v, "v"),
    );
    let out = match core.out.packed_heads {
        Some(_) => names.fresh(&format!("{prefix}/out_heads")),
        None => result.clone(),
    };
    let attributes = [
        AttributeProto::int("layer", layer.index as i64),
        AttributeProto::float("scale", core.scale.map_or(0.0, |s| s as f32)),
        AttributeProto::string("form", form),
        AttributeProto::string("q_layout", &core.q.layout),
        AttributeProto::string("k_layout", &core.k.layout),
        AttributeProto::string("v_layout", &core.v.layout),
        AttributeProto::string("o_layout", &core.out.layout),
    ];
    let name = names.fresh(&format!("{prefix}/attention"));
    nodes.push(build::node(
        DOMAIN,
        "DiTFastAttn",
        name,
        &[&q, &k, &v, &step.ticket],
        &[&out],
        &attributes,
    ));
    if core.out.packed_heads.is_some() {
        reshape(&mut nodes, names, &out, &result, &[0, 0, -1]);
    }
    nodes
}

fn reshape(nodes: &mut Vec<Bytes>, names: &mut Names, input: &str, output: &str, target: &[i64]) {
    let shape = constant(nodes, names, output, target);
    let name = names.fresh(&format!("{output}/reshape"));
    nodes.push(build::node(
        "",
        "Reshape",
        name,
        &[input, &shape],
        &[output],
        &[],
    ));
}

/// A `Constant` node with a shape vector; returns the value's name.
fn constant(nodes: &mut Vec<Bytes>, names: &mut Names, near: &str, values: &[i64]) -> String {
    let value = names.fresh(&format!("{near}/shape"));
    let raw: Vec<u8> = values.iter().flat_map(|i| i.to_le_bytes()).collect();
    let tensor = TensorProto {
        dims: vec![values.len() as i64],
        data_type: elem_type::INT64,
        raw_data: Some(raw.into()),
        ..TensorProto::default()
    };
    let name = names.fresh(&format!("{value}/constant"));
    nodes.push(build::node(
        "",
        "Constant",
        name,
        &[],
        &[&value],
        &[AttributeProto::tensor("value", &tensor)],
    ));
    value
}

fn module_form(
    graph: &Graph,
    survey: &Survey,
    layer: &Layer,
    module: &Module,
    step: &Step,
    names: &mut Names,
) -> Result<Patch, LowerError> {
    let core = &layer.core;
    let facts = &survey.facts;
    let prefix = prefix(layer);
    let own = AttributeProto::int("layer", layer.index as i64);
    let own = std::slice::from_ref(&own);

    // Inside, the source is the selected rows, the sink is not yet doubled, and duplicates need names of their own.
    let selected = names.fresh(&format!("{prefix}/selected"));
    let computed = names.fresh(&format!("{prefix}/computed"));
    let mut renamed = HashMap::from([
        (module.source.clone(), selected.clone()),
        (module.sink.clone(), computed.clone()),
    ]);
    for &index in &module.duplicated {
        for output in &graph.nodes[index].proto.output {
            if !output.is_empty() && *output != module.sink {
                renamed.insert(output.clone(), names.fresh(&format!("{prefix}/{output}")));
            }
        }
    }

    let select = names.fresh(&format!("{prefix}/select"));
    let mut nodes = vec![build::node(
        DOMAIN,
        "DiTFastAttnSelect",
        select,
        &[&module.source, &step.ticket],
        &[&selected],
        own,
    )];
    let op_at = position(graph, &core.out.value);
    let result = renamed
        .get(&core.out.value)
        .unwrap_or(&core.out.value)
        .clone();
    let mut attended = false;
    for &index in &module.inside {
        if index > op_at && !attended {
            nodes.extend(attention(layer, step, names, &renamed));
            attended = true;
        }
        let target = module
            .reshaped
            .get(&index)
            .map(|t| constant(&mut nodes, names, &prefix, t));
        let duplicate = module.duplicated.contains(&index);
        nodes.push(moved_node(
            &graph.nodes[index],
            &renamed,
            target,
            duplicate.then_some((names as &mut Names, prefix.as_str())),
        )?);
    }
    if !attended {
        nodes.extend(attention(layer, step, names, &renamed));
    }
    let computed_else = names.fresh(&format!("{prefix}/shared"));
    let share = names.fresh(&format!("{prefix}/share"));
    nodes.push(build::node(
        DOMAIN,
        "DiTFastAttnShare",
        share,
        &[&computed, &step.ticket],
        &[&computed_else],
        own,
    ));

    let sink = typed(facts.of(&module.sink), core);
    let selected_fact = typed(facts.of(&module.source), core);
    let out_fact = typed(facts.of(&core.out.value), core);
    let mut inner_info = vec![build::value_info(&selected, &selected_fact)];
    if core.out.packed_heads.is_none() && result != computed {
        inner_info.push(build::value_info(&result, &out_fact));
    }
    let full = build::branch(
        format!("{prefix}/compute"),
        nodes,
        build::value_info(&computed_else, &sink),
        inner_info,
    );

    let reused = names.fresh(&format!("{prefix}/reused"));
    let reuse = names.fresh(&format!("{prefix}/reuse"));
    let reuse = build::node(
        DOMAIN,
        "DiTFastAttnReuse",
        reuse,
        &[&module.source, &step.ticket],
        &[&reused],
        own,
    );
    let cached = build::branch(
        format!("{prefix}/cached"),
        vec![reuse],
        build::value_info(&reused, &sink),
        Vec::new(),
    );

    let branches = [
        AttributeProto::graph("then_branch", cached),
        AttributeProto::graph("else_branch", full),
    ];
    let name = names.fresh(&format!("{prefix}/if"));
    let node = build::node(
        "",
        "If",
        name,
        &[&step.skip[layer.index]],
        &[&module.sink],
        &branches,
    );
    let mut value_info = Vec::new();
    if !annotated(graph, &module.sink) {
        value_info.push(build::value_info(&module.sink, &sink));
    }
    let moved = module
        .inside
        .difference(&module.duplicated)
        .copied()
        .collect();
    Ok(Patch {
        position: position(graph, &module.sink),
        nodes: vec![node],
        moved,
        value_info,
    })
}

/// `node` as it stands inside the branch: the exporter's own bytes unless a name in it changes.
fn moved_node(
    node: &Node,
    renamed: &HashMap<String, String>,
    target: Option<String>,
    duplicate: Option<(&mut Names, &str)>,
) -> Result<Bytes, LowerError> {
    let touched = node
        .proto
        .input
        .iter()
        .chain(&node.proto.output)
        .any(|n| renamed.contains_key(n));
    if !touched && target.is_none() {
        return Ok(node.raw.clone());
    }
    if !NodeProto::is_fully_known(&node.raw) {
        return Err(LowerError::UnknownFields {
            node: node.label().into(),
        });
    }
    let mut proto = node.proto.clone();
    for name in proto.input.iter_mut().chain(&mut proto.output) {
        if let Some(new) = renamed.get(name) {
            name.clone_from(new);
        }
    }
    if let Some(target) = target {
        proto.input[1] = target;
    }
    if let (Some((names, prefix)), Some(name)) = (duplicate, &mut proto.name)
        && !name.is_empty()
    {
        *name = names.fresh(&format!("{prefix}/{name}"));
    }
    Ok(proto.encode_to_vec().into())
}
