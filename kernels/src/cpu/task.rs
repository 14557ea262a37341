//! One task: some query blocks of some neighbouring heads against all keys that they see.
//!
//! Owns the order of things: which pass, which block, when to pack, snapshot and finish, and what to ask for meanwhile.
//! Which keys are seen is `sight`'s business, products are `gemm`'s, probabilities `softmax`'s, memory outside the scratch
//! `pack`'s.

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use pulp::{Simd, WithSimd};

use super::ahead::{Ahead, Prefetch};
use super::arithmetic::Arithmetic;
use super::block::Block;
use super::finish::{Finish, are_finite, clear_empty, divide};
use super::gemm::{Gemm, row_len};
use super::keys::{KEYS, Keys, Matrix};
use super::mask::{Effect, Tile};
use super::pack::{Plane, gather_channels};
use super::scratch::Scratch;
use super::sight::{Pass, Segment, Segments, Sight, hull, row};
use super::softmax::softmax;
use super::vector::{load, mul_add, store};
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

/// The keys and values of a block for one key/value head.
struct Packed<'s> {
    plane: Plane,
    k: *const f32,
    v: *const f32,
    /// Whether the values are known to hold an infinity or a NaN, which must not reach queries that do not see them.
    wild: bool,
    k_room: &'s mut [f32],
    v_room: &'s mut [f32],
}

/// What all steps of a task share.
struct Context<'s, A> {
    arithmetic: A,
    prefetch: Prefetch,
    /// |scale| · log2(e): exponents are base 2.
    scale: f32,
    head_dim: usize,
    v_dim: usize,
    /// `[KEYS, queries]`, scores and then words of probabilities of one block, see [`place`].
    scores: &'s mut [f32],
    keys: &'s Keys<'s>,
    packed: Vec<Packed<'s>>,
    /// The mask of the block at work; `None` if the call has none.
    tile: Option<Tile<'s>>,
    /// Whether values are looked at before they are multiplied.
    careful: bool,
    /// What q is multiplied with: the sign of the scale, or 0.
    sign: f32,
    /// `[tokens, channels]`, on the way in.
    rows: &'s mut [f32],
    finish: Finish<'s>,
}

#[inline(always)]
fn run<S: Simd, A: Arithmetic>(simd: S, t: Task<'_, '_, A>) {
    let a = t.a;
    let s = a.shape;
    let (d, dv) = (s.head_dim, s.v_dim);
    let per_kv = s.heads / s.kv_heads;
    let kv_heads = t.heads.start / per_kv..(t.heads.end - 1) / per_kv + 1;
    let count = t.blocks.len() * t.heads.len();
    let captures = matches!(a.mode, Mode::FullCapture { .. });
    let w_len = if captures { dv * row_len::<S>() } else { 0 };
    let (k_len, v_len) = (t.keys.k.task_len(), t.keys.v.task_len());
    let tile_len = if a.mask.is_some() {
        Tile::len::<S>(KEYS)
    } else {
        0
    };

    let [
        q,
        o,
        w,
        reference,
        sum,
        from,
        to,
        scores,
        k,
        v,
        rows,
        strips,
        turned,
        lines,
    ] = t.scratch.cut([
        count * d * row_len::<S>(),
        count * dv * row_len::<S>(),
        count * w_len,
        count * row_len::<S>(),
        count * row_len::<S>(),
        count * row_len::<S>(),
        count * row_len::<S>(),
        KEYS * row_len::<S>(),
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

    let mut blocks: Vec<Block<'_>> = Vec::with_capacity(count);
    let (mut q, mut o, mut w) = (q, o, w);
    let (mut reference, mut sum, mut from, mut to) = (reference, sum, from, to);
    for index in t.blocks.clone() {
        let first = index * row_len::<S>();
        let queries = first..s.q_tokens.min(first + row_len::<S>());
        for head in t.heads.clone() {
            let plane = Plane { batch, head };
            let [q, o, w] = [
                take(&mut q, d * row_len::<S>()),
                take(&mut o, dv * row_len::<S>()),
                take(&mut w, w_len),
            ];
            let [reference, sum, from, to] =
                [&mut reference, &mut sum, &mut from, &mut to].map(|all| take(all, row_len::<S>()));
            if let Mode::FullCapture { band, .. } | Mode::Window { band, .. } = &a.mode {
                for lane in 0..row_len::<S>() {
                    let keys = row(band, (first + lane).min(s.q_tokens - 1), s.kv_tokens);
                    from[lane] = f32::from_bits(keys.start as u32);
                    to[lane] = f32::from_bits(keys.end as u32);
                }
            }
            blocks.push(Block {
                plane,
                kv: head / per_kv - kv_heads.start,
                queries: queries.clone(),
                packed: false,
                finished: false,
                q,
                o,
                w,
                reference,
                sum,
                from,
                to,
            });
        }
    }

    // The first queries, keys and values are waited for; all others are asked for while something else is computed.
    let first = t.blocks.start * row_len::<S>();
    let queries = first..s.q_tokens.min(first + row_len::<S>());
    Ahead::new(&a.q, batch, t.heads.clone(), queries, d).all();
    let keys = first_keys(a, first);
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
        keys: t.keys,
        packed,
        tile: a.mask.map(|mask| Tile::new(mask, turned, lines)),
        careful: false,
        sign,
        rows,
        finish: Finish {
            a,
            finite: t.finite,
            room: strips,
        },
    };
    // A tile of a mask that heads share serves all of them; else a head at a time takes less of the cache.
    let heads = if a.mask.is_some() { t.heads.len() } else { 1 };
    if heads == 1 {
        blocks.sort_by_key(|block| block.plane.head);
    }
    for blocks in blocks.chunks_mut(t.blocks.len() * heads) {
        // A value that is not finite spoils the sums of queries that it is hidden from too, for 0 · ∞ is NaN. That can be
        // seen in them; to look at every value first took 4 % of a band's time. Blocks that are spoilt are not finished the
        // first time.
        for careful in [false, true] {
            if blocks.iter().all(|block| block.finished) {
                break;
            }
            context.careful = careful;
            blocks.iter_mut().for_each(Block::clear);
            // The band's keys come first, so that W is known before the others are added. One place of the call, for it is
            // compiled into here.
            let passes = match &a.mode {
                Mode::Full => [None, Some(Pass::All)],
                Mode::Window { band, .. } => [None, Some(Pass::Inside(*band))],
                Mode::FullCapture { band, .. } => {
                    [Some(Pass::Inside(*band)), Some(Pass::Outside(*band))]
                }
            };
            for (i, which) in passes.into_iter().enumerate() {
                let Some(which) = which else { continue };
                if let Pass::Outside(_) = which {
                    for block in blocks.iter_mut() {
                        divide(simd, block);
                        if a.mask.is_some() {
                            clear_empty(block.w, block.sum);
                        }
                    }
                }
                pass(simd, heads, which, i == 1, &mut context, blocks);
            }
        }
    }
}

/// Cuts `n` numbers off the front.
fn take<'s>(all: &mut &'s mut [f32], n: usize) -> &'s mut [f32] {
    let (head, tail) = std::mem::take(all).split_at_mut(n);
    *all = tail;
    head
}

/// What a task beginning at `query` sees of the first block of keys.
fn first_keys(a: &Attention<'_>, query: usize) -> Range<usize> {
    let s = a.shape;
    let first = match &a.mode {
        Mode::Full => 0,
        Mode::FullCapture { band, .. } | Mode::Window { band, .. } => {
            let text = band.text_range(s.kv_tokens);
            let row = row(band, query, s.kv_tokens);
            if text.is_empty() {
                row.start
            } else {
                row.start.min(text.start)
            }
        }
    };
    first..s.kv_tokens.min(first / KEYS * KEYS + KEYS)
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
    block.packed = true;
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

/// Takes every query block past the keys of one pass, and finishes it if that is the `last`. `blocks` are those of `heads`
/// heads for the first queries, then for the next.
#[inline(always)]
fn pass<S: Simd, A: Arithmetic>(
    simd: S,
    heads: usize,
    pass: Pass,
    last: bool,
    context: &mut Context<'_, A>,
    blocks: &mut [Block<'_>],
) {
    let a = context.finish.a;
    let s = a.shape;
    let sights: Vec<Sight> = blocks
        .iter()
        .step_by(heads)
        .map(|b| Sight::new(pass, b.queries.clone(), s.kv_tokens, S::F32_LANES))
        .collect();
    let mut segments = Segments::default();
    let all =
        blocks.first().map_or(0, |b| b.queries.start)..blocks.last().map_or(0, |b| b.queries.end);
    let block_of = |first: usize| first..s.kv_tokens.min(first + KEYS);
    // A block of keys, and the queries that see some of it.
    let steps: Vec<(usize, usize)> = (0..s.kv_tokens)
        .step_by(KEYS)
        .flat_map(|first| (0..sights.len()).map(move |at| (first, at)))
        .filter(|&(first, at)| sights[at].touches(&block_of(first)))
        .collect();
    let mut ends = vec![None; sights.len()];
    for (i, &(_, at)) in steps.iter().enumerate() {
        ends[at] = Some(i);
    }
    // What queries of the task see of a block: neither asked for nor copied is what comes before or after.
    let part_of = |first: usize| hull(sights.iter().map(|sight| sight.part(&block_of(first))));
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
            if !block.packed {
                *q = Ahead::new(&a.q, batch, heads.clone(), queries.clone(), s.head_dim);
            }
            if last && ends[next] == Some(i + 1) {
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
        let sight = &sights[at];
        sight.segments(keys.clone(), &mut segments);
        for block in &mut blocks[at * heads..][..heads] {
            if !block.packed {
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
            step(simd, context, block, sight, pass, first, &segments.list);
        }
        left -= 1;
        if last && ends[at] == Some(i) {
            for block in &mut blocks[at * heads..][..heads] {
                conclude(simd, context, block);
            }
        }
    }
    // Where queries see nothing in this pass, they had no last step. (No iterator's closure: it would not be compiled for
    // the instruction set.)
    for (at, end) in ends.into_iter().enumerate() {
        if last && end.is_none() {
            for block in &mut blocks[at * heads..][..heads] {
                conclude(simd, context, block);
            }
        }
    }
}

/// Writes what a block has come to, unless it is spoilt by a value that it may not see.
#[inline(always)]
fn conclude<S: Simd, A: Arithmetic>(simd: S, context: &mut Context<'_, A>, block: &mut Block<'_>) {
    let a = context.finish.a;
    let hides = a.mask.is_some() || !matches!(a.mode, Mode::Full);
    if hides && !context.careful && !are_finite(simd, block.o, block.queries.len()) {
        return;
    }
    block.finished = true;
    // SAFETY: the block's queries lie inside the shape, and belong to this task alone.
    unsafe { context.finish.run(simd, block) };
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

/// One query block against one key block: scores, softmax, values.
#[inline(always)]
fn step<S: Simd, A: Arithmetic>(
    simd: S,
    context: &mut Context<'_, A>,
    block: &mut Block<'_>,
    sight: &Sight,
    pass: Pass,
    first: usize,
    segments: &[Segment],
) {
    let lanes = S::F32_LANES;
    let (d, dv) = (context.head_dim, context.v_dim);
    assert!(context.scores.len() >= KEYS * row_len::<S>() && block.q.len() >= d * row_len::<S>());
    assert!(
        block.o.len() >= dv * row_len::<S>()
            && block.sum.len() >= row_len::<S>()
            && block.reference.len() >= row_len::<S>()
    );
    let (arithmetic, scores) = (context.arithmetic, context.scores.as_mut_ptr());

    let Packed { k, v, .. } = context.packed[block.kv];
    let (k_row, k_step) = context.keys.k.strides();
    for seg in segments {
        let key = seg.keys.start - first;
        let lane = seg.vectors.start * lanes;
        // SAFETY: keys and lanes of a segment lie inside the packed block; the matrices are separate scratch.
        unsafe {
            Gemm {
                a: k.add(key * k_row),
                a_row: k_row,
                a_step: k_step,
                b: block.q.as_ptr().add(lane),
                c: scores.add(key * row_len::<S>() + lane),
                rows: seg.keys.len(),
                steps: d.div_ceil(A::EACH),
                vectors: seg.vectors.len(),
                add: false,
            }
            .run(simd, arithmetic, |steps| context.prefetch.run(steps));
        }
    }
    let tile = context
        .tile
        .as_ref()
        .filter(|tile| tile.effect() == Effect::Adds);
    let mut scale = context.scale;
    if let Some(tile) = tile {
        for seg in segments {
            let keys = seg.keys.start - first..seg.keys.end - first;
            tile.add(simd, scale, context.scores, keys, seg.vectors.clone());
        }
        scale = 1.0;
    }
    for seg in segments {
        if seg.masked != 0 {
            mask(simd, context.scores, block, sight, pass, first, seg);
        }
    }
    let vectors = segments.iter().map(|s| s.vectors.end).max().unwrap_or(0);
    for v in 0..vectors {
        softmax(
            simd,
            arithmetic,
            scale,
            context.scores,
            block,
            dv,
            first,
            segments,
            v,
        );
    }

    let (v_step, v_row) = context.keys.v.strides();
    for seg in segments {
        let (key, end) = (seg.keys.start - first, seg.keys.end - first);
        // The other half of a pair may be of a key that the segment does not contain.
        let hides = seg.masked != 0 || tile.is_some() || A::EACH == 2;
        if context.packed[block.kv].wild && hides {
            values_seen(simd, context, block, sight, pass, first, seg);
            continue;
        }
        let lane = seg.vectors.start * lanes;
        // SAFETY: as for the scores.
        unsafe {
            Gemm {
                a: v.add(key / A::EACH * v_step),
                a_row: v_row,
                a_step: v_step,
                b: scores.add(key * row_len::<S>() + lane),
                c: block.o.as_mut_ptr().add(lane),
                rows: dv,
                steps: end.div_ceil(A::EACH) - key / A::EACH,
                vectors: seg.vectors.len(),
                add: true,
            }
            .run(simd, arithmetic, |steps| context.prefetch.run(steps));
        }
    }
}

/// Where the probability of a key of a segment that begins at key `start` is: the line in the scores, and which number of
/// its words.
///
/// Words of pairs lie in the first lines of their segment, which has no fewer lines than pairs, however it cuts them.
#[inline(always)]
fn place<A: Arithmetic>(key: usize, start: usize) -> (usize, usize) {
    (start + key / A::EACH - start / A::EACH, key % A::EACH)
}

/// Which lanes of vector `v` take part at `key`.
#[inline(always)]
unsafe fn seen<S: Simd>(simd: S, block: &Block<'_>, pass: Pass, key: usize, v: usize) -> S::m32s {
    let at = v * S::F32_LANES;
    // SAFETY: the caller's v is a vector of the block.
    let (from, to) = unsafe {
        (
            simd.transmute_u32s_f32s(load(simd, block.from.as_ptr().add(at))),
            simd.transmute_u32s_f32s(load(simd, block.to.as_ptr().add(at))),
        )
    };
    let key = simd.splat_u32s(key as u32);
    let inside = simd.and_m32s(
        simd.less_than_or_equal_u32s(from, key),
        simd.less_than_u32s(key, to),
    );
    match pass {
        Pass::Outside(_) => simd.not_m32s(inside),
        _ => inside,
    }
}

/// Sets the scores that a query does not see in this pass to −∞.
#[inline(always)]
fn mask<S: Simd>(
    simd: S,
    scores: &mut [f32],
    block: &Block<'_>,
    sight: &Sight,
    pass: Pass,
    first: usize,
    seg: &Segment,
) {
    let hidden = simd.splat_f32s(f32::NEG_INFINITY);
    let text = sight.text();
    for v in seg.vectors.clone() {
        if seg.masked >> v & 1 == 0 {
            continue;
        }
        for key in seg.partial.clone() {
            if text.contains(&key) {
                continue;
            }
            // SAFETY: keys and vectors of a segment lie inside the block.
            unsafe {
                let p = scores
                    .as_mut_ptr()
                    .add((key - first) * row_len::<S>() + v * S::F32_LANES);
                let shown = seen(simd, block, pass, key, v);
                store(simd, p, simd.select_f32s(shown, load(simd, p), hidden));
            }
        }
    }
}

/// O += Vᵀ·P where masked probabilities stand beside values that are not finite: 0 · ∞ would spoil queries that do
/// not see the key, so each product is selected. Slow and rare.
#[inline(always)]
fn values_seen<S: Simd, A: Arithmetic>(
    simd: S,
    context: &Context<'_, A>,
    block: &mut Block<'_>,
    sight: &Sight,
    pass: Pass,
    first: usize,
    seg: &Segment,
) {
    let text = sight.text();
    let tile = context
        .tile
        .as_ref()
        .filter(|tile| tile.effect() == Effect::Adds);
    let hidden = simd.splat_f32s(f32::NEG_INFINITY);
    let values = context.packed[block.kv].v;
    let (v_step, v_row) = context.keys.v.strides();
    for v in seg.vectors.clone() {
        let at = v * S::F32_LANES;
        for key in seg.keys.clone() {
            let (line, number) = place::<A>(key - first, seg.keys.start - first);
            for c in 0..context.v_dim {
                // SAFETY: keys and vectors of a segment lie inside the block.
                unsafe {
                    let o = block.o.as_mut_ptr().add(c * row_len::<S>() + at);
                    let p = load(
                        simd,
                        context.scores.as_ptr().add(line * row_len::<S>() + at),
                    );
                    let value = *values.add((key - first) / A::EACH * v_step + c * v_row);
                    let value = simd.splat_f32s(A::numbers(value)[number]);
                    let old = load(simd, o);
                    let new = mul_add(simd, A::number(simd, p, number), value, old);
                    let hides = seg.masked >> v & 1 == 1 && !text.contains(&key);
                    let mut new = if hides {
                        simd.select_f32s(seen(simd, block, pass, key, v), new, old)
                    } else {
                        new
                    };
                    if let Some(tile) = tile {
                        let mask = load(simd, tile.lanes::<S>(key - first)[at..].as_ptr());
                        new = simd.select_f32s(simd.equal_f32s(mask, hidden), old, new);
                    }
                    store(simd, o, new);
                }
            }
        }
    }
}
