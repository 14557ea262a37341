//! Algorithm 1 of DiTFastAttn: the greedy search for a plan, over any model that can be run.
//!
//! At every step but the first, layer by layer, the candidates are tried in order, each with the
//! earlier choices of this and of all earlier steps in force and the layers behind it full. The
//! first one whose loss on the model's final output is below `(i / |M|) · δ` is taken; if none
//! is, the layer stays full. Steps run on the trajectory that the choices so far have led to.
//!
//! This module drives; it holds no tensors and runs no model. [`Denoiser`] is the model,
//! [`LossTable`] the search's state and record, [`Journal`] the record on disk.
//!
//! A larger δ usually saves more, but that is no law: an earlier choice that a larger δ allows
//! changes every activation behind it, and may cost more choices there than it gained.

mod journal;
mod loss;
mod settings;
mod table;

use std::fmt;
use std::ops::ControlFlow;

pub use journal::{Journal, JournalError, Record};
pub use loss::{Metric, OutputMismatch, UnknownMetric};
pub use settings::{
    InvalidSettings, PAPER_ORDER, Settings, candidates_by_cost, candidates_in_order,
};
pub use table::{Cell, LossTable, Rederived, Tried};

use crate::{Action, Plan};
use table::passes;

/// The model under search, with its scheduler, its calibration inputs and its caches.
///
/// For each step t from 1 the search calls [`base`](Denoiser::base) with no choices, then for each
/// layer some [`trial`](Denoiser::trial)s, after each that is taken [`accept`](Denoiser::accept),
/// and last [`commit`](Denoiser::commit). Step 0, and steps that a journal has decided, are only
/// committed.
///
/// # Caches
///
/// There are two kinds, as in a plan (`docs/plan-format.md`): of each layer the residual R of its
/// latest `full` or `asc` and the latest output that was not `ast`, both *of committed steps*.
/// `base` and `trial` read them and never change them; only `commit` does. While searching, every
/// `full` or `asc` has to leave R behind, because nobody knows yet which steps will read it.
///
/// # Cost
///
/// What has run once need not run again. The *base* is the latest `base` or accepted trial of the
/// step. A trial at layer l equals the base in front of l, so it can resume there with the base's
/// activations; that includes the dense run's, for as long as every choice was `full`. If the base
/// is the row of the `commit` (compare: after a resume it may not be), the commit has been run.
/// An implementation that runs everything from the start at every call is right too. What a call
/// has run it returns as a fraction of a forward pass.
pub trait Denoiser {
    /// Why a run failed; handed through.
    type Error;

    /// Runs `step`, after all committed steps, with `chosen` in the first layers and `full` in
    /// the rest, and makes it the base. The step's first call has no choices: that is the dense
    /// output, the reference of every loss. A second one only follows after a resume.
    ///
    /// # Errors
    ///
    /// Whatever keeps the model from running; it ends the search.
    fn base(&mut self, step: usize, chosen: &[Action]) -> Result<Forward, Self::Error>;

    /// Runs a step with some layers chosen, one on trial and the rest `full`. The output has the
    /// shapes that `base` returned.
    ///
    /// # Errors
    ///
    /// As [`base`](Denoiser::base).
    fn trial(&mut self, trial: &Trial<'_>) -> Result<Forward, Self::Error>;

    /// The latest trial was taken: it is the base from now on. Returns what it had to run for
    /// that, usually nothing.
    ///
    /// # Errors
    ///
    /// As [`base`](Denoiser::base).
    fn accept(&mut self, trial: &Trial<'_>) -> Result<f64, Self::Error> {
        let _ = trial;
        Ok(0.0)
    }

    /// Runs `step` as `row` says, one action per layer, updates the caches, and hands the output
    /// to the scheduler, so that the next call can be about `step + 1`. Returns the fraction of a
    /// forward pass that it ran.
    ///
    /// # Errors
    ///
    /// As [`base`](Denoiser::base).
    fn commit(&mut self, step: usize, row: &[Action]) -> Result<f64, Self::Error>;
}

/// What is to be run: `step` with `prefix` in the first layers, `candidate` in the layer behind
/// them, `full` in the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial<'a> {
    /// The step, from 1.
    pub step: usize,
    /// The choices for layers 0 to `layer − 1`.
    pub prefix: &'a [Action],
    /// What is tried at `layer`.
    pub candidate: Action,
}

impl Trial<'_> {
    /// The layer on trial, from 0.
    pub fn layer(&self) -> usize {
        self.prefix.len()
    }

    /// The whole row, for a model of `layers` layers.
    pub fn row(&self, layers: usize) -> Vec<Action> {
        let mut row = self.prefix.to_vec();
        row.push(self.candidate);
        row.resize(layers, Action::Full);
        row
    }
}

/// The outcome of one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Forward {
    /// The model's final output in front of the scheduler and of guidance: for each calibration
    /// sample all its elements (both halves of guidance, all channels), in any fixed order. The
    /// loss is averaged over samples.
    pub samples: Vec<Vec<f32>>,
    /// What was run, as a fraction of a forward pass over all samples; 1 without any reuse. Under
    /// `cfg: separate` both runs of a step are one forward pass.
    pub forwards: f64,
}

/// What a search has run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Effort {
    /// Dense runs, and at most one run to restore the base of a resumed step.
    pub bases: usize,
    /// Trials.
    pub trials: usize,
    /// Committed steps.
    pub commits: usize,
    /// All of it in forward passes, as the [`Denoiser`] reported.
    pub forwards: f64,
}

impl Effort {
    /// What the same calls cost at one full forward pass each, as the authors' code runs them.
    pub fn naive_forwards(&self) -> f64 {
        (self.bases + self.trials + self.commits) as f64
    }
}

/// Where a search is, after each decided layer-step.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The layer-step just decided.
    pub cell: &'a Cell,
    /// The threshold that its losses had to stay below.
    pub threshold: f64,
    /// Layer-steps decided so far.
    pub decided: usize,
    /// Layer-steps to decide in all.
    pub cells: usize,
    /// What this process has run so far.
    pub effort: Effort,
}

/// A choice that was run again, to resume behind it, and its two losses. They are equal where the
/// model computes the same bits again (same machine, same number of threads).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Repeated {
    /// The step.
    pub step: usize,
    /// The layer.
    pub layer: usize,
    /// The candidate and the loss that was recorded.
    pub recorded: Tried,
    /// Its loss now.
    pub now: Option<f64>,
}

/// A finished search.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The plan. It has no name yet.
    pub plan: Plan,
    /// Every decision with its losses, for another δ ([`LossTable::rederive`]).
    pub table: LossTable,
    /// What was run.
    pub effort: Effort,
    /// What was run twice because the search was resumed in the middle of a step.
    pub repeated: Option<Repeated>,
}

/// Why a search ended without a plan. What it had decided is in the journal.
#[derive(Debug, thiserror::Error)]
pub enum SearchError<E> {
    /// The model could not be run.
    #[error("{0}")]
    Denoiser(E),
    /// The journal could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Outputs of one step have different shapes.
    #[error("step {step}: {mismatch}")]
    Output {
        /// The step.
        step: usize,
        /// The difference.
        mismatch: OutputMismatch,
    },
    /// There is nothing to compare with.
    #[error(
        "the dense output of step {0} has no elements, or an infinity or NaN among them; check the model and the calibration inputs"
    )]
    Reference(usize),
    /// The observer stopped the search; this is what it had decided.
    #[error("the search was stopped after {} of {} layer-steps", .0.cells().len(), .0.cell_count())]
    Stopped(Box<LossTable>),
}

/// Runs Algorithm 1 from wherever `table` is: a new one, that of a resumed [`Journal`], or one
/// rederived for another δ.
///
/// Each decided layer-step goes to `journal` (`&mut ()` keeps none) and then to `observe`, which
/// can stop the search. A table that is complete already needs no run at all.
///
/// ```
/// use std::ops::ControlFlow;
/// use ditfastattn_plans::*;
///
/// /// One layer whose output falls to nothing; sharing it across steps is off by 1 %.
/// struct Model(f32);
///
/// impl Denoiser for Model {
///     type Error = std::convert::Infallible;
///
///     fn base(&mut self, _step: usize, _chosen: &[Action]) -> Result<Forward, Self::Error> {
///         Ok(Forward { samples: vec![vec![self.0]], forwards: 1.0 })
///     }
///
///     fn trial(&mut self, trial: &Trial<'_>) -> Result<Forward, Self::Error> {
///         let off = if trial.candidate == Action::Ast { 1.01 } else { 1.0001 };
///         Ok(Forward { samples: vec![vec![self.0 * off]], forwards: 1.0 })
///     }
///
///     fn commit(&mut self, _step: usize, _row: &[Action]) -> Result<f64, Self::Error> {
///         self.0 *= 0.5;
///         Ok(1.0)
///     }
/// }
///
/// let work = Workload { tokens: 4096, text: 0, width: 1152, rows: 2 };
/// let settings = Settings {
///     model_hash: "sha256 of the model".to_owned(),
///     inputs_hash: "sha256 of the calibration inputs".to_owned(),
///     model: None,
///     steps: 3,
///     delta: 0.005,
///     metric: Metric::Mrae,
///     window: DEFAULT_WINDOW,
///     cfg: Cfg::CondFirst,
///     timesteps: None,
///     text: None,
///     candidates: candidates_by_cost(&[work.into()], DEFAULT_WINDOW, Cfg::CondFirst),
/// };
/// // In a file: `Journal::open(file, &settings)?`, which also resumes.
/// let mut lines = Vec::new();
/// let mut journal = Journal::new(&mut lines, &settings)?;
/// let mut observe = |progress: &Progress<'_>| {
///     println!("{progress}");
///     ControlFlow::Continue(())
/// };
/// let table = LossTable::new(settings)?;
/// let found = search(&mut Model(1.0), table, &mut journal, &mut observe)?;
/// assert_eq!(found.plan.steps, [[Action::Full], [Action::WaRsAsc], [Action::WaRsAsc]]);
/// assert_eq!(found.effort.naive_forwards(), 2.0 + 4.0 + 3.0);
/// assert_eq!(LossTable::parse(&lines)?, found.table);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// See [`SearchError`].
pub fn search<D: Denoiser>(
    denoiser: &mut D,
    mut table: LossTable,
    journal: &mut dyn Record,
    observe: &mut dyn FnMut(&Progress<'_>) -> ControlFlow<()>,
) -> Result<Found, SearchError<D::Error>> {
    journal.catch_up(&table)?;
    let mut runner = Runner {
        denoiser,
        effort: Effort::default(),
        repeated: None,
    };
    if let Some((first, _)) = table.next() {
        let decided = table.plan();
        for step in 0..first {
            runner.commit(step, &decided.steps[step])?;
        }
        for step in first..table.settings().steps {
            runner.step(step, &mut table, journal, observe)?;
        }
    }
    Ok(Found {
        plan: table.plan(),
        effort: runner.effort,
        repeated: runner.repeated,
        table,
    })
}

struct Runner<'a, D> {
    denoiser: &'a mut D,
    effort: Effort,
    repeated: Option<Repeated>,
}

impl<D: Denoiser> Runner<'_, D> {
    fn step(
        &mut self,
        step: usize,
        table: &mut LossTable,
        journal: &mut dyn Record,
        observe: &mut dyn FnMut(&Progress<'_>) -> ControlFlow<()>,
    ) -> Result<(), SearchError<D::Error>> {
        let reference = Reference {
            step,
            metric: table.settings().metric,
            samples: self.base(step, &[])?.samples,
        };
        let mut elements = reference.samples.iter().flatten().peekable();
        if elements.peek().is_none() || elements.any(|x| !x.is_finite()) {
            return Err(SearchError::Reference(step));
        }
        let mut prefix = table.prefix();
        // Choices that were made without running them now are not in the base yet.
        let mut base_is_behind = prefix.iter().any(|action| *action != Action::Full);
        while prefix.len() < table.settings().layers() {
            let layer = prefix.len();
            let threshold = table.settings().threshold(layer);
            let candidates = table.settings().candidates[layer].clone();
            let mut tried = table.take_known();
            let passed = tried.iter().position(|t| passes(t.loss, threshold));
            if let Some(i) = passed {
                tried.truncate(i + 1);
                base_is_behind = true;
            }
            let mut passed = passed.is_some();
            while !passed && tried.len() < candidates.len() {
                if base_is_behind {
                    self.restore(&reference, table, &prefix)?;
                    base_is_behind = false;
                }
                let trial = Trial {
                    step,
                    prefix: &prefix,
                    candidate: candidates[tried.len()],
                };
                let loss = reference.loss(&self.trial(&trial)?)?;
                tried.push(Tried {
                    action: trial.candidate,
                    loss,
                });
                passed = passes(loss, threshold);
                if passed {
                    self.accept(&trial)?;
                }
            }
            let action = match tried.last() {
                Some(last) if passed => last.action,
                _ => Action::Full,
            };
            prefix.push(action);
            let cell = Cell {
                step,
                layer,
                action,
                tried,
            };
            journal.record(&cell)?;
            table
                .push(cell)
                .expect("the search decides cells in order and by their losses");
            let progress = Progress {
                cell: table.cells().last().expect("a cell was pushed"),
                threshold,
                decided: table.cells().len(),
                cells: table.cell_count(),
                effort: self.effort,
            };
            if observe(&progress).is_break() && !table.is_complete() {
                return Err(SearchError::Stopped(Box::new(table.clone())));
            }
        }
        self.commit(step, &prefix)
    }

    /// Makes the choices of a resumed step the base.
    fn restore(
        &mut self,
        reference: &Reference,
        table: &LossTable,
        prefix: &[Action],
    ) -> Result<(), SearchError<D::Error>> {
        let now = reference.loss(&self.base(reference.step, prefix)?)?;
        let cells = &table.cells()[table.cells().len() - prefix.len()..];
        let latest = cells.iter().rfind(|cell| cell.action != Action::Full);
        self.repeated = latest.and_then(|cell| {
            Some(Repeated {
                step: cell.step,
                layer: cell.layer,
                recorded: *cell.tried.last()?,
                now,
            })
        });
        Ok(())
    }

    fn base(&mut self, step: usize, chosen: &[Action]) -> Result<Forward, SearchError<D::Error>> {
        let run = self.denoiser.base(step, chosen);
        let run = run.map_err(SearchError::Denoiser)?;
        self.effort.bases += 1;
        self.effort.forwards += run.forwards;
        Ok(run)
    }

    fn trial(&mut self, trial: &Trial<'_>) -> Result<Forward, SearchError<D::Error>> {
        let run = self.denoiser.trial(trial).map_err(SearchError::Denoiser)?;
        self.effort.trials += 1;
        self.effort.forwards += run.forwards;
        Ok(run)
    }

    fn accept(&mut self, trial: &Trial<'_>) -> Result<(), SearchError<D::Error>> {
        self.effort.forwards += self.denoiser.accept(trial).map_err(SearchError::Denoiser)?;
        Ok(())
    }

    fn commit(&mut self, step: usize, row: &[Action]) -> Result<(), SearchError<D::Error>> {
        let forwards = self
            .denoiser
            .commit(step, row)
            .map_err(SearchError::Denoiser)?;
        self.effort.commits += 1;
        self.effort.forwards += forwards;
        Ok(())
    }
}

/// The dense output of a step.
struct Reference {
    step: usize,
    metric: Metric,
    samples: Vec<Vec<f32>>,
}

impl Reference {
    fn loss<E>(&self, run: &Forward) -> Result<Option<f64>, SearchError<E>> {
        let loss = self.metric.loss(&self.samples, &run.samples);
        loss.map_err(|mismatch| SearchError::Output {
            step: self.step,
            mismatch,
        })
    }
}

impl fmt::Display for Progress<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Progress {
            cell,
            decided,
            cells,
            ..
        } = self;
        write!(
            f,
            "{decided}/{cells}: step {}, layer {}: {}",
            cell.step, cell.layer, cell.action
        )
    }
}
