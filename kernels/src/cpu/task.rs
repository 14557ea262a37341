//! One task: some query blocks of some neighbouring heads against all keys that they see.
//!
//! Owns the order of things: which block, when to pack, when to run the epilogue, and what to prefetch meanwhile. Which keys
//! are visible is the business of `key_ranges`, what a block does with them of `tile_step`, memory outside the scratch of
//! `load_store`.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use pulp::{Simd, WithSimd};

use super::block::{QueryBlock, SoftmaxState};
use super::context::{Context, KvBlock};
use super::epilogue::{Epilogue, are_finite, merge_states};
use super::isa::{DotArithmetic, block_m, load, store};
use super::key_ranges::{BandSide, KeySegment, VisibleKeys, hull};
use super::kv::{BLOCK_N, KvOperand, KvSource};
use super::load_store::{BatchHead, gather_channels};
use super::mask_tile::{MaskTile, TileKind};
use super::prefetch::{LineStream, Prefetch};
use super::scratch::Scratch;
use super::tile_step::tile_step;
use crate::api::{Attention, Mode};

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
fn run_task<S: Simd, A: DotArithmetic>(simd: S, t: Task<'_, '_, A>) {
    let a = t.a;
    let s = a.shape;
    let (d, dv) = (s.head_dim, s.v_dim);
    let per_kv = s.heads / s.kv_heads;
    let kv_heads = t.heads.start / per_kv..(t.heads.end - 1) / per_kv + 1;
    let count = t.blocks.len() * t.heads.len();
    let band_sides: &[BandSide] = match a.mode {
        Mode::Full => &[BandSide::All],
        Mode::Window { band, .. } => &[BandSide::Inside(band)],
        Mode::FullCapture { band, .. } => &[BandSide::Inside(band), BandSide::Outside(band)],
    };
    let edge_len = if band_sides.len() == 2 {
        BLOCK_N * block_m::<S>()
    } else {
        0
    };
    let (k_len, v_len) = (t.kv.k.task_len(), t.kv.v.task_len());
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
        transposed,
        lines,
    ] = t.scratch.cut([
        count * d * block_m::<S>(),
        band_sides.len() * count * dv * block_m::<S>(),
        band_sides.len() * count * block_m::<S>(),
        band_sides.len() * count * block_m::<S>(),
        count * block_m::<S>(),
        count * block_m::<S>(),
        BLOCK_N * block_m::<S>(),
        edge_len,
        kv_heads.len() * k_len,
        kv_heads.len() * v_len,
        block_m::<S>() * d,
        Epilogue::len::<S>(dv),
        tile_len,
        tile_len,
    ]);
    let batch = t.batch;
    let (mut k, mut v) = (k, v);
    let kv_blocks = kv_heads
        .clone()
        .map(|head| KvBlock {
            batch_head: BatchHead { batch, head },
            k: std::ptr::null(),
            v: std::ptr::null(),
            has_non_finite: false,
            k_buf: split_off(&mut k, k_len),
            v_buf: split_off(&mut v, v_len),
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

    let queries_of = |block: usize| {
        let first = block * block_m::<S>();
        first..s.q_tokens.min(first + block_m::<S>())
    };
    let mut visible = Vec::with_capacity(t.blocks.len() * band_sides.len());
    for block in t.blocks.clone() {
        let of =
            |side: &BandSide| VisibleKeys::new(*side, queries_of(block), s.kv_tokens, S::F32_LANES);
        visible.extend(band_sides.iter().map(of));
    }
    let visible: Vec<&[VisibleKeys]> = visible.chunks(band_sides.len()).collect();
    let mut blocks: Vec<QueryBlock<'_>> = Vec::with_capacity(count);
    let (mut q, mut o, mut shift, mut width) = (q, o, shift, width);
    let (mut running_max, mut row_sum) = (running_max, row_sum);
    for index in t.blocks.clone() {
        let queries = queries_of(index);
        for head in t.heads.clone() {
            let batch_head = BatchHead { batch, head };
            let q = split_off(&mut q, d * block_m::<S>());
            let [shift, width] = [&mut shift, &mut width].map(|all| split_off(all, block_m::<S>()));
            let state = [0, 1].map(|side| {
                let queries = if side < band_sides.len() {
                    block_m::<S>()
                } else {
                    0
                };
                SoftmaxState {
                    o: split_off(&mut o, dv * queries),
                    running_max: split_off(&mut running_max, queries),
                    row_sum: split_off(&mut row_sum, queries),
                }
            });
            if let Some(band) = band_sides[0].band() {
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
                batch_head,
                kv_head: head / per_kv - kv_heads.start,
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

    // The first queries, keys and values are waited for; all others are prefetched while something else is computed.
    let queries = queries_of(t.blocks.start);
    LineStream::new(&a.q, batch, t.heads.clone(), queries.clone(), d).issue_all();
    let seen = hull(
        visible[0]
            .iter()
            .map(|keys| keys.bounding_range(&(0..s.kv_tokens))),
    );
    let first = seen.start;
    let keys = first..s.kv_tokens.min(first / BLOCK_N * BLOCK_N + BLOCK_N);
    let (head, n) = (kv_heads.start, kv_heads.len());
    let batch_head = BatchHead { batch, head };
    t.kv.k.prefetch(batch_head, n, keys.clone()).issue_all();
    t.kv.v.prefetch(batch_head, n, keys).issue_all();

    let mut context = Context {
        arithmetic: t.arithmetic,
        prefetch: Prefetch::empty(),
        scale,
        head_dim: d,
        v_dim: dv,
        scores,
        edge_scores,
        kv: t.kv,
        kv_blocks,
        tile: a.mask.map(|mask| MaskTile::new(mask, transposed, lines)),
        check_non_finite: false,
        sign,
        row_buf,
        finite: t.finite,
        epilogue: Epilogue { a, strip_buf },
    };
    // A mask tile that heads share serves all of them; else a head at a time takes less of the cache.
    let heads = if a.mask.is_some() { t.heads.len() } else { 1 };
    if heads == 1 {
        blocks.sort_by_key(|block| block.batch_head.head);
    }
    for blocks in blocks.chunks_mut(t.blocks.len() * heads) {
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

/// Splits `n` numbers off the front.
fn split_off<'s>(all: &mut &'s mut [f32], n: usize) -> &'s mut [f32] {
    let (head, tail) = std::mem::take(all).split_at_mut(n);
    *all = tail;
    head
}

/// Q of a block, a query per lane, times the sign, in words; lanes beyond the sequence are zero.
///
/// # Safety
/// The block's queries must lie inside the shape.
#[inline(always)]
unsafe fn pack_q<S: Simd, A: DotArithmetic>(
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

/// Takes every query block over the keys that it sees, and writes its output. `blocks` are those of `heads` heads for the first
/// queries, then for the next; `visible` are those of the queries, for each side.
#[inline(always)]
fn main_loop<S: Simd, A: DotArithmetic>(
    simd: S,
    heads: usize,
    visible: &[&[VisibleKeys]],
    context: &mut Context<'_, A>,
    blocks: &mut [QueryBlock<'_>],
) {
    let a = context.epilogue.a;
    let s = a.shape;
    let mut segments: Vec<Vec<KeySegment>> = visible[0].iter().map(|_| Vec::new()).collect();
    let all =
        blocks.first().map_or(0, |b| b.queries.start)..blocks.last().map_or(0, |b| b.queries.end);
    let block_of = |first: usize| first..s.kv_tokens.min(first + BLOCK_N);
    // A block of keys, and the queries that see some of it.
    let steps: Vec<(usize, usize)> = (0..s.kv_tokens)
        .step_by(BLOCK_N)
        .flat_map(|first| (0..visible.len()).map(move |at| (first, at)))
        .filter(|&(first, at)| {
            let keys = block_of(first);
            visible[at].iter().any(|seen| seen.intersects(&keys))
        })
        .collect();
    let mut ends = vec![None; visible.len()];
    for (i, &(_, at)) in steps.iter().enumerate() {
        ends[at] = Some(i);
    }
    // What queries of the task see of a key block: the rest is neither prefetched nor packed.
    let part_of = |first: usize| {
        let all = visible.iter().copied().flatten();
        hull(all.map(|seen| seen.bounding_range(&block_of(first))))
    };
    let kv = blocks[0].kv_head..blocks[heads - 1].kv_head + 1;
    let BatchHead { batch, head } = blocks[0].batch_head;
    let tiles = (BLOCK_N + s.v_dim) / 6;
    // Steps left with the same keys.
    let mut left = 0;
    for (i, &(first, at)) in steps.iter().enumerate() {
        let keys = block_of(first);
        if left == 0 {
            left = steps[i..].iter().take_while(|s| s.0 == first).count();
            // A block begins where it does, since that is what keys are counted from.
            let keys = first..part_of(first).end;
            for packed in &mut context.kv_blocks[kv.clone()] {
                let (batch_head, all) = (packed.batch_head, context.kv);
                // SAFETY: the keys lie inside the shape.
                unsafe {
                    packed.k = all.k.block(batch_head, keys.clone(), packed.k_buf);
                    packed.v = all.v.block(batch_head, keys.clone(), packed.v_buf);
                    packed.has_non_finite = context.check_non_finite
                        && has_non_finite::<A>(&all.v, packed.v, keys.len());
                }
            }
            if let Some(&(next, _)) = steps.get(i + left) {
                let (batch_head, n, next) = (
                    context.kv_blocks[kv.start].batch_head,
                    kv.len(),
                    part_of(next),
                );
                let (k, v) = (&context.kv.k, &context.kv.v);
                context.prefetch.kv = [
                    k.prefetch(batch_head, n, next.clone()),
                    v.prefetch(batch_head, n, next),
                ];
            }
        }
        if let Some(&(_, next)) = steps.get(i + 1) {
            let block = &blocks[next * heads];
            let (heads, queries) = (head..head + heads, block.queries.clone());
            let [_, q, residual, out] = &mut context.prefetch.next_block;
            if !block.initialized {
                *q = LineStream::new(&a.q, batch, heads.clone(), queries.clone(), s.head_dim);
            }
            if ends[next] == Some(i + 1) {
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
        for (of_side, segments) in visible[at].iter().zip(&mut segments) {
            of_side.segments(keys.clone(), segments);
        }
        for block in unfinished(&mut blocks[at * heads..][..heads]) {
            if !block.initialized {
                block.init();
                // SAFETY: the block's queries lie inside the shape.
                unsafe { pack_q(simd, context, block) };
            }
            if let Some(tile) = &mut context.tile {
                // SAFETY: the block's queries and the keys lie inside the shape.
                unsafe { tile.read::<S>(block.batch_head, block.queries.clone(), keys.clone()) };
                if tile.kind() == TileKind::FullyMasked {
                    continue;
                }
                let (queries, keys) = next_tile::<S>(block.queries.end, &all, &keys, s.kv_tokens);
                context.prefetch.next_block[0] = tile.prefetch(block.batch_head, queries, keys);
            }
            context.prefetch.set_rate(tiles, left);
            tile_step(simd, context, block, keys.clone(), visible[at], &segments);
        }
        left -= 1;
        if ends[at] == Some(i) {
            for block in unfinished(&mut blocks[at * heads..][..heads]) {
                finish_block(simd, context, block);
            }
        }
    }
    // Where queries see nothing, they had no last step. (No iterator's closure: it would not be compiled for
    // the instruction set.)
    for (at, end) in ends.into_iter().enumerate() {
        if end.is_none() {
            for block in unfinished(&mut blocks[at * heads..][..heads]) {
                block.init();
                finish_block(simd, context, block);
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
