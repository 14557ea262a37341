//! Lowering: from what was found to a patch of the graph. One patch per layer, applied together.
//!
//! Knows the ops' graph contract (names, inputs, attributes) and nothing about exporters' dialects. What a patch does
//! not mention keeps its bytes.

mod alone;
mod attention;
mod build;
mod dense;
mod explicit_state;
mod layer;
mod order;
mod outputs;
#[cfg(test)]
mod small_models;
mod step;
mod text;

use crate::digest::sha256;
use crate::find::{Kind, Layer, Reason, Survey, Target, Watched, dead_without};
use crate::onnx::{GraphEdit, ModelFile, elem_type};
use crate::shapes::Dim;
use build::{Names, Writer};
use bytes::Bytes;
use ditfastattn_contract::attributes::state::STATE_IO;
use ditfastattn_contract::operators::DOMAIN_VERSION;
use ditfastattn_contract::{metadata as metadata_keys, operators};
use ditfastattn_plans::{Action, Cfg, Plan};
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// The custom ops' domain.
pub const DOMAIN: &str = operators::DOMAIN.as_str();

pub use alone::alone;
pub use dense::Dense;
pub use explicit_state::{LayerState, directive, directives, sinks};
pub use outputs::known_type;
pub use step::plan_in;
pub use text::{TextTokens, Texts};

/// How the optional request inputs are declared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RequestInputs {
    /// Graph inputs with a default: clients that do not know them need not feed them.
    #[default]
    Optional,
    /// Ordinary inputs that every run must feed, in any shape of one element.
    Required,
    /// Ordinary inputs of shape `[1]`: the only shape that Triton's ONNX Runtime backend takes as a sequence control. Outputs
    /// are declared with all that is known of their sizes, since the backend compares those with its configuration.
    Triton,
}

/// Which timesteps the plan serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Schedule {
    /// Those in its list; others are computed densely.
    #[default]
    Planned,
    /// Any over the same range: a value that is not in the list takes the row of the planned one before it.
    Any,
}

/// How layers with explicit state are told what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectiveSource {
    /// The input `dfa_step` (int64, one number): the step's place in the plan, which the graph holds.
    Step,
    /// The input `dfa_directives` (int64, one number per layer, see [`directives`]): the plan stays with the caller.
    Directives,
}

/// Where layers remember what they leave for later steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// In the library, per request.
    Hidden(RequestInputs),
    /// In inputs `past.…` and outputs `present.…` of the graph: no hidden memory at all.
    Io(DirectiveSource),
}

impl From<RequestInputs> for State {
    fn from(request: RequestInputs) -> Self {
        Self::Hidden(request)
    }
}

/// Why a model and a plan do not go together. Nothing has been written.
#[derive(Debug, thiserror::Error)]
pub enum LowerError {
    #[error(
        "the model is already rewritten: it has nodes of the domain {DOMAIN}; rewrite the original model instead"
    )]
    AlreadyRewritten,
    #[error(
        "nothing to rewrite: no self-attention layer of a diffusion transformer was found in {sites} attention site(s){reasons}; `dfa-rewrite inspect` lists each"
    )]
    NothingToRewrite { sites: usize, reasons: String },
    #[error(
        "the plan does not fit: {key} is {plan} in the plan and {model} in the model; use a plan made for this model (`dfa-rewrite inspect` shows its layers)"
    )]
    PlanDoesNotFit {
        key: &'static str,
        plan: usize,
        model: usize,
    },
    #[error(
        "layer {layer} ({node}): {why}; add \"text\": {{\"tokens\": …, \"side\": \"start\" or \"end\"}} to the plan, or leave the layer out with --skip {layer}"
    )]
    TextUnknown {
        layer: usize,
        node: String,
        why: String,
    },
    #[error(
        "layer {layer} ({node}) cannot be shared across guidance: {why}; use a plan without asc for it, or leave the layer out with --skip"
    )]
    NoHalves {
        layer: usize,
        node: String,
        why: String,
    },
    #[error(
        "layer {layer} ({node}) reads {read} and gives {given}; with --state io a layer in the core form must give what it reads: leave it out with --skip {layer}"
    )]
    MixedTypes {
        layer: usize,
        node: String,
        read: &'static str,
        given: &'static str,
    },
    #[error(
        "layer {layer} ({node}) cannot have windows: it has {queries} query tokens and {keys} key tokens, and a window needs equally many; use a plan without wa-rs for it, or leave the layer out with --skip {layer}"
    )]
    NoWindow {
        layer: usize,
        node: String,
        queries: String,
        keys: String,
    },
    #[error(
        "the model already has a value called `{name}`, which the rewritten model needs as an input; rename it"
    )]
    NameTaken { name: String },
    #[error(
        "node `{node}` has fields that this version does not know, so it cannot be moved without losing them; please report it with the exporter's version"
    )]
    UnknownFields { node: String },
    #[error(
        "--schedule any: {why}; use a plan whose `timesteps` go one way, or --schedule planned"
    )]
    NoSchedule { why: String },
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
    /// Per layer the value that says whether it is served from the cache.
    pub skip: Vec<String>,
    /// Layers whose attention the host computes at steps that stay dense.
    pub dense: Vec<usize>,
    /// Per layer the names of its state, where the graph carries it.
    pub state: Vec<LayerState>,
}

/// Rewrites `model` for `plan`; the op computes all attention.
///
/// # Errors
/// See [`LowerError`]; the model itself is never changed.
pub fn lower(
    model: &ModelFile,
    survey: &Survey,
    plan: &Plan,
    state: impl Into<State>,
) -> Result<Lowered, LowerError> {
    let (dense, schedule) = (Dense::Library, Schedule::Planned);
    lower_with(model, survey, plan, state.into(), dense, schedule)
}

/// Rewrites `model` for `plan`. Where the graph carries the state, `dense` and `schedule` make no difference: the op always has R
/// to hand on, and the caller says which row a step has.
///
/// # Errors
/// See [`LowerError`]; the model itself is never changed.
pub fn lower_with(
    model: &ModelFile,
    survey: &Survey,
    plan: &Plan,
    state: State,
    dense: Dense,
    schedule: Schedule,
) -> Result<Lowered, LowerError> {
    refuse_rewritten(model)?;
    check_fit(survey, plan)?;
    if schedule == Schedule::Any {
        plan.one_way()
            .map_err(|why| LowerError::NoSchedule { why })?;
    }
    if state == State::Hidden(RequestInputs::Optional) && model.ir_version < 4 {
        return Err(LowerError::IrTooOld {
            found: model.ir_version,
        });
    }
    if matches!(state, State::Io(_)) {
        check_types(survey)?;
    }
    let graph = &model.graph;
    let mut names = Names::new(graph);
    let dense = dense::layers(graph, survey, dense);
    let step = match state {
        State::Hidden(request) => {
            let watched = Watched::new(graph, &survey.inputs, model.ir_version);
            let how = (request, schedule);
            step::build(survey, plan, how, &watched, &dense, &mut names)?
        }
        State::Io(told) => explicit_state::build(survey, plan, told, &mut names)?,
    };
    let mut edit = GraphEdit::default();
    let mut insert: BTreeMap<usize, Vec<Bytes>> = BTreeMap::new();
    let mut moved = BTreeSet::new();
    let mut dead = BTreeSet::new();
    let mut kept: HashSet<&str> = HashSet::new();
    let mut forms = Vec::new();
    let texts = text::Texts::new(graph, survey);
    for layer in survey.layers() {
        let text = match state {
            State::Hidden(_) => texts.of(layer, plan)?,
            State::Io(_) => texts.of(layer, plan)?.settled(plan),
        };
        let attention = dead_without(graph, &layer.core);
        let patch = layer::build(graph, survey, layer, &attention, &step, &text, &mut names)?;
        let nodes = insert.entry(patch.position).or_default();
        nodes.extend(patch.nodes);
        if let Some(io) = &step.io {
            let mut w = Writer::new(&mut names);
            io.layers[layer.index].hand_on_outputs(&mut w);
            nodes.extend(w.nodes);
        }
        edit.added_value_info.extend(patch.value_info);
        moved.extend(patch.moved);
        if !step.dense.contains_key(&layer.index) {
            dead.extend(attention);
        } else {
            // What several layers' attention reads stays where it is.
            let nodes = attention.iter().map(|&index| &graph.nodes[index]);
            kept.extend(nodes.flat_map(|n| &n.proto.input).map(String::as_str));
            moved.extend(attention);
        }
        kept.extend(layer.core.reads());
        forms.push(if layer.module.is_ok() {
            Form::Module
        } else {
            Form::Core
        });
    }
    // A constant shared by several layers dies only once all its users have.
    crate::find::sweep_dead(graph, &mut dead, &kept, &step.retargeted(survey));
    let mut nodes = step.nodes;
    for (index, node) in graph.nodes.iter().enumerate() {
        if !moved.contains(&index) && !dead.contains(&index) {
            nodes.push(node.raw.clone());
        }
        nodes.extend(insert.remove(&index).unwrap_or_default());
    }
    edit.nodes = Some(order::topological(nodes));
    if state == State::Hidden(RequestInputs::Triton) {
        edit.retyped_outputs = outputs::known_types(graph, &survey.facts);
    }
    edit.added_inputs = step.inputs;
    edit.added_outputs = step.outputs;
    edit.added_initializers = step.initializers;
    edit.added_value_info.extend(step.value_info);
    for &index in moved.iter().chain(&dead) {
        // Annotations of moved values carry the exporter's batch, which is wrong under ASC.
        let outputs = graph.nodes[index].proto.output.iter();
        edit.removed_value_info
            .extend(outputs.filter(|o| !survives(survey, o)).cloned());
    }
    edit.removed_initializers = unused_initializers(model, &moved, &dead, survey);
    let metadata = metadata(plan, state);
    let pieces = model.serialize(&edit, Some((DOMAIN, DOMAIN_VERSION)), &metadata);
    Ok(Lowered {
        pieces,
        forms,
        skip: step.skip,
        dense: step.dense.into_keys().collect(),
        state: step.io.map_or_else(Vec::new, |io| io.layers),
    })
}

/// Values that keep their name and place although their producer moved: the modules' results.
fn survives(survey: &Survey, value: &str) -> bool {
    survey.layers().any(|l| match &l.module {
        Ok(module) => module.sinks.iter().any(|s| s == value),
        Err(_) => l.core.out.value == value,
    })
}

fn refuse_rewritten(model: &ModelFile) -> Result<(), LowerError> {
    // An import says nothing: ONNX Runtime writes all domains that it knows into the models that it saves.
    match model.has_node_of(DOMAIN) {
        true => Err(LowerError::AlreadyRewritten),
        false => Ok(()),
    }
}

/// Whether each layer in the core form gives the type that it reads, as its state in the graph needs.
fn check_types(survey: &Survey) -> Result<(), LowerError> {
    for layer in survey.layers().filter(|l| l.module.is_err()) {
        let [read, given] = [&layer.core.q.value, &layer.core.out.value]
            .map(|value| elem_type::name(survey.facts.of(value).elem_type));
        if read != given {
            return Err(LowerError::MixedTypes {
                layer: layer.index,
                node: survey.label(layer),
                read,
                given,
            });
        }
    }
    Ok(())
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
            reasons: reasons(survey),
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
    for layer in survey.layers() {
        let has = |is: fn(Action) -> bool| {
            (0..plan.step_count()).any(|t| is(plan.action(t, layer.index)))
        };
        if has(Action::is_windowed) {
            check_windows(survey, layer)?;
        }
        if let Some(reason) = no_halves(layer, plan.cfg)
            && has(Action::uses_halves)
        {
            return Err(LowerError::NoHalves {
                layer: layer.index,
                node: survey.label(layer),
                why: reason.text.clone(),
            });
        }
    }
    Ok(())
}

/// Whether a window over the keys of `layer` has a middle for each query: as many keys as queries, whatever is fed.
pub fn fits_windows(layer: &Layer) -> bool {
    layer.core.tokens.is_some() && layer.core.tokens == layer.core.keys
}

/// # Errors
/// [`LowerError::NoWindow`] where [`fits_windows`] says no.
pub fn check_windows(survey: &Survey, layer: &Layer) -> Result<(), LowerError> {
    if fits_windows(layer) {
        return Ok(());
    }
    let show = |size: &Option<Dim>| match size {
        Some(size) => survey.facts.symbols.show(size),
        None => "an unknown number of".into(),
    };
    Err(LowerError::NoWindow {
        layer: layer.index,
        node: survey.label(layer),
        queries: show(&layer.core.tokens),
        keys: show(&layer.core.keys),
    })
}

/// Why `layer` cannot be shared across guidance that comes as `cfg` says. Two runs need no halves of a batch.
pub fn no_halves(layer: &Layer, cfg: Cfg) -> Option<&Reason> {
    match cfg {
        Cfg::Separate => None,
        _ => layer.halves.as_ref().err(),
    }
}

/// Why there is no layer, each reason once and the commonest first.
fn reasons(survey: &Survey) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for site in &survey.sites {
        let reason = match &site.kind {
            Kind::Layer(_) => continue,
            Kind::Cross { .. } => "cross-attention",
            Kind::Skipped(r) | Kind::Elsewhere(r) | Kind::Unsupported(r) | Kind::Unknown(r) => {
                r.text.as_str()
            }
        };
        *counts.entry(reason).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
    let shown: Vec<_> = counts
        .iter()
        .take(4)
        .map(|(reason, n)| format!("{n} × {reason}"))
        .collect();
    if shown.is_empty() {
        String::new()
    } else {
        format!(": {}", shown.join("; "))
    }
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
        .flat_map(|m| &m.retargeted)
        .filter(|(_, target)| matches!(target, Target::Constant(_)))
        .map(|(&node, _)| node)
        .collect();
    dead.iter()
        .chain(&reshaped)
        .flat_map(|&i| graph.nodes[i].proto.input.iter())
        .filter(|name| graph.initializers.contains_key(*name) && !graph.is_input(name))
        .filter(|name| !survey.layers().any(|l| l.core.reads().any(|r| r == *name)))
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
fn metadata(plan: &Plan, state: State) -> Vec<(String, String)> {
    let json = plan.to_json();
    let hex = sha256(&json);
    let mut metadata = vec![
        (
            metadata_keys::VERSION.into(),
            env!("CARGO_PKG_VERSION").into(),
        ),
        (metadata_keys::PLAN_SHA256.into(), hex),
        (metadata_keys::PLAN.into(), json),
    ];
    if matches!(state, State::Io(_)) {
        metadata.push((metadata_keys::STATE.into(), STATE_IO.into()));
    }
    metadata
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::find::{Choice, InputsRequest, survey};
    use crate::onnx::testing::model;

    /// A denoiser with one layer of `queries` tokens, whose keys are `keys`.
    fn layer(queries: &str, keys: &str) -> Survey {
        let text = format!(
            "opset 23
             input x float [b, {queries}, 32]
             input t float [b]
             input past float [b, p, 32]
             weight w [32, 32]
             weight f [1, 32]
             ints axes [1]
             t1 = Unsqueeze(t, axes)
             tf = Mul(t1, f)
             ts = Sin(tf)
             te = Unsqueeze(ts, axes)
             n = Add(x, te)
             q = MatMul(n, w)
             k = MatMul(n, w)
             v = MatMul(n, w)
             kp = Concat(past, k) axis=1
             vp = Concat(past, v) axis=1
             o = Attention(q, {keys}) q_num_heads=4 kv_num_heads=4
             out = MatMul(o, w)
             output out float [b, {queries}, 32]"
        );
        let graph = model(&text).graph;
        survey(&graph, &InputsRequest::default(), &Choice::default()).unwrap()
    }

    fn fit(survey: &Survey, action: &str) -> Result<(), String> {
        let plan = format!(
            r#"{{"format": "ditfastattn-plan", "version": 1, "cfg": "cond-first", "steps": [["full"], ["{action}"]]}}"#
        );
        let plan = Plan::parse(&plan).unwrap();
        check_fit(survey, &plan).map_err(|e| e.to_string())
    }

    #[test]
    fn windows_need_as_many_keys_as_queries() {
        for (queries, keys) in [("50", "(p + 50)"), ("m", "(p + m)")] {
            let found = layer(queries, "kp, vp");
            for action in ["wa-rs", "wa-rs+asc"] {
                let error = fit(&found, action).unwrap_err();
                let sizes = format!("{queries} query tokens and {keys} key tokens");
                for part in ["layer 0 (node_o)", &sizes, "--skip 0"] {
                    assert!(error.contains(part), "{part}: {error}");
                }
            }
            for action in ["full", "asc", "ast"] {
                assert_eq!(fit(&found, action), Ok(()));
            }
            let found = layer(queries, "k, v");
            assert_eq!(fit(&found, "wa-rs+asc"), Ok(()));
        }
    }
}
