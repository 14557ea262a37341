//! What a task remembers of its query blocks from key block to key block.

use std::ops::Range;

use super::pack::Plane;

/// What a query block of one head carries from key block to key block; a query per lane.
pub(super) struct Block<'s> {
    pub plane: Plane,
    /// Which of the task's key/value heads it reads.
    pub kv: usize,
    pub queries: Range<usize>,
    /// Whether `q` is there already.
    pub packed: bool,
    /// Whether its output is written.
    pub finished: bool,
    /// Words of `[head_dim, queries]`, pairs being of channels: q, with the sign of the scale.
    pub q: &'s mut [f32],
    /// `[v_dim, queries]`: Σ 2^(score − reference) · v so far.
    pub o: &'s mut [f32],
    /// `[v_dim, queries]`: W, in captures.
    pub w: &'s mut [f32],
    /// The exponent everything is relative to, a score times `Context::scale`; −∞ before the first key.
    pub reference: &'s mut [f32],
    /// Σ 2^(score − reference) so far.
    pub sum: &'s mut [f32],
    /// First key and last key + 1 that the query sees in the band (bits of a u32).
    pub from: &'s mut [f32],
    pub to: &'s mut [f32],
}

impl Block<'_> {
    /// As if it had seen no key yet.
    pub fn clear(&mut self) {
        self.o.fill(0.0);
        self.reference.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
    }
}
