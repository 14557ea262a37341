//! From files to a model that is ready to be searched or studied.

use super::array::read_npz;
use super::engine::{Engine, to_array};
use super::feed::{Feed, Loop, MakeScheduler, Recording};
use super::host::Host;
use super::trials::Trials;
use crate::find::Survey;
use crate::onnx::ModelFile;
use crate::sizes::{self, Given, Unknown};
use ditfastattn_plans::{Action, LayerWork, Plan};
use std::path::Path;

/// A model with its inputs.
pub type Prepared<'a> = Trials<Box<dyn Feed + 'a>>;

/// Where the model's inputs come from.
pub enum Source<'a> {
    /// A recorded trajectory.
    Trajectory(&'a Path),
    /// Calibration inputs, and a scheduler that moves them on.
    Calibration {
        path: &'a Path,
        guidance: f32,
        /// Samples that share a run; 0: all.
        per_run: usize,
        scheduler: &'a MakeScheduler<'a>,
    },
}

/// Loads the inputs of `model` and the model itself. `plan` says how guidance and text come, and the window.
///
/// # Errors
/// Inputs that are not the model's, and what ONNX Runtime says.
pub fn prepare<'a>(
    host: &Host,
    model: &ModelFile,
    survey: &Survey,
    plan: &Plan,
    source: &Source<'_>,
) -> anyhow::Result<Prepared<'a>> {
    let feed: Box<dyn Feed> = match source {
        Source::Trajectory(path) => Box::new(Recording::new(
            &model.graph,
            &survey.inputs,
            read_npz(path)?,
        )?),
        Source::Calibration {
            path,
            guidance,
            per_run,
            scheduler,
        } => Box::new(Loop::new(
            &model.graph,
            &survey.inputs,
            read_npz(path)?,
            plan.cfg,
            *guidance,
            *per_run,
            scheduler,
        )?),
    };
    let engine = Engine::load(host, model, survey, plan)?;
    Ok(Trials::new(engine, feed, plan.cfg))
}

/// The sizes of all layers, measured by the dense run of step 0 (which stays the base: committing it costs nothing).
///
/// # Errors
/// What the model says; the outer error. The inner one is a size that even a run does not show.
pub fn measure(
    prepared: &mut Prepared<'_>,
    survey: &Survey,
    plan: &Plan,
) -> anyhow::Result<Result<Vec<LayerWork>, Unknown>> {
    let layers = prepared.engine().layers();
    prepared.settle(0, &vec![Action::Full; layers])?;
    let mut given = Given {
        // Where the graph measures the text as it runs, its number is not told to anybody; the accounting then takes none.
        text: Some(0),
        ..Given::default()
    };
    for l in 0..layers {
        let Some(base) = prepared.bases().next() else {
            continue;
        };
        if let Some(residual) = prepared.engine().residual(l, base) {
            let dims = to_array("residual", residual)?.dims;
            given
                .tokens_by_layer
                .push(dims.get(2).copied().unwrap_or(0));
        }
    }
    Ok(sizes::layers(survey, plan, &given))
}
