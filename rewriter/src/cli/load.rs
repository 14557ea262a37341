//! What commands that run a model have in common: its file, its inputs, ONNX Runtime.

use super::run_args::RunArgs;
use super::{Failure, inputs_failure};
use crate::digest::sha256;
use crate::find::{Survey, survey};
use crate::lower::check_fit;
use crate::onnx::ModelFile;
use crate::run::host::Host;
use crate::run::prepare::{Prepared, Source, prepare};
use anyhow::{Context, anyhow};
use ditfastattn_plans::{Cfg, Plan};
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

pub fn load(args: &RunArgs) -> Result<Loaded, Failure> {
    if args.cfg == super::run_args::CfgArg::Separate {
        return Err(Failure::No(anyhow!(
            "--cfg separate cannot be searched yet: one run of a step reads what the other left; search with both predictions in one batch (cond-first or uncond-first), or without asc as --cfg none"
        )));
    }
    let model = ModelFile::open(&args.model)?;
    let survey = survey(&model.graph, &(&args.inputs).into(), &(&args.choice).into())
        .map_err(inputs_failure)?;
    let layers = survey.layers().count();
    let plan = Plan {
        window: args.window,
        cfg: Cfg::from(args.cfg),
        text: args.text,
        ..Plan::all_full(layers.max(1), 1)
    };
    plan.validate().map_err(|e| anyhow!("{e}"))?;
    check_fit(&survey, &plan).map_err(|e| Failure::No(e.into()))?;
    let make = |group: usize| args.scheduler.make(group);
    let (path, source) = match (&args.trajectory, &args.calib) {
        (Some(path), _) => (path, Source::Trajectory(path)),
        (None, Some(path)) => {
            let source = Source::Calibration {
                path,
                guidance: args.scheduler.guidance,
                per_run: args.scheduler.per_run,
                scheduler: &make,
            };
            (path, source)
        }
        (None, None) => {
            return Err(Failure::Bad(anyhow!(
                "expected --calib or --trajectory; see --help"
            )));
        }
    };
    let host = Host::load(
        args.onnxruntime.as_deref(),
        args.library.as_deref(),
        args.threads,
    )?;
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
