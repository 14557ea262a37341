//! What all steps of a task share. Owns nothing but the fields' meanings.

use std::sync::atomic::AtomicBool;

use super::ahead::Prefetch;
use super::finish::Finish;
use super::keys::Keys;
use super::mask::Tile;
use super::pack::Plane;

/// The keys and values of a block for one key/value head.
pub(super) struct Packed<'s> {
    pub plane: Plane,
    pub k: *const f32,
    pub v: *const f32,
    /// Whether the values are known to hold an infinity or a NaN, which must not reach queries that do not see them.
    pub wild: bool,
    pub k_room: &'s mut [f32],
    pub v_room: &'s mut [f32],
}

/// What all steps of a task share.
pub(super) struct Context<'s, A> {
    pub arithmetic: A,
    pub prefetch: Prefetch,
    /// |scale| · log2(e): exponents are base 2.
    pub scale: f32,
    pub head_dim: usize,
    pub v_dim: usize,
    /// `[KEYS, queries]`, scores and then words of probabilities of one block, see `step`.
    pub scores: &'s mut [f32],
    /// As many numbers, for scores that both sides of the band need; of no length but in captures.
    pub corners: &'s mut [f32],
    pub keys: &'s Keys<'s>,
    pub packed: Vec<Packed<'s>>,
    /// The mask of the block at work; `None` if the call has none.
    pub tile: Option<Tile<'s>>,
    /// Whether values are looked at before they are multiplied.
    pub careful: bool,
    /// What q is multiplied with: the sign of the scale, or 0.
    pub sign: f32,
    /// `[tokens, channels]`, on the way in.
    pub rows: &'s mut [f32],
    /// Becomes false if a residual is not finite.
    pub finite: &'s AtomicBool,
    pub finish: Finish<'s>,
}
