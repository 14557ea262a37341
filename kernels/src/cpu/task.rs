//! One task: some query blocks of some neighbouring heads against all keys that they see.
//!
//! Owns the order of things: which block, when to pack and finish, and what to ask for meanwhile. Which keys are seen is
//! `sight`'s business, what a block does with them `step`'s, memory outside the scratch `pack`'s.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use pulp::{Simd, WithSimd};

use super::ahead::{Ahead, Prefetch};
use super::arithmetic::Arithmetic;
use super::block::{Block, Sums};
use super::context::{Context, Packed};
use super::finish::{Finish, are_finite, merge};
use super::gemm::row_len;
use super::keys::{KEYS, Keys, Matrix};
use super::mask::{Effect, Tile};
use super::pack::{Plane, gather_channels};
use super::scratch::Scratch;
use super::sight::{Segment, Side, Sight, hull};
use super::step::step;
use super::vector::{load, store};
use crate::api::{Attention, Mode};

pub(crate) struct Task<'a, 'b, A> {
    pub a: &'a Attention<'b>,
    pub arithmetic: A,
    pub keys: &'a Keys<'b>,
    /// Becomes false if a residual is not finite.
    pub finite: &'a AtomicBool,
    pub batch: usize,
    pub heads: Range<usize>,
    /// Query blocks, of `row_len::<S>()` queries each.
    pub blocks: Range<usize>,
    pub scratch: &'a mut Scratch,
}

impl<A: Arithmetic> WithSimd for Task<'_, '_, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        run(simd, self);
    }
}

#[inline(always)]
fn run<S: Simd, A: Arithmetic>(simd: S, t: Task<'_, '_, A>) {
    let a = t.a;
    let s = a.shape;
    let (d, dv) = (s.head_dim, s.v_dim);
    let per_kv = s.heads / s.kv_heads;
    let kv_heads = t.heads.start / per_kv..(t.heads.end - 1) / per_kv + 1;
    let count = t.blocks.len() * t.heads.len();
    let sides: &[Side] = match a.mode {
        Mode::Full => &[Side::All],
        Mode::Window { band, .. } => &[Side::Inside(band)],
        Mode::FullCapture { band, .. } => &[Side::Inside(band), Side::Outside(band)],
    };
    let corners_len = if sides.len() == 2 {
        KEYS * row_len::<S>()
    } else {
        0
    };
    let (k_len, v_len) = (t.keys.k.task_len(), t.keys.v.task_len());
    let tile_len = if a.mask.is_some() {
        Tile::len::<S>(KEYS)
    } else {
        0
    };

    let [
        q,
        o,
        reference,
        sum,
        shift,
        width,
        scores,
        corners,
        k,
        v,
        rows,
        strips,
        turned,
        lines,
    ] = t.scratch.cut([
        count * d * row_len::<S>(),
        sides.len() * count * dv * row_len::<S>(),
        sides.len() * count * row_len::<S>(),
        sides.len() * count * row_len::<S>(),
        count * row_len::<S>(),
        count * row_len::<S>(),
        KEYS * row_len::<S>(),
        corners_len,
        kv_heads.len() * k_len,
        kv_heads.len() * v_len,
        row_len::<S>() * d,
        Finish::len::<S>(dv),
        tile_len,
        tile_len,
    ]);
    let batch = t.batch;
    let (mut k, mut v) = (k, v);
    let packed = kv_heads
        .clone()
        .map(|head| Packed {
            plane: Plane { batch, head },
            k: std::ptr::null(),
            v: std::ptr::null(),
            wild: false,
            k_room: take(&mut k, k_len),
            v_room: take(&mut v, v_len),
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
        let first = block * row_len::<S>();
        first..s.q_tokens.min(first + row_len::<S>())
    };
    let mut sights = Vec::with_capacity(t.blocks.len() * sides.len());
    for block in t.blocks.clone() {
        let of = |side: &Side| Sight::new(*side, queries_of(block), s.kv_tokens, S::F32_LANES);
        sights.extend(sides.iter().map(of));
    }
    let sights: Vec<&[Sight]> = sights.chunks(sides.len()).collect();
    let mut blocks: Vec<Block<'_>> = Vec::with_capacity(count);
    let (mut q, mut o, mut shift, mut width) = (q, o, shift, width);
    let (mut reference, mut sum) = (reference, sum);
    for index in t.blocks.clone() {
        let queries = queries_of(index);
        for head in t.heads.clone() {
            let plane = Plane { batch, head };
            let q = take(&mut q, d * row_len::<S>());
            let [shift, width] = [&mut shift, &mut width].map(|all| take(all, row_len::<S>()));
            let sums = [0, 1].map(|side| {
                let queries = if side < sides.len() {
                    row_len::<S>()
                } else {
                    0
                };
                Sums {
                    o: take(&mut o, dv * queries),
                    reference: take(&mut reference, queries),
                    sum: take(&mut sum, queries),
                }
            });
            if let Some(band) = sides[0].band() {
                let text = band.text_range(s.kv_tokens);
                // Half the width: no more is needed, and twice as much is a u32.
                let half = band.half_width.min(s.kv_tokens).min(u32::MAX as usize / 2);
                for lane in 0..row_len::<S>() {
                    let query = (queries.start + lane).min(s.q_tokens - 1);
                    let bits = if text.contains(&query) {
                        [0, u32::MAX]
                    } else {
                        [half.wrapping_sub(query) as u32, 2 * half as u32]
                    };
                    [shift[lane], width[lane]] = bits.map(f32::from_bits);
                }
            }
            blocks.push(Block {
                plane,
                kv: head / per_kv - kv_heads.start,
                queries: queries.clone(),
                begun: false,
                finished: false,
                q,
                sums,
                shift,
                width,
            });
        }
    }

    // The first queries, keys and values are waited for; all others are asked for while something else is computed.
    let queries = queries_of(t.blocks.start);
    Ahead::new(&a.q, batch, t.heads.clone(), queries.clone(), d).all();
    let seen = hull(sights[0].iter().map(|sight| sight.part(&(0..s.kv_tokens))));
    let first = seen.start;
    let keys = first..s.kv_tokens.min(first / KEYS * KEYS + KEYS);
    let (head, n) = (kv_heads.start, kv_heads.len());
    let plane = Plane { batch, head };
    t.keys.k.ahead(plane, n, keys.clone()).all();
    t.keys.v.ahead(plane, n, keys).all();

    let mut context = Context {
        arithmetic: t.arithmetic,
        prefetch: Prefetch::nothing(),
        scale,
        head_dim: d,
        v_dim: dv,
        scores,
        corners,
        keys: t.keys,
        packed,
        tile: a.mask.map(|mask| Tile::new(mask, turned, lines)),
        careful: false,
        sign,
        rows,
        finite: t.finite,
        finish: Finish { a, room: strips },
    };
    // A tile of a mask that heads share serves all of them; else a head at a time takes less of the cache.
    let heads = if a.mask.is_some() { t.heads.len() } else { 1 };
    if heads == 1 {
        blocks.sort_by_key(|block| block.plane.head);
    }
    for blocks in blocks.chunks_mut(t.blocks.len() * heads) {
        // A value that is not finite spoils the sums of queries that it is hidden from too, for 0 · ∞ is NaN. That can be
        // seen in what they come to; to look at every value first took 4 % of a band's time. Blocks that are spoilt are
        // computed and written once more.
        for careful in [false, true] {
            if blocks.iter().all(|block| block.finished) {
                break;
            }
            context.careful = careful;
            blocks.iter_mut().for_each(|block| block.begun = false);
            walk(simd, heads, &sights, &mut context, blocks);
        }
    }
}

/// Cuts `n` numbers off the front.
fn take<'s>(all: &mut &'s mut [f32], n: usize) -> &'s mut [f32] {
    let (head, tail) = std::mem::take(all).split_at_mut(n);
    *all = tail;
    head
}

/// Q of a block, a query per lane, times the sign, in words; lanes beyond the sequence are zero.
///
/// # Safety
/// The block's queries must lie inside the shape.
#[inline(always)]
unsafe fn pack_q<S: Simd, A: Arithmetic>(
    simd: S,
    context: &mut Context<'_, A>,
    block: &mut Block<'_>,
) {
    let a = context.finish.a;
    let (q, queries, rows) = (&mut *block.q, block.queries.clone(), &mut *context.rows);
    let (arithmetic, sign) = (context.arithmetic, context.sign);
    let d = a.shape.head_dim;
    if queries.len() < row_len::<S>() {
        q.fill(0.0);
    }
    // SAFETY: promised by the caller.
    unsafe { gather_channels::<S>(&a.q, block.plane, queries, d, row_len::<S>(), q, rows) };
    if sign != 1.0 {
        for x in q.iter_mut() {
            *x *= sign;
        }
    }
    if A::EACH == 2 {
        assert!(q.len() >= d * row_len::<S>());
        let none = simd.splat_f32s(0.0);
        let q = q.as_mut_ptr();
        for pair in 0..d.div_ceil(2) {
            for lane in (0..row_len::<S>()).step_by(S::F32_LANES) {
                let line = |channel: usize| q.wrapping_add(channel * row_len::<S>() + lane);
                // SAFETY: the channels are below d; a pair is written where nothing is read any more.
                unsafe {
                    let first = load(simd, line(2 * pair));
                    let second = if 2 * pair + 1 < d {
                        load(simd, line(2 * pair + 1))
                    } else {
                        none
                    };
                    store(simd, line(pair), arithmetic.join(simd, first, second));
                }
            }
        }
    }
}

/// Takes every query block past the keys that it sees, and finishes it. `blocks` are those of `heads` heads for the first
/// queries, then for the next; `sights` are those of the queries, for each side.
#[inline(always)]
fn walk<S: Simd, A: Arithmetic>(
    simd: S,
    heads: usize,
    sights: &[&[Sight]],
    context: &mut Context<'_, A>,
    blocks: &mut [Block<'_>],
) {
    let a = context.finish.a;
    let s = a.shape;
    let mut segments: Vec<Vec<Segment>> = sights[0].iter().map(|_| Vec::new()).collect();
    let all =
        blocks.first().map_or(0, |b| b.queries.start)..blocks.last().map_or(0, |b| b.queries.end);
    let block_of = |first: usize| first..s.kv_tokens.min(first + KEYS);
    // A block of keys, and the queries that see some of it.
    let steps: Vec<(usize, usize)> = (0..s.kv_tokens)
        .step_by(KEYS)
        .flat_map(|first| (0..sights.len()).map(move |at| (first, at)))
        .filter(|&(first, at)| {
            let keys = block_of(first);
            sights[at].iter().any(|sight| sight.touches(&keys))
        })
        .collect();
    let mut ends = vec![None; sights.len()];
    for (i, &(_, at)) in steps.iter().enumerate() {
        ends[at] = Some(i);
    }
    // What queries of the task see of a block: neither asked for nor copied is what comes before or after.
    let part_of = |first: usize| {
        let all = sights.iter().copied().flatten();
        hull(all.map(|sight| sight.part(&block_of(first))))
    };
    let kv = blocks[0].kv..blocks[heads - 1].kv + 1;
    let Plane { batch, head } = blocks[0].plane;
    let tiles = (KEYS + s.v_dim) / 6;
    // Steps left with the same keys.
    let mut left = 0;
    for (i, &(first, at)) in steps.iter().enumerate() {
        let keys = block_of(first);
        if left == 0 {
            left = steps[i..].iter().take_while(|s| s.0 == first).count();
            // A block begins where it does, since that is what keys are counted from.
            let keys = first..part_of(first).end;
            for packed in &mut context.packed[kv.clone()] {
                let (plane, all) = (packed.plane, context.keys);
                // SAFETY: the keys lie inside the shape.
                unsafe {
                    packed.k = all.k.block(plane, keys.clone(), packed.k_room);
                    packed.v = all.v.block(plane, keys.clone(), packed.v_room);
                    packed.wild = context.careful && wild::<A>(&all.v, packed.v, keys.len());
                }
            }
            if let Some(&(next, _)) = steps.get(i + left) {
                let (plane, n, next) = (context.packed[kv.start].plane, kv.len(), part_of(next));
                let (k, v) = (&context.keys.k, &context.keys.v);
                context.prefetch.keys = [k.ahead(plane, n, next.clone()), v.ahead(plane, n, next)];
            }
        }
        if let Some(&(_, next)) = steps.get(i + 1) {
            let block = &blocks[next * heads];
            let (heads, queries) = (head..head + heads, block.queries.clone());
            let [_, q, residual, out] = &mut context.prefetch.soon;
            if !block.begun {
                *q = Ahead::new(&a.q, batch, heads.clone(), queries.clone(), s.head_dim);
            }
            if ends[next] == Some(i + 1) {
                *residual = match &a.mode {
                    Mode::Window {
                        residual: Some(r), ..
                    } => Ahead::new(r, batch, heads.clone(), queries.clone(), s.v_dim),
                    Mode::FullCapture { residual: r, .. } => {
                        Ahead::output(r, batch, heads.clone(), queries.clone(), s.v_dim)
                    }
                    _ => Ahead::nothing(),
                };
                *out = Ahead::output(&a.out, batch, heads, queries, s.v_dim);
            }
        }
        for (sight, segments) in sights[at].iter().zip(&mut segments) {
            sight.segments(keys.clone(), segments);
        }
        for block in unfinished(&mut blocks[at * heads..][..heads]) {
            if !block.begun {
                block.begin();
                // SAFETY: the block's queries lie inside the shape.
                unsafe { pack_q(simd, context, block) };
            }
            if let Some(tile) = &mut context.tile {
                // SAFETY: the block's queries and the keys lie inside the shape.
                unsafe { tile.read::<S>(block.plane, block.queries.clone(), keys.clone()) };
                if tile.effect() == Effect::HidesAll {
                    continue;
                }
                let (queries, keys) = next_tile::<S>(block.queries.end, &all, &keys, s.kv_tokens);
                context.prefetch.soon[0] = tile.ahead(block.plane, queries, keys);
            }
            context.prefetch.set_rate(tiles, left);
            step(simd, context, block, keys.clone(), sights[at], &segments);
        }
        left -= 1;
        if ends[at] == Some(i) {
            for block in unfinished(&mut blocks[at * heads..][..heads]) {
                conclude(simd, context, block);
            }
        }
    }
    // Where queries see nothing, they had no last step. (No iterator's closure: it would not be compiled for
    // the instruction set.)
    for (at, end) in ends.into_iter().enumerate() {
        if end.is_none() {
            for block in unfinished(&mut blocks[at * heads..][..heads]) {
                block.begin();
                conclude(simd, context, block);
            }
        }
    }
}

/// The second time around only what was spoilt is computed again.
fn unfinished<'b, 's>(blocks: &'b mut [Block<'s>]) -> impl Iterator<Item = &'b mut Block<'s>> {
    blocks.iter_mut().filter(|block| !block.finished)
}

/// Writes what a block has come to. It is not finished if it may be spoilt by a value that it does not see.
#[inline(always)]
fn conclude<S: Simd, A: Arithmetic>(simd: S, context: &mut Context<'_, A>, block: &mut Block<'_>) {
    let a = context.finish.a;
    if let Mode::FullCapture { .. } = a.mode {
        merge(simd, block, a.mask.is_some());
    }
    let hides = a.mask.is_some() || !matches!(a.mode, Mode::Full);
    let doubtful = hides && !context.careful;
    // A residual that lies where the output goes can be added once only.
    let in_place = match &a.mode {
        Mode::Window {
            residual: Some(r), ..
        } => std::ptr::eq(r.data, a.out.data),
        _ => false,
    };
    if doubtful && in_place && !are_finite(simd, block.sums[0].o, block.queries.len()) {
        return;
    }
    // SAFETY: the block's queries lie inside the shape, and belong to this task alone.
    let finite = unsafe { context.finish.run(simd, block) };
    if doubtful && !in_place && !finite.out {
        return;
    }
    block.finished = true;
    if !finite.residual {
        context.finite.store(false, Ordering::Relaxed);
    }
}

/// The queries and keys that come after the query block that ends at `end`, if the band hides none of them; `all` are
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
        (all.start, keys.end..kv_tokens.min(keys.end + KEYS))
    };
    (first..all.end.min(first + row_len::<S>()), keys)
}

/// Whether the values of the first keys of a block hold an infinity or a NaN.
///
/// # Safety
/// The block must have so many keys.
#[inline(always)]
unsafe fn wild<A: Arithmetic>(values: &Matrix<'_>, block: *const f32, keys: usize) -> bool {
    // x · 0 is NaN for an x that is not finite, and stays NaN in a sum.
    let (mut sum, mut rest) = ([0f32; 16], 0.0);
    // SAFETY: promised by the caller.
    unsafe {
        values.lines(block, keys, |line| {
            let (lines, last) = line.as_chunks::<16>();
            for x in lines {
                for i in 0..16 {
                    let [a, b] = A::numbers(x[i]);
                    sum[i] += a * 0.0 + b * 0.0;
                }
            }
            for x in last {
                let [a, b] = A::numbers(*x);
                rest += a * 0.0 + b * 0.0;
            }
        });
    }
    sum.iter().any(|&x| x != 0.0) || rest != 0.0
}
