//! What a task remembers of its query blocks from key block to key block.

use std::ops::Range;

use super::load_store::BatchHead;

/// What a query block of one head carries from key block to key block; a query per lane.
pub(super) struct QueryBlock<'s> {
    pub batch_head: BatchHead,
    /// Which of the task's key/value heads it reads.
    pub kv_head: usize,
    pub queries: Range<usize>,
    /// Whether it has met its first keys: `q` and `state` hold something since.
    pub initialized: bool,
    /// Whether its output is written.
    pub done: bool,
    /// Words of `[head_dim, queries]`, pairs being of channels: q, with the sign of the scale.
    pub q: &'s mut [f32],
    /// Over all keys that it sees; in captures, over those inside the band, and over the others.
    pub state: [SoftmaxState<'s>; 2],
    /// A query sees a key inside the band if key + `shift` ≤ `width`, in wrapping arithmetic on u32 (these are their bits).
    pub shift: &'s mut [f32],
    pub width: &'s mut [f32],
}

/// Softmax state over the keys of one side of the band. Each side keeps its own running maximum; a shared one would
/// underflow the smaller side to 0 / 0. Empty where only one side is needed.
pub(super) struct SoftmaxState<'s> {
    /// `[v_dim, queries]`: Σ 2^(score − running_max) · v so far.
    pub o: &'s mut [f32],
    /// The exponent everything is relative to, a score times `Context::scale`; −∞ before the first key. Raised lazily: the
    /// largest score may be above it by up to `RESCALE_THRESHOLD`.
    pub running_max: &'s mut [f32],
    /// Σ 2^(score − running_max) so far.
    pub row_sum: &'s mut [f32],
}

impl QueryBlock<'_> {
    /// The state over no keys yet.
    pub fn init(&mut self) {
        self.initialized = true;
        for state in &mut self.state {
            state.o.fill(0.0);
            state.running_max.fill(f32::NEG_INFINITY);
            state.row_sum.fill(0.0);
        }
    }
}

/// Some queries of a block, which are the lanes of a vector from `lane` on.
#[derive(Clone)]
pub(super) struct LaneStrip {
    pub batch_head: BatchHead,
    pub tokens: Range<usize>,
    pub lane: usize,
}
