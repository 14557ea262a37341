//! `dfa-rewrite MODEL --plan PLAN`: read, find, lower, write.

use super::args::{DenseArg, DenseArgs, RewriteArgs, ScheduleArg, StateArg};
use super::triton::configuration;
use super::{Failure, INTERRUPTED, inputs_failure, print, read_plan, watch_interrupts, write};
use crate::find::{Survey, survey};
use crate::lower::{Dense, DirectiveSource, RequestInputs, State, check_fit, lower_with};
use crate::onnx::ModelFile;
use crate::report::{DenseReport, Report};
use crate::run::dense::{Measured, measure};
use crate::run::host::Host;
use anyhow::anyhow;
use ditfastattn_plans::{Cfg, Plan};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

pub fn run(args: &RewriteArgs) -> Result<(), Failure> {
    let (Some(path), Some(plan)) = (&args.model, &args.plan) else {
        return Err(Failure::Bad(anyhow!(
            "expected MODEL and --plan PLAN; see --help"
        )));
    };
    let plan = read_plan(plan)?;
    let model = args.file.open(path)?;
    let output = args.output.clone().unwrap_or_else(|| default_output(path));
    refuse_bad_output(&model, path, &output, args.force)?;
    let survey = survey(&model.graph, &(&args.inputs).into(), &(&args.choice).into())
        .map_err(inputs_failure)?;
    let configuration = configuration(args, &model, &survey, &output)?;
    let state = match args.state {
        StateArg::Hidden if args.emit_triton_config.is_some() => {
            State::Hidden(RequestInputs::Triton)
        }
        StateArg::Hidden => State::Hidden(args.request_inputs.into()),
        StateArg::Io => State::Io(DirectiveSource::Step),
    };
    if args.state == StateArg::Io && plan.cfg == Cfg::Separate {
        return Err(Failure::No(anyhow!(
            "the plan's cfg is separate, in which one run of a step reads what the other left; explicit state has one state per run: use a plan with cond-first or uncond-first, or --state hidden"
        )));
    }
    if args.state == StateArg::Io && args.dense.who != DenseArg::Library {
        return Err(Failure::Bad(anyhow!(
            "--dense {} needs --state hidden: with explicit state every step hands R on, which only the op library does",
            if args.dense.who == DenseArg::Host {
                "host"
            } else {
                "measure"
            }
        )));
    }
    if args.state == StateArg::Io && args.schedule == ScheduleArg::Any {
        return Err(Failure::Bad(anyhow!(
            "--schedule any needs --state hidden: with explicit state the caller says which row of the plan a step has, in dfa_step"
        )));
    }
    let (dense, measured) = dense(&args.dense, &model, &survey, &plan)?;
    let lowered = lower_with(&model, &survey, &plan, state, dense, args.schedule.into())
        .map_err(|e| Failure::No(e.into()))?;
    let mut written = None;
    if !args.dry_run {
        let write_model = || write(&output, &lowered.pieces);
        match configuration {
            Some(configuration) => written = Some(configuration.write_with(write_model)?),
            None => write_model()?,
        }
    }
    let mut report = Report::new(&model, &survey).with_plan(
        &plan,
        &survey,
        &(&args.sizes).into(),
        args.sizes.attention_share,
    );
    report.dense = (args.dense.who != DenseArg::Library).then_some(DenseReport {
        by: match lowered.dense.is_empty() {
            true => Dense::Library,
            false => Dense::Host,
        },
        layers: lowered.dense,
        measured,
    });
    report.output = (!args.dry_run).then(|| output.display().to_string());
    report.triton_config = written.map(|path| path.display().to_string());
    match (args.quiet, args.json) {
        (true, _) => Ok(()),
        (_, true) => print(&(serde_json::to_string_pretty(&report)? + "\n")),
        _ => print(&report.table()),
    }
}

/// Who is to compute dense steps, and what was measured to find out.
fn dense(
    args: &DenseArgs,
    model: &ModelFile,
    survey: &Survey,
    plan: &Plan,
) -> Result<(Dense, Option<Measured>), Failure> {
    Ok(match args.who {
        DenseArg::Library => (Dense::Library, None),
        DenseArg::Host => (Dense::Host, None),
        DenseArg::Measure => {
            check_fit(survey, plan).map_err(|e| Failure::No(e.into()))?;
            let host = Host::load(args.onnxruntime.as_deref(), None, args.threads)?;
            let host = host.on(args.provider.into());
            watch_interrupts();
            let go_on = || !INTERRUPTED.load(Ordering::Relaxed);
            let measured = measure(&host, model, survey, plan, &args.open_sizes, &go_on)?
                .ok_or_else(|| Failure::No(anyhow!("stopped while dense steps were measured")))?;
            (measured.faster(), Some(measured))
        }
    })
}

/// `model.onnx` → `model.dfa.onnx`.
fn default_output(model: &Path) -> PathBuf {
    model.with_extension("dfa.onnx")
}

/// Overwriting needs `--force`; an output folder that does not exist, or is a file, is named as such.
pub fn refuse_existing(output: &Path, force: bool) -> Result<(), Failure> {
    if output.is_dir() {
        return Err(Failure::Bad(anyhow!(
            "the output {} is a folder, expected a file name",
            output.display()
        )));
    }
    if let Some(folder) = output.parent()
        && !folder.as_os_str().is_empty()
        && !folder.is_dir()
    {
        return Err(Failure::Bad(anyhow!(
            "the output {} cannot be written: its folder {} does not exist",
            output.display(),
            folder.display()
        )));
    }
    if output.exists() && !force {
        return Err(Failure::Bad(anyhow!(
            "the output {} exists; pass --force to overwrite it",
            output.display()
        )));
    }
    Ok(())
}

fn refuse_bad_output(
    model: &ModelFile,
    path: &Path,
    output: &Path,
    force: bool,
) -> Result<(), Failure> {
    refuse_existing(output, force)?;
    let resolved = |p: &Path| p.canonicalize().ok();
    if resolved(path).is_some() && resolved(path) == resolved(output) {
        return Err(Failure::Bad(anyhow!(
            "the output {} is the model itself; choose another name with -o",
            output.display()
        )));
    }
    let folder = |p: &Path| {
        let parent = p
            .parent()
            .filter(|p| !p.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        resolved(parent)
    };
    if folder(path) != folder(output)
        && let Some(weights) = model.external_data_locations().first()
    {
        return Err(Failure::Bad(anyhow!(
            "the weights of {} lie outside the file (in {weights}, …) and are found relative to its folder, so {} must be in the same folder; leave out -o, or move both afterwards",
            path.display(),
            output.display()
        )));
    }
    Ok(())
}
