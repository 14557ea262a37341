//! The step op: one per model, in front of everything, with the inputs that say whose step it is.

use super::build::{self, Names};
use super::explicit_state::Io;
use super::{DOMAIN, LowerError, RequestInputs, Schedule};
use crate::find::{Survey, Target, Watched};
use crate::onnx::{AttributeProto, Graph, TensorProto, elem_type};
use crate::shapes::Fact;
use bytes::Bytes;
use ditfastattn_contract::attributes::{self, step};
use ditfastattn_contract::operators::STEP;
use ditfastattn_contract::{graph, version};
use ditfastattn_plans::{Plan, PlanError};
use prost::Message;
use std::collections::BTreeMap;

/// The nodes in front of everything, what they add to the graph, and the names that layers read.
pub struct Step {
    pub nodes: Vec<Bytes>,
    pub ticket: String,
    /// Per layer: whether AST serves it from the cache.
    pub skip: Vec<String>,
    /// Whether the host computes its attention, of layers where it can.
    pub dense: BTreeMap<usize, String>,
    pub inputs: Vec<Bytes>,
    pub outputs: Vec<Bytes>,
    pub initializers: Vec<Bytes>,
    pub value_info: Vec<Bytes>,
    /// The state of a graph that carries it.
    pub io: Option<Io>,
}

impl Step {
    /// Nodes that get other shapes than they were exported with.
    pub fn retargeted(&self, survey: &Survey) -> BTreeMap<usize, Target> {
        survey
            .layers()
            .filter_map(|l| l.module.as_ref().ok())
            .flat_map(|m| m.retargeted.iter().map(|(&i, t)| (i, t.clone())))
            .collect()
    }
}

/// The plan in a graph that was rewritten with hidden state; `None` if it was not.
pub fn plan_in(graph: &Graph) -> Option<Result<Plan, PlanError>> {
    let mut nodes = graph.nodes.iter();
    let step = nodes.find(|n| {
        n.op() == STEP.as_str()
            && n.domain() == DOMAIN
            && n.attribute(attributes::state::STATE).is_none()
    })?;
    let plan = step.attribute(step::PLAN)?.s.as_ref()?;
    Some(Plan::parse_bytes(plan))
}

/// Builds the step node for `plan`.
///
/// # Errors
/// [`LowerError::NameTaken`] if the model has a value with the name of a request input.
pub fn build(
    survey: &Survey,
    plan: &Plan,
    (request, schedule): (RequestInputs, Schedule),
    watched: &Watched,
    dense_layers: &[usize],
    names: &mut Names,
) -> Result<Step, LowerError> {
    let mut inputs = Vec::new();
    let mut initializers = Vec::new();
    for (name, ty) in [
        (graph::REQUEST_ID, elem_type::INT64),
        (graph::START, elem_type::BOOL),
        (graph::END, elem_type::BOOL),
    ] {
        if !names.claim(name) {
            return Err(LowerError::NameTaken { name: name.into() });
        }
        // Servers feed [], [1] or [1, 1]. ONNX Runtime checks no fed shape against a declared scalar, and the ONNX checker
        // insists on a shape, so a scalar is the one declaration that all of them pass.
        let shape = match request {
            RequestInputs::Triton => vec![1.into()],
            RequestInputs::Optional | RequestInputs::Required => vec![],
        };
        inputs.push(build::value_info(name, &Fact::of(ty, Some(shape))));
        if request == RequestInputs::Optional {
            let raw = vec![0; if ty == elem_type::INT64 { 8 } else { 1 }];
            let tensor = TensorProto {
                name: name.into(),
                data_type: ty,
                raw_data: Some(raw.into()),
                ..TensorProto::default()
            };
            initializers.push(tensor.encode_to_vec().into());
        }
    }
    let ticket = names.fresh("dfa/ticket");
    let skip: Vec<String> = survey
        .layers()
        .map(|l| names.fresh(&format!("dfa/layer_{}/skip", l.index)))
        .collect();
    let dense: BTreeMap<usize, String> = dense_layers
        .iter()
        .map(|&l| (l, names.fresh(&format!("dfa/layer_{l}/dense"))))
        .collect();
    let roles = [
        survey.inputs.timestep.as_str(),
        graph::REQUEST_ID,
        graph::START,
        graph::END,
        survey.inputs.latents.as_str(),
    ];
    let all_inputs: Vec<&str> = roles
        .into_iter()
        .chain(watched.names.iter().map(String::as_str))
        .collect();
    let outputs: Vec<&str> = std::iter::once(ticket.as_str())
        .chain(skip.iter().chain(dense.values()).map(String::as_str))
        .collect();
    let core_layers: Vec<i64> = survey
        .layers()
        .filter(|l| l.module.is_err())
        .map(|l| l.index as i64)
        .collect();
    let blind = !watched.hidden.is_empty();
    let contract = match () {
        () if blind || schedule == Schedule::Any => version::WITH_SCHEDULE,
        () if !dense.is_empty() => version::WITH_DENSE,
        () => version::FIRST,
    };
    let mut attributes = vec![
        AttributeProto::int(attributes::CONTRACT, contract),
        AttributeProto::int(step::LAYERS, skip.len() as i64),
        AttributeProto::string(step::PLAN, &plan.to_json()),
    ];
    if !survey.facts.pairs().is_empty() {
        attributes.push(AttributeProto::int(step::HALVES_IN_GRAPH, 1));
    }
    if !core_layers.is_empty() {
        attributes.push(AttributeProto::ints(step::CORE_LAYERS, core_layers));
    }
    if !dense.is_empty() {
        let layers = dense.keys().map(|&l| l as i64).collect();
        attributes.push(AttributeProto::ints(step::DENSE_LAYERS, layers));
    }
    if schedule == Schedule::Any {
        attributes.push(AttributeProto::string(step::SCHEDULE, step::SCHEDULE_ANY));
    }
    if blind {
        // An operator is shown tensors only: nothing can tell anonymous clients apart that differ in another input.
        attributes.push(AttributeProto::int(step::BLIND, 1));
    }
    let node = build::node(
        DOMAIN,
        STEP.as_str(),
        names.fresh("dfa/step"),
        &all_inputs,
        &outputs,
        &attributes,
    );
    let mut value_info = vec![build::value_info(
        &ticket,
        &Fact::of(elem_type::INT64, Some(vec![2.into()])),
    )];
    value_info.extend(
        skip.iter()
            .chain(dense.values())
            .map(|name| build::value_info(name, &Fact::of(elem_type::BOOL, Some(vec![])))),
    );
    Ok(Step {
        nodes: vec![node],
        ticket,
        skip,
        dense,
        inputs,
        outputs: Vec::new(),
        initializers,
        value_info,
        io: None,
    })
}
