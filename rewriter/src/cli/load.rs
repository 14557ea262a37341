//! What commands that run a model have in common: its file, its inputs, ONNX Runtime.

use super::run_args::{MethodArgs, RunArgs};
use super::{Failure, inputs_failure};
use crate::digest::sha256;
use crate::find::{Survey, survey};
use crate::lower::check_fit;
use crate::onnx::ModelFile;
use crate::run::host::Host;
use crate::run::prepare::{Prepared, prepare};
use anyhow::{Context, anyhow};
use ditfastattn_plans::Plan;
use std::path::Path;

/// A model that is ready to run.
pub struct Loaded {
    pub survey: Survey,
    /// Window, guidance and text; all layers full.
    pub plan: Plan,
    pub prepared: Prepared<'static>,
    pub model_hash: String,
    pub inputs_hash: String,
}

/// The model of `args`, and what was found in it.
pub fn open(args: &RunArgs) -> Result<(ModelFile, Survey), Failure> {
    let model = args.file.open(&args.model)?;
    let survey = survey(&model.graph, &(&args.inputs).into(), &(&args.choice).into())
        .map_err(inputs_failure)?;
    Ok((model, survey))
}

/// What runs the model.
pub fn host(args: &RunArgs) -> Result<Host, Failure> {
    let (runtime, library) = (args.onnxruntime.as_deref(), args.library.as_deref());
    Ok(Host::load(runtime, library, args.threads)?)
}

pub fn load(args: &RunArgs, method: &MethodArgs) -> Result<Loaded, Failure> {
    let (model, survey) = open(args)?;
    let layers = survey.layers().count();
    let plan = Plan {
        window: method.window,
        cfg: method.cfg.into(),
        text: method.text,
        ..Plan::all_full(layers.max(1), 1)
    };
    plan.validate().map_err(|e| anyhow!("{e}"))?;
    check_fit(&survey, &plan).map_err(|e| Failure::No(e.into()))?;
    let make = |group: usize| args.scheduler.make(group);
    let (path, source) = args.source(&make).context(
        "expected the model's inputs: --trajectory NPZ, or --calib NPZ with --scheduler and --steps; see --help",
    )?;
    let host = host(args)?;
    let inputs = format!("{} {}", digest(path)?, args.scheduler.describe());
    Ok(Loaded {
        prepared: prepare(&host, &model, &survey, &plan, &source)?,
        model_hash: format!("{} {:?}", digest(&args.model)?, args.choice),
        inputs_hash: sha256(inputs),
        survey,
        plan,
    })
}

fn digest(path: &Path) -> Result<String, Failure> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(sha256(bytes))
}
