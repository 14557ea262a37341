//! The rewritten model beside the original one, step by step.
//!
//! Two comparisons must come out equal but for rounding, each step with equal inputs: with every layer full, the rewritten model and the
//! original; under the plan, the rewritten model as it is served (state in the op library) and the plan carried out with explicit state.
//! The second says that the plan is followed: a step that the library computes densely, because a timestep is not the plan's or a cache
//! did not fit, is not what the plan says. How far the plan moves the result is measured, not judged.
//!
//! Both sides of both comparisons have the same layers, so neither would show layers with the wrong text: that is [`text`]'s to see.

use super::array::Array;
use super::distance::{Distance, relative};
use super::feed::{Feed, samples};
use super::host::Host;
use super::prepare::{Source, feed, prepare};
use super::text::{self, LayerText};
use super::whole::{Moment, Whole};
use crate::find::Survey;
use crate::lower::{RequestInputs, lower};
use crate::onnx::ModelFile;
use anyhow::ensure;
use ditfastattn_plans::{Cfg, Denoiser, Plan};
use serde::Serialize;

/// What is compared.
pub struct Subject<'a> {
    pub model: &'a ModelFile,
    /// The model's layers, as they were rewritten.
    pub survey: &'a Survey,
    pub plan: &'a Plan,
    /// The rewritten model, and its bytes.
    pub rewritten: (&'a ModelFile, &'a [u8]),
    pub source: &'a Source<'a>,
}

/// One step.
#[derive(Clone, Debug, Serialize)]
pub struct Step {
    pub timestep: Option<f64>,
    /// From the original to the rewritten model with every layer full: largest difference as a part of the largest number.
    pub full: f64,
    /// The same from the plan carried out with explicit state to the rewritten model.
    pub followed: f64,
    /// From the original's output to the rewritten model's under the plan, each on its own trajectory.
    #[serde(flatten)]
    pub planned: Distance,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Verified {
    pub steps: Vec<Step>,
    /// From the dense result to the planned one: the latents behind the last step, or where they are recorded its output.
    #[serde(rename = "final")]
    pub result: Distance,
    /// Which tokens of each layer are text.
    pub text: Vec<LayerText>,
}

/// The dense generation.
struct Dense {
    /// Per step the samples of the output, and how far the rewritten model with every layer full is from it.
    steps: Vec<(Vec<Vec<f32>>, f64)>,
    latents: Option<Vec<Vec<f32>>>,
}

/// Runs the generation of `subject` in all forms. `None` if `go_on` says no between two steps.
///
/// # Errors
/// Inputs that are not the model's or have another number of steps than the plan, and what ONNX Runtime says.
pub fn verify(
    host: &Host,
    subject: &Subject<'_>,
    go_on: &dyn Fn() -> bool,
) -> anyhow::Result<Option<Verified>> {
    // One after the other: no more than two forms of the weights are in memory at a time.
    let Some(dense) = dense(host, subject, go_on)? else {
        return Ok(None);
    };
    let Some((steps, result)) = planned(host, subject, &dense, go_on)? else {
        return Ok(None);
    };
    let text = text::check(host, subject)?;
    Ok(Some(Verified {
        steps,
        result,
        text,
    }))
}

fn dense(
    host: &Host,
    subject: &Subject<'_>,
    go_on: &dyn Fn() -> bool,
) -> anyhow::Result<Option<Dense>> {
    let Subject {
        model,
        survey,
        plan,
        source,
        ..
    } = subject;
    let mut feed = feed(model, survey, plan, source)?;
    let (fed, planned) = (feed.steps(), plan.step_count());
    ensure!(
        fed == planned,
        "the inputs are those of {fed} steps, expected as many as the plan has, {planned}"
    );
    let full = lower(
        model,
        survey,
        &plan.with_all_full(),
        RequestInputs::Optional,
    )?;
    let mut full = Whole::load(host, "the rewritten model", model, &full.pieces.concat())?;
    let bytes = std::fs::read(&model.path)?;
    let mut original = Whole::load(host, "the model", model, &bytes)?;
    let mut steps = Vec::new();
    for step in 0..planned {
        if !go_on() {
            return Ok(None);
        }
        let (mut outputs, mut apart) = (Vec::new(), Vec::new());
        for group in 0..feed.groups() {
            let mut rows = Vec::new();
            for run in 0..feed.runs() {
                let inputs = feed.inputs(step, group, run)?;
                let output = original.run(&inputs, None)?;
                let same = full.run(&inputs, Some(moment(plan, step, group, run)))?;
                apart.push(difference(&output, &same));
                rows.push(output);
            }
            let output = Array::stack(&rows);
            outputs.extend(samples(&output, plan.cfg));
            feed.advance(step, group, &output)?;
        }
        ensure!(
            outputs.iter().flatten().all(|x| x.is_finite()),
            "the model's output at step {step} has an infinity or NaN in it; check the model and its inputs"
        );
        steps.push((outputs, worst(&apart)));
    }
    let latents = latents(&feed);
    Ok(Some(Dense { steps, latents }))
}

fn planned(
    host: &Host,
    subject: &Subject<'_>,
    dense: &Dense,
    go_on: &dyn Fn() -> bool,
) -> anyhow::Result<Option<(Vec<Step>, Distance)>> {
    let plan = subject.plan;
    let (file, bytes) = subject.rewritten;
    let mut served = Whole::load(host, "the rewritten model", file, bytes)?;
    let mut trials = prepare(host, subject.model, subject.survey, plan, subject.source)?;
    let timesteps = trials.feed().timesteps();
    let (mut steps, mut last) = (Vec::new(), Vec::new());
    for (step, (row, (expected, full))) in plan.steps.iter().zip(&dense.steps).enumerate() {
        if !go_on() {
            return Ok(None);
        }
        trials.settle(step, row)?;
        let (mut outputs, mut apart) = (Vec::new(), Vec::new());
        for (group, base) in trials.bases().enumerate() {
            let mut rows = Vec::new();
            for (run, base) in base.iter().enumerate() {
                let inputs = trials.feed().inputs(step, group, run)?;
                let explicit = trials.engine().result(base)?;
                let output = served.run(&inputs, Some(moment(plan, step, group, run)))?;
                apart.push(difference(&explicit, &output));
                rows.push(output);
            }
            outputs.extend(samples(&Array::stack(&rows), plan.cfg));
        }
        trials.commit(step, row)?;
        steps.push(Step {
            timestep: timesteps.as_ref().and_then(|t| t.get(step).copied()),
            full: *full,
            followed: worst(&apart),
            planned: Distance::between(expected, &outputs)?,
        });
        last = outputs;
    }
    let result = match (&dense.latents, latents(trials.feed())) {
        (Some(expected), Some(found)) => Distance::between(expected, &found)?,
        _ => Distance::between(
            dense.steps.last().map_or(&[], |(outputs, _)| outputs),
            &last,
        )?,
    };
    Ok(Some((steps, result)))
}

/// Every group is a request of its own.
fn moment(plan: &Plan, step: usize, group: usize, run: usize) -> Moment {
    let last_run = usize::from(plan.cfg == Cfg::Separate);
    Moment {
        request: 1 + group as i64,
        start: step == 0 && run == 0,
        end: step + 1 == plan.step_count() && run == last_run,
    }
}

/// Arrays of different shapes are as far apart as can be.
fn difference(expected: &Array, found: &Array) -> f64 {
    match expected.dims == found.dims {
        true => relative(expected.data.as_floats(), found.data.as_floats()),
        false => f64::INFINITY,
    }
}

/// The largest; NaN if there is one.
fn worst(apart: &[f64]) -> f64 {
    let later = |most: f64, &x: &f64| if x > most || x.is_nan() { x } else { most };
    apart.iter().fold(0.0, later)
}

fn latents(feed: &impl Feed) -> Option<Vec<Vec<f32>>> {
    let rows = feed.latents()?;
    Some(
        rows.into_iter()
            .flat_map(|l| samples(l, Cfg::None))
            .collect(),
    )
}
