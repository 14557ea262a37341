//! What a task remembers of its query blocks from key block to key block.

use std::ops::Range;

use super::pack::Plane;

/// What a query block of one head carries from key block to key block; a query per lane.
pub(super) struct Block<'s> {
    pub plane: Plane,
    /// Which of the task's key/value heads it reads.
    pub kv: usize,
    pub queries: Range<usize>,
    /// Whether it has met its first keys: `q` and `sums` hold something since.
    pub begun: bool,
    /// Whether its output is written.
    pub finished: bool,
    /// Words of `[head_dim, queries]`, pairs being of channels: q, with the sign of the scale.
    pub q: &'s mut [f32],
    /// Over all keys that it sees; in captures, over those inside the band, and over the others.
    pub sums: [Sums<'s>; 2],
    /// A query sees a key inside the band if key + `shift` ≤ `width`, numbers without a sign that wrap around (bits of a u32).
    pub shift: &'s mut [f32],
    pub width: &'s mut [f32],
}

/// Sums over keys of one side of the band, with a reference of their own: were it common to both, a side whose scores are
/// far below the other's would come to 0 / 0. Of no numbers where only one is needed.
pub(super) struct Sums<'s> {
    /// `[v_dim, queries]`: Σ 2^(score − reference) · v so far.
    pub o: &'s mut [f32],
    /// The exponent everything is relative to, a score times `Context::scale`; −∞ before the first key.
    pub reference: &'s mut [f32],
    /// Σ 2^(score − reference) so far.
    pub sum: &'s mut [f32],
}

impl Block<'_> {
    /// Sums over no keys yet.
    pub fn begin(&mut self) {
        self.begun = true;
        for sums in &mut self.sums {
            sums.o.fill(0.0);
            sums.reference.fill(f32::NEG_INFINITY);
            sums.sum.fill(0.0);
        }
    }
}
