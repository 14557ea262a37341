//! `dfa-rewrite search`: from a model and calibration inputs to a plan (Algorithm 1).

use super::args::SearchArgs;
use super::rewrite::refuse_existing;
use super::{Failure, inputs_failure, print, write};
use crate::find::{Survey, survey};
use crate::lower::check_fit;
use crate::onnx::ModelFile;
use crate::run::array::read_npz;
use crate::run::engine::Engine;
use crate::run::feed::{Feed, Loop, Recording};
use crate::run::host::Host;
use crate::run::scheduler::{Betas, Ddim, DpmSolver, EulerFlow, Iddpm, Scheduler};
use crate::run::trials::Trials;
use anyhow::{Context, anyhow};
use ditfastattn_plans::{
    Action, Cfg, Journal, LayerWork, PAPER_ORDER, Plan, Progress, SearchError, Settings, Workload,
    candidates_by_cost, candidates_in_order, search,
};
use sha2::{Digest, Sha256};
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// δ of the paper's configurations D1 to D6 (§4.1).
const PRESETS: [f64; 6] = [0.025, 0.05, 0.075, 0.1, 0.125, 0.15];

pub fn run(args: &SearchArgs) -> Result<(), Failure> {
    let (name, delta) = threshold(args)?;
    refuse_existing(&args.output, args.force)?;
    let journal = args.journal.clone().unwrap_or_else(|| beside(&args.output));
    refuse_journal(&journal, args)?;
    let model = ModelFile::open(&args.model)?;
    let survey = survey(&model.graph, &(&args.inputs).into(), &(&args.choice).into())
        .map_err(inputs_failure)?;
    let template = template(&survey, args);
    check_fit(&survey, &template).map_err(|e| Failure::No(e.into()))?;
    let feed = feed(&model, &survey, args)?;
    let settings = Settings {
        model_hash: file_digest(&args.model)?,
        inputs_hash: inputs_digest(args)?,
        model: Some(survey.fingerprint()),
        steps: feed.steps(),
        delta,
        metric: args.metric,
        window: args.window,
        cfg: args.cfg.into(),
        timesteps: feed.timesteps(),
        text: None,
        candidates: candidates(&survey, args),
    };
    settings.validate().map_err(|e| Failure::Bad(e.into()))?;
    let host = Host::load(
        args.onnxruntime.as_deref(),
        args.library.as_deref(),
        args.threads,
    )
    .map_err(|e| Failure::Bad(e.into()))?;
    let engine = Engine::load(&host, &model, &survey, &template)
        .map_err(|e| Failure::Bad(anyhow!(e).context("the model cannot be run")))?;
    let mut trials = Trials::new(engine, feed, args.cfg.into());

    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&journal)
        .with_context(|| format!("cannot write the journal {}", journal.display()))?;
    if args.force && !args.resume {
        file.set_len(0).context("cannot empty the journal")?;
    }
    let (mut record, table) = Journal::open(file, &settings).map_err(|e| {
        Failure::Bad(anyhow!(e).context(format!("the journal {}", journal.display())))
    })?;
    let begun = Begun {
        at: Instant::now(),
        before: table.cells().len(),
        quiet: args.quiet || !std::io::stderr().is_terminal(),
    };
    let found = search(&mut trials, table, &mut record, &mut |p| begun.show(p));
    begun.end();
    let found = found.map_err(|e| match e {
        SearchError::Journal(e) => Failure::Bad(anyhow!(e).context(format!(
            "the journal {} cannot be written",
            journal.display()
        ))),
        other => Failure::Bad(anyhow!(other.to_string()).context(format!(
            "the search stopped; --resume continues from {}",
            journal.display()
        ))),
    })?;
    let mut plan = found.plan;
    plan.name = name;
    write(&args.output, &[plan.to_json().into_bytes().into()])?;
    if args.quiet {
        return Ok(());
    }
    let (naive, spent) = (found.table.naive_forwards(), found.effort.forwards);
    let counts = plan.counts();
    if args.json {
        let actions: serde_json::Map<_, _> = Action::ALL
            .iter()
            .map(|&a| (a.to_string(), counts.of(a).into()))
            .collect();
        let report = serde_json::json!({
            "output": args.output, "journal": journal, "delta": delta, "actions": actions,
            "trials": found.table.trials(), "forwards": spent, "naive_forwards": naive,
        });
        return print(&(serde_json::to_string_pretty(&report)? + "\n"));
    }
    let listed: Vec<_> = Action::ALL
        .iter()
        .filter(|&&a| counts.of(a) > 0)
        .map(|&a| format!("{} {a}", counts.of(a)))
        .collect();
    print(&format!(
        "{} steps × {} layers at δ {delta}: {}\n{} trials; {spent:.1} forward passes in this run, {naive} if every trial ran the whole model\nwrote {}\n",
        plan.step_count(),
        plan.layers(),
        listed.join(", "),
        found.table.trials(),
        args.output.display()
    ))
}

/// The plan's name and δ.
fn threshold(args: &SearchArgs) -> Result<(Option<String>, f64), Failure> {
    match (args.delta, args.preset.as_deref()) {
        (Some(delta), _) => Ok((None, delta)),
        (None, Some(preset)) => {
            let number = preset
                .strip_prefix(['d', 'D'])
                .and_then(|n| n.parse::<usize>().ok())
                .filter(|n| (1..=PRESETS.len()).contains(n));
            let number = number
                .ok_or_else(|| Failure::Bad(anyhow!("--preset is {preset}, expected d1 to d6")))?;
            Ok((Some(format!("D{number}")), PRESETS[number - 1]))
        }
        (None, None) => Err(Failure::Bad(anyhow!(
            "expected --delta or --preset; see --help"
        ))),
    }
}

/// `d3.json` → `d3.search.jsonl`.
fn beside(plan: &Path) -> PathBuf {
    plan.with_extension("search.jsonl")
}

fn refuse_journal(journal: &Path, args: &SearchArgs) -> Result<(), Failure> {
    match (journal.exists(), args.resume) {
        (true, false) if !args.force => Err(Failure::Bad(anyhow!(
            "the journal {} of an earlier search exists: --resume continues it, --force begins anew",
            journal.display()
        ))),
        (false, true) => Err(Failure::Bad(anyhow!(
            "there is no journal {} to resume; leave out --resume to begin a search",
            journal.display()
        ))),
        _ => Ok(()),
    }
}

/// What the engine needs of a plan: the window and the guidance.
fn template(survey: &Survey, args: &SearchArgs) -> Plan {
    let mut plan = Plan::all_full(survey.layers().count().max(1), 1);
    plan.window = args.window;
    plan.cfg = args.cfg.into();
    plan
}

fn candidates(survey: &Survey, args: &SearchArgs) -> Vec<Vec<Action>> {
    let (layers, cfg) = (survey.layers().count(), args.cfg.into());
    if !args.candidates.is_empty() {
        return candidates_in_order(&args.candidates, layers, cfg);
    }
    let work: Option<Vec<LayerWork>> = survey
        .layers()
        .map(|layer| {
            let core = &layer.core;
            let size = |n: Option<i64>| usize::try_from(n?).ok();
            let workload = Workload {
                tokens: size(core.tokens.as_ref()?.known())?,
                text: size(layer.text.known())?,
                width: size(core.heads)? * size(core.head_dim)?,
                rows: 2,
            };
            Some(LayerWork {
                shares_projections: layer.module.is_ok(),
                ..workload.into()
            })
        })
        .collect();
    match work {
        Some(work) => candidates_by_cost(&work, args.window, cfg),
        // Costs depend on token counts that only a run knows: the paper's order.
        None => candidates_in_order(&PAPER_ORDER, layers, cfg),
    }
}

fn feed(model: &ModelFile, survey: &Survey, args: &SearchArgs) -> Result<Box<dyn Feed>, Failure> {
    let bad = |e: anyhow::Error| Failure::Bad(e);
    if let Some(path) = &args.trajectory {
        let arrays = read_npz(path).map_err(|e| bad(e.into()))?;
        let feed = Recording::new(&model.graph, &survey.inputs, arrays);
        return Ok(Box::new(feed.map_err(|e| {
            bad(anyhow!(e).context(path.display().to_string()))
        })?));
    }
    let (Some(path), Some(scheduler), Some(steps)) = (&args.calib, args.scheduler, args.steps)
    else {
        return Err(bad(anyhow!(
            "expected --trajectory, or --scheduler with --steps and --calib; see --help"
        )));
    };
    let cfg: Cfg = args.cfg.into();
    if cfg == Cfg::Separate {
        return Err(bad(anyhow!(
            "guidance in two runs per step cannot be searched with a scheduler; batch the halves of the calibration (--cfg cond-first)"
        )));
    }
    let arrays = read_npz(path).map_err(|e| bad(e.into()))?;
    let make = |group: usize| -> Box<dyn Scheduler> {
        let betas = Betas::default();
        match scheduler {
            super::args::SchedulerArg::Ddim => Box::new(Ddim::new(&betas, steps)),
            super::args::SchedulerArg::Dpm => Box::new(DpmSolver::new(&betas, steps)),
            super::args::SchedulerArg::Iddpm => Box::new(Iddpm::new(&betas, steps, group as u64)),
            super::args::SchedulerArg::EulerFlow => {
                Box::new(EulerFlow::new(steps, args.shift, args.timestep_scale))
            }
        }
    };
    let feed = Loop::new(
        &model.graph,
        &survey.inputs,
        arrays,
        cfg,
        args.guidance,
        0,
        &make,
    );
    Ok(Box::new(feed.map_err(|e| {
        bad(anyhow!(e).context(path.display().to_string()))
    })?))
}

fn file_digest(path: &Path) -> Result<String, Failure> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex(&Sha256::digest(bytes)))
}

/// Of the arrays and everything else that decides what the model is fed.
fn inputs_digest(args: &SearchArgs) -> Result<String, Failure> {
    let mut digest = Sha256::new();
    for path in args.trajectory.iter().chain(&args.calib) {
        digest.update(file_digest(path)?);
    }
    let how = (args.scheduler, args.steps, args.guidance.to_bits());
    digest.update(format!("{how:?} {} {}", args.shift, args.timestep_scale));
    Ok(hex(&digest.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Progress on stderr, where somebody looks.
struct Begun {
    at: Instant,
    before: usize,
    quiet: bool,
}

impl Begun {
    fn show(&self, progress: &Progress<'_>) -> ControlFlow<()> {
        if !self.quiet {
            let done = (progress.decided - self.before).max(1) as f64;
            let left = (progress.cells - progress.decided) as f64;
            let seconds = self.at.elapsed().as_secs_f64() / done * left;
            let _ = write!(
                std::io::stderr(),
                "\r\x1b[K{progress}, about {seconds:.0} s left"
            );
        }
        ControlFlow::Continue(())
    }

    fn end(&self) {
        if !self.quiet {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
