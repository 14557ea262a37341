//! Lowering: from what was found to a patch of the graph. One patch per layer, applied together.
//!
//! Knows the ops' graph contract (names, inputs, attributes) and nothing about exporters' dialects. What a patch does
//! not mention keeps its bytes.

mod build;
mod layer;
mod step;

use crate::find::{Survey, dead_without};
use crate::onnx::{GraphEdit, ModelFile};
use build::Names;
use bytes::Bytes;
use ditfastattn_plans::Plan;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// The custom ops' domain and its version.
pub const DOMAIN: &str = "ai.ditfastattn";
pub const DOMAIN_VERSION: i64 = 1;

/// How the optional request inputs are declared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RequestInputs {
    /// Graph inputs with a default: clients that do not know them need not feed them.
    #[default]
    Optional,
    /// Ordinary inputs that every run must feed, as Triton's sequence batcher does.
    Required,
}

/// Why a model and a plan do not go together. Nothing has been written.
#[derive(Debug, thiserror::Error)]
pub enum LowerError {
    #[error(
        "the model is already rewritten: it imports the domain {DOMAIN}; rewrite the original model instead"
    )]
    AlreadyRewritten,
    #[error(
        "nothing to rewrite: no self-attention layer of a diffusion transformer was found in {sites} attention site(s); `dfa-rewrite inspect` lists each with the reason"
    )]
    NothingToRewrite { sites: usize },
    #[error(
        "the plan does not fit: {key} is {plan} in the plan and {model} in the model; use a plan made for this model (`dfa-rewrite inspect` shows its layers)"
    )]
    PlanDoesNotFit {
        key: &'static str,
        plan: usize,
        model: usize,
    },
    #[error(
        "layer {layer} ({node}) is joint attention over text and image tokens, and the plan does not say how many are text: add \"text\": {{\"tokens\": …, \"side\": \"start\" or \"end\"}} to the plan"
    )]
    TextUnknown { layer: usize, node: String },
    #[error(
        "the model already has a value called `{name}`, which the rewritten model needs as an input; rename it"
    )]
    NameTaken { name: String },
    #[error(
        "node `{node}` has fields that this version does not know, so it cannot be moved without losing them; please report it with the exporter's version"
    )]
    UnknownFields { node: String },
    #[error(
        "the model's IR version is {found}; default values for the request inputs need 4 or later: use --request-inputs required, or convert the model"
    )]
    IrTooOld { found: i64 },
}

/// The form a layer got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Module,
    Core,
}

/// The rewritten model, ready to be written.
pub struct Lowered {
    pub pieces: Vec<Bytes>,
    pub forms: Vec<Form>,
}

/// Rewrites `model` for `plan`.
///
/// # Errors
/// See [`LowerError`]; the model itself is never changed.
pub fn lower(
    model: &ModelFile,
    survey: &Survey,
    plan: &Plan,
    request: RequestInputs,
) -> Result<Lowered, LowerError> {
    refuse_rewritten(model)?;
    check_fit(survey, plan)?;
    if request == RequestInputs::Optional && model.ir_version < 4 {
        return Err(LowerError::IrTooOld {
            found: model.ir_version,
        });
    }
    let graph = &model.graph;
    let mut names = Names::new(graph);
    let step = step::build(survey, plan, request, &mut names)?;
    let mut edit = GraphEdit::default();
    let mut insert: BTreeMap<usize, Vec<Bytes>> = BTreeMap::new();
    let mut moved = BTreeSet::new();
    let mut dead = BTreeSet::new();
    let mut kept: HashSet<&str> = HashSet::new();
    let mut forms = Vec::new();
    for layer in survey.layers() {
        let patch = layer::build(graph, survey, layer, &step, &mut names)?;
        insert
            .entry(patch.position)
            .or_default()
            .extend(patch.nodes);
        edit.added_value_info.extend(patch.value_info);
        moved.extend(patch.moved);
        dead.extend(dead_without(graph, &layer.core));
        let core = &layer.core;
        kept.extend([&core.q.value, &core.k.value, &core.v.value].map(String::as_str));
        forms.push(if layer.module.is_ok() {
            Form::Module
        } else {
            Form::Core
        });
    }
    // A constant shared by several layers dies only once all its users have.
    crate::find::sweep_dead(graph, &mut dead, &kept, &step.replaced_constants(survey));
    let mut nodes = vec![step.node];
    for (index, node) in graph.nodes.iter().enumerate() {
        if !moved.contains(&index) && !dead.contains(&index) {
            nodes.push(node.raw.clone());
        }
        nodes.extend(insert.remove(&index).unwrap_or_default());
    }
    edit.nodes = Some(nodes);
    edit.added_inputs = step.inputs;
    edit.added_initializers = step.initializers;
    edit.added_value_info.extend(step.value_info);
    for &index in moved.iter().chain(&dead) {
        // Annotations of moved values carry the exporter's batch, which is wrong under ASC.
        let outputs = graph.nodes[index].proto.output.iter();
        edit.removed_value_info
            .extend(outputs.filter(|o| !survives(survey, o)).cloned());
    }
    edit.removed_initializers = unused_initializers(model, &moved, &dead, survey);
    let metadata = metadata(plan);
    let pieces = model.serialize(&edit, Some((DOMAIN, DOMAIN_VERSION)), &metadata);
    Ok(Lowered { pieces, forms })
}

/// Values that keep their name and place although their producer moved: the modules' results.
fn survives(survey: &Survey, value: &str) -> bool {
    survey.layers().any(|l| match &l.module {
        Ok(module) => module.sink == value,
        Err(_) => l.core.out.value == value,
    })
}

fn refuse_rewritten(model: &ModelFile) -> Result<(), LowerError> {
    let imported = model.opset_imports.iter().any(|(d, _)| d == DOMAIN);
    let used = model.graph.nodes.iter().any(|n| n.domain() == DOMAIN);
    if imported || used {
        Err(LowerError::AlreadyRewritten)
    } else {
        Ok(())
    }
}

/// Whether `plan` was made for a model like this one.
///
/// # Errors
/// Nothing to rewrite, or the first number on which they disagree.
pub fn check_fit(survey: &Survey, plan: &Plan) -> Result<(), LowerError> {
    let layers = survey.layers().count();
    if layers == 0 {
        return Err(LowerError::NothingToRewrite {
            sites: survey.sites.len(),
        });
    }
    if layers != plan.layers() {
        return Err(LowerError::PlanDoesNotFit {
            key: "layers",
            plan: plan.layers(),
            model: layers,
        });
    }
    if let Some(expected) = &plan.model
        && let Some((key, plan, model)) = expected.mismatch(&survey.fingerprint())
    {
        return Err(LowerError::PlanDoesNotFit { key, plan, model });
    }
    if plan.text.is_none()
        && let Some(joint) = survey.layers().find(|l| l.joint)
    {
        let node = survey.label(joint);
        return Err(LowerError::TextUnknown {
            layer: joint.index,
            node,
        });
    }
    Ok(())
}

/// Initializers that only dead nodes used.
fn unused_initializers(
    model: &ModelFile,
    moved: &BTreeSet<usize>,
    dead: &BTreeSet<usize>,
    survey: &Survey,
) -> HashSet<String> {
    let graph = &model.graph;
    let reshaped: BTreeSet<usize> = survey
        .layers()
        .filter_map(|l| l.module.as_ref().ok())
        .flat_map(|m| m.reshaped.keys().copied())
        .collect();
    dead.iter()
        .chain(&reshaped)
        .flat_map(|&i| graph.nodes[i].proto.input.iter())
        .filter(|name| {
            graph.initializers.contains_key(*name) && !graph.inputs.iter().any(|i| i.name == **name)
        })
        .filter(|name| {
            let needed = |&user: &usize| {
                let only_as_target =
                    reshaped.contains(&user) && graph.nodes[user].input(0) != Some(name.as_str());
                !(dead.contains(&user) || (moved.contains(&user) && only_as_target))
            };
            !graph.is_output(name) && !graph.consumers(name).iter().any(needed)
        })
        .cloned()
        .collect()
}

/// What tools can read off the file: who wrote it, and the plan itself.
fn metadata(plan: &Plan) -> Vec<(String, String)> {
    let json = plan.to_json();
    let digest = Sha256::digest(json.as_bytes());
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    vec![
        (
            "ditfastattn.version".into(),
            env!("CARGO_PKG_VERSION").into(),
        ),
        ("ditfastattn.plan_sha256".into(), hex),
        ("ditfastattn.plan".into(), json),
    ]
}
