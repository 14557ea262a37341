//! What a run is called with, as far as the state machine looks.

use super::continuity::RunSignature;

/// The request id of runs that do not name one.
pub(super) const ANONYMOUS: i64 = 0;

/// Everything the state machine wants to know of a run that begins.
#[derive(Clone, Debug)]
pub struct Call {
    /// `None` if the elements of the timestep tensor differ, or there are none.
    pub timestep: Option<f64>,
    /// 0: anonymous.
    pub request: i64,
    pub start: bool,
    pub end: bool,
    /// Rows of the batch.
    pub rows: usize,
    pub shapes: FeedShapes,
    /// Needed if `request` is 0: without it an anonymous run is never served from a cache. Of use with
    /// `cfg: separate` too, where it tells the second run of a step from another first one.
    pub signature: Option<RunSignature>,
}

/// Shapes and types of what the model is fed. Two runs of one generation have the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FeedShapes(pub Vec<(u32, Vec<usize>)>);
