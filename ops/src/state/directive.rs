//! What one layer is told to do in one run. Directives do not change during a run.

/// What a layer computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Attention over all keys.
    Full,
    /// Attention inside the band, plus the cached R.
    Window,
    /// Nothing: the cached output is served.
    Reuse,
}

/// Rows of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    All,
    /// The conditional half; the other half copies its result.
    Half,
}

/// What one layer does in one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Directive {
    pub work: Work,
    pub rows: Rows,
    /// Full attention also keeps R.
    pub capture: bool,
    /// The output is kept (or stays kept, for [`Work::Reuse`]).
    pub keep: bool,
    /// R is still read after this run.
    pub(super) residual_live: bool,
    /// Full attention in place of a lost `ast` leaves the R that the plan put there.
    pub(super) preserve_residual: bool,
    /// Second run of a step: the first run's output is still read after it.
    pub(super) first_output_live: bool,
}

impl Directive {
    /// What the caller of a graph with explicit state asks for; nothing is kept between runs.
    pub fn explicit(work: Work, rows: Rows, capture: bool) -> Self {
        Directive {
            work,
            rows,
            capture,
            keep: false,
            residual_live: false,
            preserve_residual: false,
            first_output_live: false,
        }
    }
}
