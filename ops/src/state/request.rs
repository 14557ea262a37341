//! One generation between its runs: where it stands and what it keeps.

use std::sync::Arc;

use super::cached::Cached;
use super::caches::LayerCaches;
use super::call::FeedShapes;
use super::continuity::ContinuityTracker;
use super::schedule::Progress;

/// The state of one request id, or of the slot that anonymous runs share. `R` is a run; all that is asked of one here is
/// whether it is the same.
#[derive(Debug)]
pub(super) struct Request<T, R> {
    pub progress: Progress,
    /// Per layer; empty while a run has them.
    pub caches: Vec<LayerCaches<T>>,
    /// Shapes and types of the last run of each branch.
    pub shapes: [Option<FeedShapes>; 2],
    /// The first run of the step at hand was computed in full because caches were lost; so is the second.
    pub recapturing: bool,
    /// The run that owns the caches now.
    pub in_flight: Option<Arc<R>>,
    /// When a run last began or completed, in milliseconds.
    pub last_used: u64,
    pub continuity: ContinuityTracker,
}

impl<T: Cached, R> Request<T, R> {
    pub fn new(now: u64, continuity: ContinuityTracker) -> Self {
        Request {
            progress: Progress::default(),
            caches: Vec::new(),
            shapes: [None, None],
            recapturing: false,
            in_flight: None,
            last_used: now,
            continuity,
        }
    }

    /// Whether `run` owns this request's caches.
    pub fn owned_by(&self, run: &R) -> bool {
        self.in_flight
            .as_ref()
            .is_some_and(|owner| std::ptr::eq(Arc::as_ptr(owner), run))
    }

    /// The generation is over. Returns what it cached.
    pub fn retire(&mut self) -> Vec<LayerCaches<T>> {
        self.progress = Progress::default();
        self.shapes = [None, None];
        self.recapturing = false;
        self.continuity.end();
        std::mem::take(&mut self.caches)
    }

    /// Whether there is nothing that another run could continue.
    pub fn is_blank(&self) -> bool {
        self.in_flight.is_none() && self.progress == Progress::default() && self.caches.is_empty()
    }
}
