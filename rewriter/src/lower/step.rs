//! The step op: one per model, in front of everything, with the inputs that say whose step it is.

use super::build::{self, Names};
use super::io::Io;
use super::{DOMAIN, LowerError, RequestInputs};
use crate::find::{Survey, Target};
use crate::onnx::{AttributeProto, TensorProto, elem_type};
use crate::shapes::Fact;
use bytes::Bytes;
use ditfastattn_plans::Plan;
use prost::Message;
use std::collections::BTreeMap;

/// Version of the ops' graph contract; the library refuses a model of another version.
const CONTRACT: i64 = 1;

/// The nodes in front of everything, what they add to the graph, and the names that layers read.
pub struct Step {
    pub nodes: Vec<Bytes>,
    pub ticket: String,
    /// Per layer: whether AST serves it from the cache.
    pub skip: Vec<String>,
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

/// Builds the step node for `plan`.
///
/// # Errors
/// [`LowerError::NameTaken`] if the model has a value with the name of a request input.
pub fn build(
    survey: &Survey,
    plan: &Plan,
    request: RequestInputs,
    names: &mut Names,
) -> Result<Step, LowerError> {
    let mut inputs = Vec::new();
    let mut initializers = Vec::new();
    for (name, ty) in [
        ("dfa_request_id", elem_type::INT64),
        ("dfa_start", elem_type::BOOL),
        ("dfa_end", elem_type::BOOL),
    ] {
        if !names.claim(name) {
            return Err(LowerError::NameTaken { name: name.into() });
        }
        // Servers feed [], [1] or [1, 1]. ONNX Runtime checks no fed shape against a declared scalar, and the ONNX checker
        // insists on a shape, so a scalar is the one declaration that all of them pass.
        inputs.push(build::value_info(name, &Fact::of(ty, Some(vec![]))));
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
    let watched = [
        survey.inputs.timestep.as_str(),
        "dfa_request_id",
        "dfa_start",
        "dfa_end",
        survey.inputs.latents.as_str(),
    ];
    let all_inputs: Vec<&str> = watched
        .into_iter()
        .chain(survey.inputs.conditioning.iter().map(String::as_str))
        .collect();
    let outputs: Vec<&str> = std::iter::once(ticket.as_str())
        .chain(skip.iter().map(String::as_str))
        .collect();
    let core_layers: Vec<i64> = survey
        .layers()
        .filter(|l| l.module.is_err())
        .map(|l| l.index as i64)
        .collect();
    let mut attributes = vec![
        AttributeProto::int("contract", CONTRACT),
        AttributeProto::int("layers", skip.len() as i64),
        AttributeProto::string("plan", &plan.to_json()),
    ];
    if !core_layers.is_empty() {
        attributes.push(AttributeProto::ints("core_layers", core_layers));
    }
    let node = build::node(
        DOMAIN,
        "DiTFastAttnStep",
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
            .map(|s| build::value_info(s, &Fact::of(elem_type::BOOL, Some(vec![])))),
    );
    Ok(Step {
        nodes: vec![node],
        ticket,
        skip,
        inputs,
        outputs: Vec::new(),
        initializers,
        value_info,
        io: None,
    })
}
