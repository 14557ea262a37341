//! `dfa-rewrite search`: from a model to a plan, by the paper's Algorithm 1.

use super::load::{self, Loaded};
use super::rewrite::refuse_existing;
use super::run_args::SearchArgs;
use super::{Failure, INTERRUPTED, print, write};
use crate::account::Account;
use crate::lower::{fits_windows, no_halves};
use crate::report::{counts, listed};
use crate::run::prepare::measure;
use crate::sizes;
use anyhow::{Context, anyhow};
use ditfastattn_plans::{
    Journal, LayerWork, LossTable, Plan, Progress, SearchError, Settings, candidates_by_cost,
    candidates_in_order, search,
};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::fmt::Write;
use std::fs::File;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// What a search tells.
#[derive(Serialize)]
struct Outcome {
    output: String,
    journal: String,
    name: Option<String>,
    delta: f64,
    metric: String,
    steps: usize,
    layers: usize,
    counts: Vec<(String, usize)>,
    account: Option<Account>,
    /// Trials, dense runs and steps, each one forward pass for a loop that resumes nowhere.
    naive_forwards: f64,
    /// Forward passes that this process has run.
    forwards: f64,
    seconds: f64,
}

pub fn run(args: &SearchArgs) -> Result<(), Failure> {
    let delta = args.delta.or(args.preset.map(|p| p.delta()));
    let delta = delta.context("expected --delta or --preset; see --help")?;
    refuse_existing(&args.output, args.force)?;
    let journal_path = journal_path(args);
    refuse_journal(&journal_path, args)?;
    let mut loaded = load::load(&args.run, &args.method)?;
    let plan = loaded.plan.clone();
    let works = measure(&mut loaded.prepared, &loaded.survey, &plan)?.map_err(|unknown| {
        let (layer, what) = (unknown.layer, unknown.what);
        Failure::No(anyhow!(
            "layer {layer}: its {what} cannot be told from the graph"
        ))
    })?;
    let settings = settings(args, &loaded, &works, delta)?;
    let journal = open_journal(&journal_path, args)?;
    let (mut journal, mut table) =
        Journal::open(journal, &settings).with_context(|| format!("{}", journal_path.display()))?;
    if let Some(path) = &args.reuse {
        table = reuse(path, &settings, args.quiet)?;
    }
    let started = Instant::now();
    let bar = progress_bar(&table, args);
    let mut observe = |progress: &Progress<'_>| {
        bar.set_position(progress.decided as u64);
        bar.set_message(format!(
            "step {}, layer {}: {}",
            progress.cell.step, progress.cell.layer, progress.cell.action
        ));
        match INTERRUPTED.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    super::watch_interrupts();
    let found = search(&mut loaded.prepared, table, &mut journal, &mut observe);
    bar.finish_and_clear();
    let found = found.map_err(|error| match error {
        SearchError::Stopped(table) => Failure::No(anyhow!(
            "stopped after {} of {} layer-steps; they are in {}: go on with --resume",
            table.cells().len(),
            table.cell_count(),
            journal_path.display()
        )),
        other => Failure::Bad(other.into()),
    })?;
    let plan = Plan {
        name: args.name.clone().or(args.preset.map(|p| p.name())),
        ..found.plan
    };
    write(&args.output, &[plan.to_json_pretty().into()])?;
    if let Some(again) = found.repeated
        && again.recorded.loss != again.now
        && !args.quiet
    {
        eprintln!(
            "dfa-rewrite: step {}, layer {} was run again to resume behind it: its loss was {:?} and is {:?} now; another machine or number of threads can decide close cells differently",
            again.step, again.layer, again.recorded.loss, again.now
        );
    }
    let caches = sizes::caches(&loaded.survey, &works);
    let outcome = Outcome {
        output: args.output.display().to_string(),
        journal: journal_path.display().to_string(),
        name: plan.name.clone(),
        delta,
        metric: args.metric.to_string(),
        steps: plan.step_count(),
        layers: plan.layers(),
        counts: counts(&plan),
        account: Account::new(&plan, &works, &caches, None).ok(),
        naive_forwards: found.effort.naive_forwards(),
        // The dense run of step 0 was made before the search began.
        forwards: found.effort.forwards + 1.0,
        seconds: started.elapsed().as_secs_f64(),
    };
    match (args.quiet, args.json) {
        (true, _) => Ok(()),
        (_, true) => print(&(serde_json::to_string_pretty(&outcome)? + "\n")),
        _ => print(&outcome.table()),
    }
}

/// Beside the plan: `plan.json` → `plan.search.jsonl`.
fn journal_path(args: &SearchArgs) -> PathBuf {
    let beside = || args.output.with_extension("search.jsonl");
    args.journal.clone().unwrap_or_else(beside)
}

/// A journal is somebody's work: without being told to, it is neither continued nor overwritten.
fn refuse_journal(path: &Path, args: &SearchArgs) -> Result<(), Failure> {
    let exists = path.metadata().is_ok_and(|m| m.len() > 0);
    if exists && !args.resume && !args.force {
        return Err(Failure::Bad(anyhow!(
            "the journal {} exists: pass --resume to go on with its search, --force to begin anew, or another --journal",
            path.display()
        )));
    }
    Ok(())
}

fn open_journal(path: &Path, args: &SearchArgs) -> Result<File, Failure> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(args.force && !args.resume)
        .open(path)
        .with_context(|| format!("cannot open the journal {}", path.display()))?;
    Ok(file)
}

/// What the search of another δ has decided for this one, too.
fn reuse(path: &Path, settings: &Settings, quiet: bool) -> Result<LossTable, Failure> {
    let bytes = std::fs::read(path)
        .with_context(|| format!("cannot read the journal {}", path.display()))?;
    let other = LossTable::parse(&bytes).with_context(|| format!("{}", path.display()))?;
    let same = Settings {
        delta: settings.delta,
        ..other.settings().clone()
    };
    if same != *settings {
        return Err(Failure::No(anyhow!(
            "the journal {} is of another search, not only of another δ: its model, inputs, window, guidance, metric and candidates must be those of this one",
            path.display()
        )));
    }
    let rederived = other.rederive(settings.delta)?;
    if !quiet {
        eprintln!("dfa-rewrite: {}: {rederived}", path.display());
    }
    Ok(rederived.table)
}

fn settings(
    args: &SearchArgs,
    loaded: &Loaded,
    works: &[LayerWork],
    delta: f64,
) -> Result<Settings, Failure> {
    let plan = &loaded.plan;
    let layers = works.len();
    let mut candidates = match args.candidates.as_slice() {
        [] => candidates_by_cost(works, plan.window, plan.cfg),
        order => candidates_in_order(order, layers, plan.cfg),
    };
    for layer in loaded.survey.layers() {
        let work = works[layer.index].work;
        let covered = work.window_covers(plan.half_width(work.tokens, work.text));
        candidates[layer.index].retain(|action| {
            // A band over everything computes what full attention does.
            let useless = covered && action.is_windowed();
            let impossible = (action.uses_halves() && no_halves(layer, plan.cfg).is_some())
                || (action.is_windowed() && !fits_windows(layer));
            !useless && !impossible
        });
    }
    let feed = loaded.prepared.feed();
    let settings = Settings {
        model_hash: loaded.model_hash.clone(),
        inputs_hash: loaded.inputs_hash.clone(),
        model: Some(loaded.survey.fingerprint()),
        steps: feed.steps(),
        delta,
        metric: args.metric,
        window: plan.window,
        cfg: plan.cfg,
        timesteps: feed.timesteps(),
        text: plan.text,
        candidates,
    };
    settings.validate()?;
    Ok(settings)
}

fn progress_bar(table: &LossTable, args: &SearchArgs) -> ProgressBar {
    let bar = ProgressBar::new(table.cell_count() as u64);
    if args.quiet || !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style =
        ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}  [{elapsed_precise}, {eta} left]");
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.set_position(table.cells().len() as u64);
    bar.reset_eta();
    bar
}

impl Outcome {
    fn table(&self) -> String {
        let mut text = String::new();
        let name = self.name.as_deref().unwrap_or("plan");
        let _ = writeln!(
            text,
            "{name}: δ = {} ({}), {} steps of {} layers: {}",
            self.delta,
            self.metric,
            self.steps,
            self.layers,
            listed(&self.counts)
        );
        if let Some(account) = &self.account {
            let _ = write!(text, "{account}");
        }
        let _ = writeln!(
            text,
            "searched in {:.1} s: {:.1} forward passes run, {} for a loop that resumes nowhere ({:.2})",
            self.seconds,
            self.forwards,
            self.naive_forwards,
            self.forwards / self.naive_forwards.max(1.0)
        );
        let _ = writeln!(
            text,
            "wrote {}; the losses are in {}",
            self.output, self.journal
        );
        text
    }
}
