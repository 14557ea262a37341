//! `dfa-rewrite MODEL --plan PLAN`: read, find, lower, write.

use super::args::{RewriteArgs, StateArg};
use super::{Failure, inputs_failure, print, read_plan, write};
use crate::find::survey;
use crate::lower::{State, Told, lower};
use crate::onnx::ModelFile;
use crate::report::Report;
use anyhow::anyhow;
use ditfastattn_plans::Cfg;
use std::path::{Path, PathBuf};

pub fn run(args: &RewriteArgs) -> Result<(), Failure> {
    let (Some(path), Some(plan)) = (&args.model, &args.plan) else {
        return Err(Failure::Bad(anyhow!(
            "expected MODEL and --plan PLAN; see --help"
        )));
    };
    let plan = read_plan(plan)?;
    let model = ModelFile::open(path)?;
    let output = args.output.clone().unwrap_or_else(|| default_output(path));
    refuse_bad_output(&model, path, &output, args.force)?;
    let survey = survey(&model.graph, &(&args.inputs).into(), &(&args.choice).into())
        .map_err(inputs_failure)?;
    let state = match args.state {
        StateArg::Hidden => State::Hidden(args.request_inputs.into()),
        StateArg::Io => State::Io(Told::Step),
    };
    if args.state == StateArg::Io && plan.cfg == Cfg::Separate {
        return Err(Failure::No(anyhow!(
            "the plan's cfg is separate, in which one run of a step reads what the other left; explicit state has one state per run: use a plan with cond-first or uncond-first, or --state hidden"
        )));
    }
    let lowered = lower(&model, &survey, &plan, state).map_err(|e| Failure::No(e.into()))?;
    if !args.dry_run {
        write(&output, &lowered.pieces)?;
    }
    let mut report = Report::new(&model, &survey).with_plan(
        &plan,
        &survey,
        &(&args.sizes).into(),
        args.sizes.attention_share,
    );
    report.output = (!args.dry_run).then(|| output.display().to_string());
    match (args.quiet, args.json) {
        (true, _) => Ok(()),
        (_, true) => print(&(serde_json::to_string_pretty(&report)? + "\n")),
        _ => print(&report.table()),
    }
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
