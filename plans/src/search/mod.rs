//! Algorithm 1 of DiTFastAttn: the greedy search for a plan, over any model that can be run.
//!
//! This module drives; it holds no tensors and runs no model. [`Denoiser`] is the model,
//! [`LossTable`] the search's state and record, [`Journal`] the record on disk.

mod denoiser;
mod journal;
mod loss;
mod outcome;
mod settings;
mod table;

use std::ops::ControlFlow;

pub use denoiser::{Denoiser, Forward, Trial};
pub use journal::{Journal, JournalError, Record};
pub use loss::{Metric, OutputMismatch, UnknownMetric};
pub use outcome::{Effort, Found, Progress, Repeated, SearchError};
pub use settings::{
    InvalidSettings, PAPER_ORDER, Settings, candidates_by_cost, candidates_in_order,
};
pub use table::{Cell, LossTable, Rederived, Tried};

use crate::Action;
use table::passes;

/// Runs Algorithm 1 from wherever `table` is: a new one, that of a resumed [`Journal`], or one
/// rederived for another δ.
///
/// At every step but the first, layer by layer, the candidates are tried in order, each with the
/// earlier choices of this and of all earlier steps in force and the layers behind it full. The
/// first one whose loss on the model's final output is below `(i / |M|) · δ` is taken; if none
/// is, the layer stays full. Steps run on the trajectory that the choices so far have led to.
/// A larger δ usually saves more, but that is no law: an earlier choice that it allows changes
/// every activation behind it, and may cost more choices there than it gained.
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
