//! Explicit state: what layers remember goes through the graph's inputs and outputs instead of the library's memory.
//!
//! Owns the names of that state, the numbers that tell layers what to do, and the nodes that read them. Every layer `l` has
//! `past.l.residual` and `past.l.output` among the inputs and `present.l.…` among the outputs; a past without rows is none.

use super::build::{self, Names, Writer};
use super::step::Step;
use super::{DirectiveSource, LowerError};
use crate::find::{Layer, Survey};
use crate::onnx::{AttributeProto, elem_type};
use crate::shapes::Fact;
use ditfastattn_contract::directive::{Directive, OUTPUT_LIVE, RESIDUAL_LIVE};
use ditfastattn_contract::graph::{self, Time};
use ditfastattn_contract::{attributes, version};
use ditfastattn_plans::{Action, Plan};

/// More rows than any tensor has.
const ALL_ROWS: i64 = i32::MAX as i64;

/// The directive for `action`, of which nothing is read afterwards.
pub fn directive(action: Action) -> Directive {
    let place = Action::ALL.iter().position(|a| *a == action);
    Directive {
        action: place.and_then(|p| u8::try_from(p).ok()).unwrap_or(0),
        residual_live: false,
        output_live: false,
    }
}

/// For each step of `plan` one directive per layer, `[T][L]`: what `dfa_directives` is fed, and what `dfa_step` picks from.
pub fn directives(plan: &Plan) -> Vec<Vec<i64>> {
    let live = plan.liveness();
    let of = |step: usize, layer: usize| {
        let directive = Directive {
            residual_live: live.residual_live_after(step, layer),
            output_live: live.output_live_after(step, layer),
            ..directive(plan.action(step, layer))
        };
        directive.encode()
    };
    (0..plan.step_count())
        .map(|step| (0..plan.layers()).map(|layer| of(step, layer)).collect())
        .collect()
}

/// The graph's state, layer by layer.
pub struct Io {
    /// What every op of ours is told: the contract, that its state is explicit, the plan's window and guidance.
    pub attributes: Vec<AttributeProto>,
    pub layers: Vec<LayerState>,
}

/// Names of one layer's state.
pub struct LayerState {
    pub past_residual: String,
    pub present_residual: String,
    /// One per result of the module.
    pub past_outputs: Vec<String>,
    present_outputs: Vec<String>,
    /// The values that the present outputs are copies of.
    pub sinks: Vec<String>,
    /// How many rows of R, and of the outputs, to hand on: all or none.
    pub residual_rows: String,
    output_rows: String,
}

/// The results of `layer`'s module, or of its attention where only that is replaced.
pub fn sinks(layer: &Layer) -> Vec<String> {
    match &layer.module {
        Ok(module) => module.sinks.clone(),
        Err(_) => vec![layer.core.out.value.clone()],
    }
}

/// The step's part of the graph: inputs, state, and per layer whether it is skipped.
///
/// # Errors
/// [`LowerError::NameTaken`] if the model has a value with a name of the state.
pub fn build(
    survey: &Survey,
    plan: &Plan,
    told: DirectiveSource,
    names: &mut Names,
) -> Result<Step, LowerError> {
    let mut inputs = Vec::new();
    let mut outputs = Vec::new();
    let claim = |name: String, names: &mut Names| match names.claim(&name) {
        true => Ok(name),
        false => Err(LowerError::NameTaken { name }),
    };
    let layer_count = survey.layers().count();
    let told_by = match told {
        DirectiveSource::Step => graph::STEP,
        DirectiveSource::Directives => graph::DIRECTIVES,
    };
    let told_by = claim(told_by.into(), names)?;
    let mut layers = Vec::new();
    for layer in survey.layers() {
        let l = layer.index;
        let sinks = sinks(layer);
        let output = |time, sink| graph::output(time, l, sink, sinks.len());
        let mut past_outputs = Vec::new();
        let mut present_outputs = Vec::new();
        for (sink, value) in sinks.iter().enumerate() {
            past_outputs.push(claim(output(Time::Past, sink), names)?);
            present_outputs.push(claim(output(Time::Present, sink), names)?);
            let mut fact = survey.facts.of(value);
            fact.elem_type = layer.core.elem_type;
            inputs.push(build::any_rows(&past_outputs[sink], &fact));
            outputs.push(build::any_rows(&present_outputs[sink], &fact));
        }
        let past_residual = claim(graph::residual(Time::Past, l), names)?;
        let present_residual = claim(graph::residual(Time::Present, l), names)?;
        let sizes = [None, layer.core.heads, None, None];
        let residual = |name: &str| build::sized(name, layer.core.elem_type, &sizes);
        inputs.push(residual(&past_residual));
        outputs.push(residual(&present_residual));
        layers.push(LayerState {
            past_residual,
            present_residual,
            past_outputs,
            present_outputs,
            sinks,
            residual_rows: String::new(),
            output_rows: String::new(),
        });
    }

    let mut w = Writer::new(names);
    let (declared, ticket) = match told {
        DirectiveSource::Directives => (vec![(layer_count as i64).into()], told_by.clone()),
        DirectiveSource::Step => {
            let table = directives(plan);
            let shape = vec![table.len() as i64, layer_count as i64];
            let table = w.int_tensor("dfa/directives", shape, &table.concat());
            // A server may feed [], [1] or [1, 1].
            let one = w.ints("dfa/step", &[]);
            let step = w.push("Reshape", "dfa/step", &[&told_by, &one], &[]);
            let axis = AttributeProto::int("axis", 0);
            let row = w.push("Gather", "dfa/ticket", &[&table, &step], &[axis]);
            (vec![], row)
        }
    };
    inputs.insert(
        0,
        build::value_info(&told_by, &Fact::of(elem_type::INT64, Some(declared))),
    );
    // directive = action + 8 · (R is live) + 16 · (the output is live)
    let flag = |w: &mut Writer<'_>, near: &str, directives: &str, of: i64| {
        let (of, two, all) = (w.int(near, of), w.int(near, 2), w.int(near, ALL_ROWS));
        let halved = w.push("Div", near, &[directives, &of], &[]);
        let bit = w.push("Mod", near, &[&halved, &two], &[]);
        w.push("Mul", near, &[&bit, &all], &[])
    };
    let residual_rows = flag(&mut w, "dfa/residual_rows", &ticket, RESIDUAL_LIVE);
    let output_rows = flag(&mut w, "dfa/output_rows", &ticket, OUTPUT_LIVE);
    let (flags, ast) = (
        w.int("dfa/skip", RESIDUAL_LIVE),
        w.int("dfa/skip", directive(Action::Ast).encode()),
    );
    let action = w.push("Mod", "dfa/action", &[&ticket, &flags], &[]);
    let skips = w.push("Equal", "dfa/skip", &[&action, &ast], &[]);
    let mut skip = Vec::new();
    for (l, state) in layers.iter_mut().enumerate() {
        let near = format!("dfa/layer_{l}");
        let (scalar, vector) = (w.int(&near, l as i64), w.ints(&near, &[l as i64]));
        skip.push(w.push("Gather", &format!("{near}/skip"), &[&skips, &scalar], &[]));
        let rows = |w: &mut Writer<'_>, all: &str, near: &str| {
            w.push("Gather", near, &[all, &vector], &[])
        };
        state.residual_rows = rows(&mut w, &residual_rows, &format!("{near}/residual_rows"));
        state.output_rows = rows(&mut w, &output_rows, &format!("{near}/output_rows"));
    }
    let attributes = vec![
        AttributeProto::int(attributes::CONTRACT, version::FIRST),
        AttributeProto::string(attributes::state::STATE, attributes::state::STATE_IO),
        AttributeProto::string(attributes::state::WINDOW, &plan.window.to_string()),
        AttributeProto::string(attributes::state::CFG, plan.cfg.name()),
    ];
    Ok(Step {
        nodes: w.nodes,
        ticket,
        skip,
        dense: std::collections::BTreeMap::new(),
        inputs,
        outputs,
        initializers: Vec::new(),
        value_info: Vec::new(),
        io: Some(Io { attributes, layers }),
    })
}

impl LayerState {
    /// Whether `value` is one of the inputs that carry this layer's state.
    pub fn reads(&self, value: &str) -> bool {
        self.past_residual == value || self.past_outputs.iter().any(|p| p == value)
    }

    /// The nodes behind the layer: its outputs as far as they are still read.
    pub fn hand_on_outputs(&self, w: &mut Writer<'_>) {
        for (sink, present) in self.sinks.iter().zip(&self.present_outputs) {
            rows(w, sink, &self.output_rows, present);
        }
    }
}

/// `to` = the first `count` rows of `x`.
pub fn rows(w: &mut Writer<'_>, x: &str, count: &str, to: &str) {
    let zero = w.ints(to, &[0]);
    w.push_as("Slice", to, &[x, &zero, count, &zero], &[]);
}
