//! The main loop of a task: every query block over the keys that it sees, in key order.
//!
//! Owns what happens at each key block: pack K and V, prefetch what comes next, pack queries that meet their first keys, run
//! the tile step, run the epilogue of queries that have met their last.

use std::ops::Range;
use std::sync::atomic::Ordering;

use pulp::Simd;

use super::block::QueryBlock;
use super::context::Context;
use super::epilogue::{are_finite, merge_states};
use super::isa::{DotArithmetic, MR, block_m, load, store};
use super::key_ranges::{KeySegment, VisibleKeys, hull};
use super::kv::{BLOCK_N, KvOperand};
use super::load_store::gather_channels;
use super::mask_tile::TileKind;
use super::prefetch::LineStream;
use super::tile_step::tile_step;
use crate::api::Mode;

/// What queries of a task see of the keys.
pub(super) struct Visible<'a> {
    /// Of each group of queries, for each side of the band.
    pub keys: &'a [&'a [VisibleKeys]],
    /// Keys in the sequence.
    pub kv_tokens: usize,
}

impl Visible<'_> {
    /// The key block that begins at `first`.
    fn block(&self, first: usize) -> Range<usize> {
        first..self.kv_tokens.min(first + BLOCK_N)
    }

    /// What queries of the task see of a key block: the rest is neither prefetched nor packed.
    fn part(&self, first: usize) -> Range<usize> {
        let all = self.keys.iter().copied().flatten();
        hull(all.map(|seen| seen.bounding_range(&self.block(first))))
    }
}

/// Which queries meet which keys, in order.
struct Schedule {
    /// The first key of a block, and the queries that see some of it.
    steps: Vec<(usize, usize)>,
    /// The last step of each group of queries; `None` where they see nothing.
    last: Vec<Option<usize>>,
}

impl Schedule {
    fn new(visible: &Visible<'_>) -> Self {
        let steps: Vec<(usize, usize)> = (0..visible.kv_tokens)
            .step_by(BLOCK_N)
            .flat_map(|first| (0..visible.keys.len()).map(move |at| (first, at)))
            .filter(|&(first, at)| {
                let keys = visible.block(first);
                visible.keys[at].iter().any(|seen| seen.intersects(&keys))
            })
            .collect();
        let mut last = vec![None; visible.keys.len()];
        for (i, &(_, at)) in steps.iter().enumerate() {
            last[at] = Some(i);
        }
        Schedule { steps, last }
    }

    /// How many steps from step `i` on have its keys.
    fn steps_with_keys_of(&self, i: usize) -> usize {
        let first = self.steps[i].0;
        self.steps[i..].iter().take_while(|s| s.0 == first).count()
    }
}

/// Takes every query block over the keys that it sees, and writes its output. `blocks` are those of `heads` heads for the
/// first queries, then for the next.
#[inline(always)]
pub(super) fn main_loop<S: Simd, A: DotArithmetic>(
    simd: S,
    heads: usize,
    visible: &Visible<'_>,
    context: &mut Context<'_, A>,
    blocks: &mut [QueryBlock<'_>],
) {
    let mut segments: Vec<Vec<KeySegment>> = visible.keys[0].iter().map(|_| Vec::new()).collect();
    let queries =
        blocks.first().map_or(0, |b| b.queries.start)..blocks.last().map_or(0, |b| b.queries.end);
    let schedule = Schedule::new(visible);
    let kv_heads = blocks[0].kv_head..blocks[heads - 1].kv_head + 1;
    let tiles = (BLOCK_N + context.v_dim) / MR;
    // Steps left with the same keys.
    let mut left = 0;
    for (i, &(first, at)) in schedule.steps.iter().enumerate() {
        let keys = visible.block(first);
        if left == 0 {
            left = schedule.steps_with_keys_of(i);
            // A block begins where it does, since that is what keys are counted from.
            pack_kv(context, kv_heads.clone(), first..visible.part(first).end);
            if let Some(&(next, _)) = schedule.steps.get(i + left) {
                prefetch_kv(context, kv_heads.clone(), visible.part(next));
            }
        }
        if let Some(&(_, next)) = schedule.steps.get(i + 1) {
            let is_last = schedule.last[next] == Some(i + 1);
            prefetch_queries(context, &blocks[next * heads..][..heads], is_last);
        }
        for (of_side, segments) in visible.keys[at].iter().zip(&mut segments) {
            of_side.segments(keys.clone(), segments);
        }
        for block in unfinished(&mut blocks[at * heads..][..heads]) {
            if !block.initialized {
                block.init();
                // SAFETY: the block's queries lie inside the shape.
                unsafe { load_q(simd, context, block) };
            }
            if let Some(tile) = &mut context.tile {
                // SAFETY: the block's queries and the keys lie inside the shape.
                unsafe { tile.read::<S>(block.batch_head, block.queries.clone(), keys.clone()) };
                if tile.kind() == TileKind::FullyMasked {
                    continue;
                }
                let (queries, keys) =
                    next_tile::<S>(block.queries.end, &queries, &keys, visible.kv_tokens);
                context.prefetch.next_block[0] = tile.prefetch(block.batch_head, queries, keys);
            }
            context.prefetch.set_rate(tiles, left);
            tile_step(
                simd,
                context,
                block,
                keys.clone(),
                visible.keys[at],
                &segments,
            );
        }
        left -= 1;
        if schedule.last[at] == Some(i) {
            for block in unfinished(&mut blocks[at * heads..][..heads]) {
                finish_block(simd, context, block);
            }
        }
    }
    // Where queries see nothing, they had no last step. (No iterator's closure: it would not be compiled for
    // the instruction set.)
    for (at, last) in schedule.last.into_iter().enumerate() {
        if last.is_none() {
            for block in unfinished(&mut blocks[at * heads..][..heads]) {
                block.init();
                finish_block(simd, context, block);
            }
        }
    }
}

/// Packs the keys `keys` of some heads, or finds where they are.
#[inline(always)]
fn pack_kv<A: DotArithmetic>(
    context: &mut Context<'_, A>,
    kv_heads: Range<usize>,
    keys: Range<usize>,
) {
    for packed in &mut context.kv_blocks[kv_heads] {
        let (batch_head, all) = (packed.batch_head, context.kv);
        // SAFETY: the keys lie inside the shape.
        unsafe {
            packed.k = all.k.block(batch_head, keys.clone(), packed.k_buf);
            packed.v = all.v.block(batch_head, keys.clone(), packed.v_buf);
            packed.has_non_finite =
                context.check_non_finite && has_non_finite::<A>(&all.v, packed.v, keys.len());
        }
    }
}

/// Prefetches the keys `keys` of some heads.
#[inline(always)]
fn prefetch_kv<A>(context: &mut Context<'_, A>, kv_heads: Range<usize>, keys: Range<usize>) {
    let batch_head = context.kv_blocks[kv_heads.start].batch_head;
    let (k, v) = (&context.kv.k, &context.kv.v);
    context.prefetch.kv = [
        k.prefetch(batch_head, kv_heads.len(), keys.clone()),
        v.prefetch(batch_head, kv_heads.len(), keys),
    ];
}

/// Prefetches what the next step needs, whose blocks these are: their queries, and residual and output if the step is their
/// last.
#[inline(always)]
fn prefetch_queries<A>(context: &mut Context<'_, A>, blocks: &[QueryBlock<'_>], is_last: bool) {
    let (a, s) = (context.epilogue.a, context.epilogue.a.shape);
    let (batch, head) = (blocks[0].batch_head.batch, blocks[0].batch_head.head);
    let (heads, queries) = (head..head + blocks.len(), blocks[0].queries.clone());
    let [_, q, residual, out] = &mut context.prefetch.next_block;
    if !blocks[0].initialized {
        *q = LineStream::new(&a.q, batch, heads.clone(), queries.clone(), s.head_dim);
    }
    if is_last {
        *residual = match &a.mode {
            Mode::Window {
                residual: Some(r), ..
            } => LineStream::new(r, batch, heads.clone(), queries.clone(), s.v_dim),
            Mode::FullCapture { residual: r, .. } => {
                LineStream::output(r, batch, heads.clone(), queries.clone(), s.v_dim)
            }
            _ => LineStream::empty(),
        };
        *out = LineStream::output(&a.out, batch, heads, queries, s.v_dim);
    }
}

/// Q of a block, a query per lane, times the sign, in words; lanes beyond the sequence are zero.
///
/// # Safety
/// The block's queries must lie inside the shape.
#[inline(always)]
unsafe fn load_q<S: Simd, A: DotArithmetic>(
    simd: S,
    context: &mut Context<'_, A>,
    block: &mut QueryBlock<'_>,
) {
    let a = context.epilogue.a;
    let (q, queries, rows) = (&mut *block.q, block.queries.clone(), &mut *context.row_buf);
    let (arithmetic, sign) = (context.arithmetic, context.sign);
    let d = a.shape.head_dim;
    if queries.len() < block_m::<S>() {
        q.fill(0.0);
    }
    // SAFETY: promised by the caller.
    unsafe { gather_channels::<S>(&a.q, block.batch_head, queries, d, block_m::<S>(), q, rows) };
    if sign != 1.0 {
        for x in q.iter_mut() {
            *x *= sign;
        }
    }
    if A::ELEMS_PER_WORD == 2 {
        assert!(q.len() >= d * block_m::<S>());
        let none = simd.splat_f32s(0.0);
        let q = q.as_mut_ptr();
        for pair in 0..d.div_ceil(2) {
            for lane in (0..block_m::<S>()).step_by(S::F32_LANES) {
                let line = |channel: usize| q.wrapping_add(channel * block_m::<S>() + lane);
                // SAFETY: the channels are below d; a pair is written where nothing is read any more.
                unsafe {
                    let first = load(simd, line(2 * pair));
                    let second = if 2 * pair + 1 < d {
                        load(simd, line(2 * pair + 1))
                    } else {
                        none
                    };
                    store(simd, line(pair), arithmetic.pack_pair(simd, first, second));
                }
            }
        }
    }
}

/// The second time around only what was spoilt is computed again.
fn unfinished<'b, 's>(
    blocks: &'b mut [QueryBlock<'s>],
) -> impl Iterator<Item = &'b mut QueryBlock<'s>> {
    blocks.iter_mut().filter(|block| !block.done)
}

/// Writes a block's output. It is not done if it may be spoilt by a value that it does not see.
#[inline(always)]
fn finish_block<S: Simd, A: DotArithmetic>(
    simd: S,
    context: &mut Context<'_, A>,
    block: &mut QueryBlock<'_>,
) {
    let a = context.epilogue.a;
    if let Mode::FullCapture { .. } = a.mode {
        merge_states(simd, block, a.mask.is_some());
    }
    let hides = a.mask.is_some() || !matches!(a.mode, Mode::Full);
    let doubtful = hides && !context.check_non_finite;
    // A residual that lies where the output goes can be added once only.
    let in_place = match &a.mode {
        Mode::Window {
            residual: Some(r), ..
        } => std::ptr::eq(r.data, a.out.data),
        _ => false,
    };
    if doubtful && in_place && !are_finite(simd, block.state[0].o, block.queries.len()) {
        return;
    }
    // SAFETY: the block's queries lie inside the shape, and belong to this task alone.
    let finite = unsafe { context.epilogue.run(simd, block) };
    if doubtful && !in_place && !finite.out {
        return;
    }
    block.done = true;
    if !finite.residual {
        context.finite.store(false, Ordering::Relaxed);
    }
}

/// The queries and keys of the mask tile after the query block that ends at `end`, if the band hides none of them; `all` are
/// the queries of the task.
fn next_tile<S: Simd>(
    end: usize,
    all: &Range<usize>,
    keys: &Range<usize>,
    kv_tokens: usize,
) -> (Range<usize>, Range<usize>) {
    let (first, keys) = if end < all.end {
        (end, keys.clone())
    } else {
        (all.start, keys.end..kv_tokens.min(keys.end + BLOCK_N))
    };
    (first..all.end.min(first + block_m::<S>()), keys)
}

/// Whether the values of the first keys of a block hold an infinity or a NaN.
///
/// # Safety
/// The block must have so many keys.
#[inline(always)]
unsafe fn has_non_finite<A: DotArithmetic>(
    values: &KvOperand<'_>,
    block: *const f32,
    keys: usize,
) -> bool {
    // x · 0 is NaN for an x that is not finite, and stays NaN in a sum.
    let (mut sum, mut rest) = ([0f32; 16], 0.0);
    // SAFETY: promised by the caller.
    unsafe {
        values.lines(block, keys, |line| {
            let (lines, last) = line.as_chunks::<16>();
            for x in lines {
                for i in 0..16 {
                    let [a, b] = A::unpack(x[i]);
                    sum[i] += a * 0.0 + b * 0.0;
                }
            }
            for x in last {
                let [a, b] = A::unpack(*x);
                rest += a * 0.0 + b * 0.0;
            }
        });
    }
    sum.iter().any(|&x| x != 0.0) || rest != 0.0
}
