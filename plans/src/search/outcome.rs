//! What a search tells: its progress, its plan and what that took, or why there is none.

use std::fmt;

use super::journal::JournalError;
use super::loss::OutputMismatch;
use super::table::{Cell, LossTable, Tried};
use crate::Plan;

/// What a search has run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Effort {
    /// Dense runs, and at most one run to restore the base of a resumed step.
    pub bases: usize,
    /// Trials.
    pub trials: usize,
    /// Committed steps.
    pub commits: usize,
    /// All of it in forward passes, as the [`Denoiser`](crate::Denoiser) reported.
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
