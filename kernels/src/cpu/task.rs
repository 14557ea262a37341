//! One task: some query blocks of some neighbouring heads against all keys that they see.
//!
//! Owns what a task is made of, its scratch, and what is prefetched before its main loop. The order of things after that
//! is the business of `main_loop`, which keys are visible of `key_ranges`, memory outside the scratch of `load_store`.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use pulp::{Simd, WithSimd};
use smallvec::{SmallVec, smallvec};

use super::block::{QueryBlock, SoftmaxState};
use super::context::{Context, KvBlock};
use super::epilogue::Epilogue;
use super::isa::{DotArithmetic, block_m};
use super::key_ranges::{BandSide, VisibleKeys, hull};
use super::kv::{BLOCK_N, KvSource};
use super::load_store::BatchHead;
use super::main_loop::{Visible, main_loop};
use super::mask_tile::MaskTile;
use super::prefetch::{LineStream, Prefetch};
use super::scratch::Scratch;
use crate::api::{Attention, Band, Mode, Shape};

pub(crate) struct Task<'a, 'b, A> {
    pub a: &'a Attention<'b>,
    pub arithmetic: A,
    pub kv: &'a KvSource<'b>,
    /// Becomes false if a residual is not finite.
    pub finite: &'a AtomicBool,
    pub batch: usize,
    pub heads: Range<usize>,
    /// Query blocks, of `block_m::<S>()` queries each.
    pub blocks: Range<usize>,
    pub scratch: &'a mut Scratch,
}

impl<A: DotArithmetic> WithSimd for Task<'_, '_, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        run_task(simd, self);
    }
}

#[inline(always)]
fn run_task<S: Simd, A: DotArithmetic>(simd: S, task: Task<'_, '_, A>) {
    let a = task.a;
    let s = a.shape;
    let layout = TaskLayout::new(&task);
    let band_sides = layout.band_sides();
    let buffers = TaskBuffers::allocate::<S>(task.scratch, a, task.kv, &layout);
    let (mut k, mut v) = (buffers.k, buffers.v);
    let kv_blocks = layout
        .kv_heads
        .clone()
        .map(|head| KvBlock {
            batch_head: BatchHead {
                batch: layout.batch,
                head,
            },
            k: std::ptr::null(),
            v: std::ptr::null(),
            has_non_finite: false,
            k_buf: split_off(&mut k, task.kv.k.task_len()),
            v_buf: split_off(&mut v, task.kv.v.task_len()),
        })
        .collect();
    // A scale of 0 makes all scores 0 (or NaN), which a zero q does too; −∞ · 0 in the softmax would not.
    let (sign, scale) = if a.scale == 0.0 {
        (0.0, 1.0)
    } else {
        (
            1f32.copysign(a.scale),
            a.scale.abs() * std::f32::consts::LOG2_E,
        )
    };

    let mut visible = Vec::with_capacity(layout.blocks.len() * band_sides.len());
    for block in layout.blocks.clone() {
        let queries = layout.queries::<S>(block);
        let of =
            |side: &BandSide| VisibleKeys::new(*side, queries.clone(), s.kv_tokens, S::F32_LANES);
        visible.extend(band_sides.iter().map(of));
    }
    let visible: Vec<&[VisibleKeys]> = visible.chunks(band_sides.len()).collect();
    let visible = Visible {
        keys: &visible,
        kv_tokens: s.kv_tokens,
    };
    let mut blocks = query_blocks::<S>(&layout, buffers.blocks);
    prefetch_first::<S>(a, task.kv, &layout, &visible);

    let mut context = Context {
        arithmetic: task.arithmetic,
        prefetch: Prefetch::empty(),
        scale,
        head_dim: s.head_dim,
        v_dim: s.v_dim,
        scores: buffers.scores,
        edge_scores: buffers.edge_scores,
        kv: task.kv,
        kv_blocks,
        tile: a
            .mask
            .map(|mask| MaskTile::new(mask, buffers.mask_transposed, buffers.mask_rows)),
        check_non_finite: false,
        sign,
        row_buf: buffers.row_buf,
        finite: task.finite,
        epilogue: Epilogue {
            a,
            strip_buf: buffers.strip_buf,
        },
    };
    // A mask tile that heads share serves all of them; else a head at a time takes less of the cache.
    let heads = if a.mask.is_some() {
        layout.heads.len()
    } else {
        1
    };
    if heads == 1 {
        blocks.sort_by_key(|block| block.batch_head.head);
    }
    for blocks in blocks.chunks_mut(layout.blocks.len() * heads) {
        // A value that is not finite spoils the sums of queries that it is hidden from too, for 0 · ∞ is NaN. That can be
        // seen in the output; to search V first took 4 % of a band's time. Blocks that are spoilt are computed and written
        // once more.
        for check_non_finite in [false, true] {
            if blocks.iter().all(|block| block.done) {
                break;
            }
            context.check_non_finite = check_non_finite;
            blocks
                .iter_mut()
                .for_each(|block| block.initialized = false);
            main_loop(simd, heads, &visible, &mut context, blocks);
        }
    }
}

/// What a task is made of.
struct TaskLayout {
    shape: Shape,
    /// `None` if it is full attention; else the band, and whether the keys outside it are needed too.
    band: Option<(Band, bool)>,
    batch: usize,
    heads: Range<usize>,
    kv_heads: Range<usize>,
    /// Query heads for each key/value head.
    group: usize,
    /// Query blocks.
    blocks: Range<usize>,
}

impl TaskLayout {
    fn new<A>(task: &Task<'_, '_, A>) -> Self {
        let shape = task.a.shape;
        let group = shape.heads / shape.kv_heads;
        TaskLayout {
            shape,
            band: match task.a.mode {
                Mode::Full => None,
                Mode::Window { band, .. } => Some((band, false)),
                Mode::FullCapture { band, .. } => Some((band, true)),
            },
            batch: task.batch,
            heads: task.heads.clone(),
            kv_heads: task.heads.start / group..(task.heads.end - 1) / group + 1,
            group,
            blocks: task.blocks.clone(),
        }
    }

    /// The sides of the band that softmax states are needed for.
    fn band_sides(&self) -> SmallVec<[BandSide; 2]> {
        match self.band {
            None => smallvec![BandSide::All],
            Some((band, false)) => smallvec![BandSide::Inside(band)],
            Some((band, true)) => smallvec![BandSide::Inside(band), BandSide::Outside(band)],
        }
    }

    /// How many they are.
    fn sides(&self) -> usize {
        if matches!(self.band, Some((_, true))) {
            2
        } else {
            1
        }
    }

    /// The queries of a block.
    fn queries<S: Simd>(&self, block: usize) -> Range<usize> {
        let first = block * block_m::<S>();
        first..self.shape.q_tokens.min(first + block_m::<S>())
    }
}

/// The scratch of a task, by use.
struct TaskBuffers<'s> {
    blocks: BlockBuffers<'s>,
    scores: &'s mut [f32],
    edge_scores: &'s mut [f32],
    k: &'s mut [f32],
    v: &'s mut [f32],
    row_buf: &'s mut [f32],
    strip_buf: &'s mut [f32],
    mask_transposed: &'s mut [f32],
    mask_rows: &'s mut [f32],
}

/// What query blocks share out among them.
struct BlockBuffers<'s> {
    q: &'s mut [f32],
    o: &'s mut [f32],
    running_max: &'s mut [f32],
    row_sum: &'s mut [f32],
    shift: &'s mut [f32],
    width: &'s mut [f32],
}

impl<'s> TaskBuffers<'s> {
    #[inline(always)]
    fn allocate<S: Simd>(
        scratch: &'s mut Scratch,
        a: &Attention<'_>,
        kv: &KvSource<'_>,
        layout: &TaskLayout,
    ) -> Self {
        let (d, dv) = (a.shape.head_dim, a.shape.v_dim);
        let count = layout.blocks.len() * layout.heads.len();
        let sides = layout.sides();
        let tile_len = if a.mask.is_some() {
            MaskTile::len::<S>(BLOCK_N)
        } else {
            0
        };
        let [
            q,
            o,
            running_max,
            row_sum,
            shift,
            width,
            scores,
            edge_scores,
            k,
            v,
            row_buf,
            strip_buf,
            mask_transposed,
            mask_rows,
        ] = scratch.cut([
            count * d * block_m::<S>(),
            sides * count * dv * block_m::<S>(),
            sides * count * block_m::<S>(),
            sides * count * block_m::<S>(),
            count * block_m::<S>(),
            count * block_m::<S>(),
            BLOCK_N * block_m::<S>(),
            if sides == 2 {
                BLOCK_N * block_m::<S>()
            } else {
                0
            },
            layout.kv_heads.len() * kv.k.task_len(),
            layout.kv_heads.len() * kv.v.task_len(),
            block_m::<S>() * d,
            Epilogue::len::<S>(dv),
            tile_len,
            tile_len,
        ]);
        TaskBuffers {
            blocks: BlockBuffers {
                q,
                o,
                running_max,
                row_sum,
                shift,
                width,
            },
            scores,
            edge_scores,
            k,
            v,
            row_buf,
            strip_buf,
            mask_transposed,
            mask_rows,
        }
    }
}

/// The query blocks of a task: those of its heads for the first queries, then for the next.
#[inline(always)]
fn query_blocks<'s, S: Simd>(
    layout: &TaskLayout,
    buffers: BlockBuffers<'s>,
) -> Vec<QueryBlock<'s>> {
    let s = layout.shape;
    let mut buffers = buffers;
    let mut blocks = Vec::with_capacity(layout.blocks.len() * layout.heads.len());
    for index in layout.blocks.clone() {
        let queries = layout.queries::<S>(index);
        for head in layout.heads.clone() {
            let q = split_off(&mut buffers.q, s.head_dim * block_m::<S>());
            let [shift, width] =
                [&mut buffers.shift, &mut buffers.width].map(|all| split_off(all, block_m::<S>()));
            let state = [0, 1].map(|side| {
                let queries = if side < layout.sides() {
                    block_m::<S>()
                } else {
                    0
                };
                SoftmaxState {
                    o: split_off(&mut buffers.o, s.v_dim * queries),
                    running_max: split_off(&mut buffers.running_max, queries),
                    row_sum: split_off(&mut buffers.row_sum, queries),
                }
            });
            if let Some((band, _)) = layout.band {
                let text = band.text_range(s.kv_tokens);
                // Half the width: no more is needed, and twice as much is a u32.
                let half = band.half_width.min(s.kv_tokens).min(u32::MAX as usize / 2);
                for lane in 0..block_m::<S>() {
                    let query = (queries.start + lane).min(s.q_tokens - 1);
                    let bits = if text.contains(&query) {
                        [0, u32::MAX]
                    } else {
                        [half.wrapping_sub(query) as u32, 2 * half as u32]
                    };
                    [shift[lane], width[lane]] = bits.map(f32::from_bits);
                }
            }
            blocks.push(QueryBlock {
                batch_head: BatchHead {
                    batch: layout.batch,
                    head,
                },
                kv_head: head / layout.group - layout.kv_heads.start,
                queries: queries.clone(),
                initialized: false,
                done: false,
                q,
                state,
                shift,
                width,
            });
        }
    }
    blocks
}

/// Prefetches the first queries, keys and values, which are waited for; all others are prefetched while something else is
/// computed.
#[inline(always)]
fn prefetch_first<S: Simd>(
    a: &Attention<'_>,
    kv: &KvSource<'_>,
    layout: &TaskLayout,
    visible: &Visible<'_>,
) {
    let s = layout.shape;
    let queries = layout.queries::<S>(layout.blocks.start);
    LineStream::new(
        &a.q,
        layout.batch,
        layout.heads.clone(),
        queries,
        s.head_dim,
    )
    .issue_all();
    let seen = hull(
        visible.keys[0]
            .iter()
            .map(|keys| keys.bounding_range(&(0..s.kv_tokens))),
    );
    let first = seen.start;
    let keys = first..s.kv_tokens.min(first / BLOCK_N * BLOCK_N + BLOCK_N);
    let (head, n) = (layout.kv_heads.start, layout.kv_heads.len());
    let batch_head = BatchHead {
        batch: layout.batch,
        head,
    };
    kv.k.prefetch(batch_head, n, keys.clone()).issue_all();
    kv.v.prefetch(batch_head, n, keys).issue_all();
}

/// Splits `n` numbers off the front.
fn split_off<'s>(all: &mut &'s mut [f32], n: usize) -> &'s mut [f32] {
    let (head, tail) = std::mem::take(all).split_at_mut(n);
    *all = tail;
    head
}
