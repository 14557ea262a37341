//! What all steps of a task share. Owns nothing but the fields' meanings.

use std::sync::atomic::AtomicBool;

use super::epilogue::Epilogue;
use super::kv::KvSource;
use super::load_store::BatchHead;
use super::mask_tile::MaskTile;
use super::prefetch::Prefetch;

/// K and V of a key block for one key/value head.
pub(super) struct KvBlock<'s> {
    pub batch_head: BatchHead,
    pub k: *const f32,
    pub v: *const f32,
    /// Whether the values are known to hold an infinity or a NaN, which must not reach queries that do not see them.
    pub has_non_finite: bool,
    pub k_buf: &'s mut [f32],
    pub v_buf: &'s mut [f32],
}

/// What all steps of a task share.
pub(super) struct Context<'s, A> {
    pub arithmetic: A,
    pub prefetch: Prefetch,
    /// |scale| · log2(e): exponents are base 2.
    pub scale: f32,
    pub head_dim: usize,
    pub v_dim: usize,
    /// `[BLOCK_N, queries]`, scores and then words of probabilities of one tile, see `tile_step`.
    pub scores: &'s mut [f32],
    /// As many, for scores that both sides of the band need; empty but in captures.
    pub edge_scores: &'s mut [f32],
    pub kv: &'s KvSource<'s>,
    pub kv_blocks: Vec<KvBlock<'s>>,
    /// The mask of the block at work; `None` if the call has none.
    pub tile: Option<MaskTile<'s>>,
    /// Whether V is searched for infinities and NaN before it is multiplied.
    pub check_non_finite: bool,
    /// What q is multiplied with: the sign of the scale, or 0.
    pub sign: f32,
    /// `[tokens, channels]`, where Q is converted before it is transposed.
    pub row_buf: &'s mut [f32],
    /// Becomes false if a residual is not finite.
    pub finite: &'s AtomicBool,
    pub epilogue: Epilogue<'s>,
}
