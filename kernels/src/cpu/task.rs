//! One task: some query blocks of some neighbouring heads against all keys that they see.
//!
//! Owns the order of things (which pass, which block, when to pack, snapshot and finish) and the online softmax.
//! Which keys are seen is `sight`'s business, products are `gemm`'s, memory outside the scratch is `pack`'s.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use pulp::{Simd, WithSimd};

use super::arithmetic::Arithmetic;
use super::exp::exp2;
use super::gemm::{Gemm, pauses, row_len};
use super::keys::{KEYS, Keys, Matrix};
use super::mask::{Effect, Tile};
use super::pack::{Ahead, Plane, gather_channels, scatter_channels, scatter_sum};
use super::scratch::Scratch;
use super::sight::{Pass, Segment, Segments, Sight, row};
use super::vector::{load, mul_add, store};
use crate::api::{Attention, DType, Mode};

/// How much a row's scores (in powers of two) may exceed its reference before sums are rescaled.
const SLACK: f32 = 8.0;

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

/// What a query block of one head carries from key block to key block; a query per lane.
struct Block<'s> {
    plane: Plane,
    /// Which of the task's key/value heads it reads.
    kv: usize,
    queries: Range<usize>,
    /// Words of `[head_dim, queries]`, pairs being of channels: q, with the sign of the scale.
    q: &'s mut [f32],
    /// `[v_dim, queries]`: Σ 2^(score − reference) · v so far.
    o: &'s mut [f32],
    /// `[v_dim, queries]`: W, in captures.
    w: &'s mut [f32],
    /// The exponent everything is relative to, a score times `Context::scale`; −∞ before the first key.
    reference: &'s mut [f32],
    /// Σ 2^(score − reference) so far.
    sum: &'s mut [f32],
    /// First key and last key + 1 that the query sees in the band (bits of a u32).
    from: &'s mut [f32],
    to: &'s mut [f32],
}

/// Memory to ask for between tiles: the mask's next tile, keys and values of the next block, then what the end of the
/// task touches.
struct Prefetch {
    mask: Ahead,
    lists: [Ahead; 4],
    /// Tokens to ask for at a time.
    rate: usize,
}

impl Prefetch {
    #[inline(always)]
    fn poke(&mut self) {
        let [a, b, c, d] = &mut self.lists;
        for _ in 0..self.rate {
            let _ = self.mask.step() || a.step() || b.step() || c.step() || d.step();
        }
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
}

impl Block<'_> {
    /// As if it had seen no key yet.
    fn clear(&mut self) {
        self.o.fill(0.0);
        self.reference.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
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
        more,
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
        row_len::<S>() * d.max(dv),
        row_len::<S>() * dv,
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
        // While these queries are packed, the next ones arrive, and finally the first keys and values.
        if index + 1 < t.blocks.end {
            let next = queries.end..s.q_tokens.min(queries.end + row_len::<S>());
            Ahead::new(&a.q, batch, t.heads.clone(), next, d).all();
        } else {
            let keys = first_keys(a, t.blocks.start * row_len::<S>());
            let (head, n) = (kv_heads.start, kv_heads.len());
            let plane = Plane { batch, head };
            t.keys.k.ahead(plane, n, keys.clone()).all();
            t.keys.v.ahead(plane, n, keys).all();
        }
        for head in t.heads.clone() {
            let plane = Plane { batch, head };
            let [q, o, w] = [
                take(&mut q, d * row_len::<S>()),
                take(&mut o, dv * row_len::<S>()),
                take(&mut w, w_len),
            ];
            let [reference, sum, from, to] =
                [&mut reference, &mut sum, &mut from, &mut to].map(|all| take(all, row_len::<S>()));
            // SAFETY: queries lie inside the shape.
            unsafe { pack_q(simd, t.arithmetic, a, plane, &queries, sign, rows, q) };
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

    let queries = t.blocks.start * row_len::<S>()..s.q_tokens.min(t.blocks.end * row_len::<S>());
    let residual = match &a.mode {
        Mode::Window {
            residual: Some(r), ..
        } => Ahead::new(r, batch, t.heads.clone(), queries.clone(), dv),
        Mode::FullCapture { residual: r, .. } => {
            Ahead::output(r, batch, t.heads.clone(), queries.clone(), dv)
        }
        _ => Ahead::nothing(),
    };
    let mut context = Context {
        arithmetic: t.arithmetic,
        prefetch: Prefetch {
            mask: Ahead::nothing(),
            lists: [
                Ahead::nothing(),
                Ahead::nothing(),
                residual,
                Ahead::output(&a.out, batch, t.heads.clone(), queries, dv),
            ],
            rate: 1,
        },
        scale,
        head_dim: d,
        v_dim: dv,
        scores,
        keys: t.keys,
        packed,
        tile: a.mask.map(|mask| Tile::new(mask, turned, lines)),
        careful: false,
    };
    let hides = a.mask.is_some() || !matches!(a.mode, Mode::Full);
    // A tile of a mask that heads share serves all of them; else a head at a time takes less of the cache.
    let heads = if a.mask.is_some() { t.heads.len() } else { 1 };
    if heads == 1 {
        blocks.sort_by_key(|block| block.plane.head);
    }
    for blocks in blocks.chunks_mut(t.blocks.len() * heads) {
        // A value that is not finite spoils the sums of queries that it is hidden from too, for 0 · ∞ is NaN. That can be
        // seen in them; to look at every value first took 4 % of a band's time.
        for careful in [false, true] {
            let spoilt = |b: &Block<'_>| !stays_finite(simd, b.o, b.queries.len(), DType::F32);
            if careful && !(hides && blocks.iter().any(spoilt)) {
                break;
            }
            context.careful = careful;
            blocks.iter_mut().for_each(Block::clear);
            // The band's keys come first, so that W is known before the others are added. One place of the call, for it is
            // compiled into here.
            let passes = match &a.mode {
                Mode::Full => [Some(Pass::All), None],
                Mode::Window { band, .. } => [Some(Pass::Inside(*band)), None],
                Mode::FullCapture { band, .. } => {
                    [Some(Pass::Inside(*band)), Some(Pass::Outside(*band))]
                }
            };
            for which in passes.into_iter().flatten() {
                if let Pass::Outside(_) = which {
                    for block in blocks.iter_mut() {
                        divide(simd, block.o, block.w, block.sum, None);
                        if a.mask.is_some() {
                            clear_empty(block.w, block.sum);
                        }
                    }
                }
                pass(simd, a, heads, which, &mut context, blocks);
            }
        }
    }
    blocks.sort_by_key(|block| block.queries.start);
    for block in &mut blocks {
        // SAFETY: the block's queries lie inside the shape, and belong to this task alone.
        unsafe { finish(simd, a, block, t.finite, rows, more) };
    }
}

/// Cuts `n` numbers off the front.
fn take<'s>(all: &mut &'s mut [f32], n: usize) -> &'s mut [f32] {
    let (head, tail) = std::mem::take(all).split_at_mut(n);
    *all = tail;
    head
}

/// The first block of keys that a task beginning at `query` sees.
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
    let first = first / KEYS * KEYS;
    first..s.kv_tokens.min(first + KEYS)
}

/// Q of a block, a query per lane, times `sign`, in words; lanes beyond the sequence are zero.
///
/// # Safety
/// `queries` must lie inside the shape.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn pack_q<S: Simd, A: Arithmetic>(
    simd: S,
    arithmetic: A,
    a: &Attention<'_>,
    plane: Plane,
    queries: &Range<usize>,
    sign: f32,
    rows: &mut [f32],
    q: &mut [f32],
) {
    let d = a.shape.head_dim;
    if queries.len() < row_len::<S>() {
        q.fill(0.0);
    }
    // SAFETY: promised by the caller.
    unsafe { gather_channels::<S>(&a.q, plane, queries.clone(), d, row_len::<S>(), q, rows) };
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

/// Takes every query block past the keys of one pass. `blocks` are those of `heads` heads for the first queries, then
/// for the next.
#[inline(always)]
fn pass<S: Simd, A: Arithmetic>(
    simd: S,
    a: &Attention<'_>,
    heads: usize,
    pass: Pass,
    context: &mut Context<'_, A>,
    blocks: &mut [Block<'_>],
) {
    let s = a.shape;
    let mut sights: Vec<(Sight, Segments)> = blocks
        .iter()
        .step_by(heads)
        .map(|b| Sight::new(pass, b.queries.clone(), s.kv_tokens, S::F32_LANES))
        .map(|sight| (sight, Segments::default()))
        .collect();
    let all =
        blocks.first().map_or(0, |b| b.queries.start)..blocks.last().map_or(0, |b| b.queries.end);
    for first in (0..s.kv_tokens).step_by(KEYS) {
        let keys = first..s.kv_tokens.min(first + KEYS);
        let touched = sights.iter().filter(|(s, _)| s.touches(&keys)).count();
        if touched == 0 {
            continue;
        }
        let kv = blocks[0].kv..blocks[heads - 1].kv + 1;
        for packed in &mut context.packed[kv.clone()] {
            let (plane, all) = (packed.plane, context.keys);
            // SAFETY: the keys lie inside the shape.
            unsafe {
                packed.k = all.k.block(plane, keys.clone(), packed.k_room);
                packed.v = all.v.block(plane, keys.clone(), packed.v_room);
                packed.wild = context.careful && wild::<A>(&all.v, packed.v, keys.len());
            }
        }
        let next = keys.end..s.kv_tokens.min(keys.end + KEYS);
        if sights.iter().any(|(sight, _)| sight.touches(&next)) {
            let (plane, n) = (context.packed[kv.start].plane, kv.len());
            context.prefetch.lists[0] = context.keys.k.ahead(plane, n, next.clone());
            context.prefetch.lists[1] = context.keys.v.ahead(plane, n, next);
        }
        let pokes = match pauses::<S>() {
            true => touched * heads * (keys.len() + s.v_dim) / 6 + 1,
            false => touched * heads,
        };
        let mut tokens = context.prefetch.lists[0].left() + context.prefetch.lists[1].left();
        if a.mask.is_some() {
            tokens += touched * heads * row_len::<S>();
        }
        context.prefetch.rate = 1 + tokens / pokes;
        for (blocks, (sight, segments)) in blocks.chunks_mut(heads).zip(&mut sights) {
            if !sight.touches(&keys) {
                continue;
            }
            sight.segments(keys.clone(), segments);
            for block in blocks {
                if let Some(tile) = &mut context.tile {
                    // SAFETY: the block's queries and the keys lie inside the shape.
                    unsafe { tile.read::<S>(block.plane, block.queries.clone(), keys.clone()) };
                    if tile.effect() == Effect::HidesAll {
                        continue;
                    }
                    let (queries, keys) =
                        next_tile::<S>(block.queries.end, &all, &keys, s.kv_tokens);
                    context.prefetch.mask = tile.ahead(block.plane, queries, keys);
                }
                if !pauses::<S>() {
                    context.prefetch.poke();
                }
                step(simd, context, block, sight, pass, first, &segments.list);
            }
        }
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
            .run(simd, arithmetic, || context.prefetch.poke());
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
            .run(simd, arithmetic, || context.prefetch.poke());
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
        for key in seg.keys.clone() {
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

/// Online softmax of one vector of queries: scores become probabilities relative to the row's reference, which is
/// raised (and sums so far rescaled) only where scores exceed it by more than [`SLACK`].
///
/// Where probabilities are rounded to bfloat16 the rounded ones are summed: what values are multiplied with adds up to 1.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn softmax<S: Simd, A: Arithmetic>(
    simd: S,
    arithmetic: A,
    scale: f32,
    scores: &mut [f32],
    block: &mut Block<'_>,
    dv: usize,
    first: usize,
    segments: &[Segment],
    v: usize,
) {
    let at = v * S::F32_LANES;
    let scores = scores.as_mut_ptr();
    let lowest = simd.splat_f32s(f32::NEG_INFINITY);
    let scale = simd.splat_f32s(scale);
    // SAFETY (all of the function): keys and vectors of a segment lie inside the block, whose lengths `step` asserts.
    unsafe {
        let mut tops = [lowest; 4];
        for seg in segments {
            if !seg.vectors.contains(&v) {
                continue;
            }
            let mut p = scores
                .add((seg.keys.start - first) * row_len::<S>() + at)
                .cast_const();
            let n = seg.keys.len();
            for _ in 0..n / 4 {
                for (i, top) in tops.iter_mut().enumerate() {
                    *top = simd.max_f32s(*top, load(simd, p.add(i * row_len::<S>())));
                }
                p = p.wrapping_add(4 * row_len::<S>());
            }
            for _ in 0..n % 4 {
                tops[0] = simd.max_f32s(tops[0], load(simd, p));
                p = p.wrapping_add(row_len::<S>());
            }
        }
        let top = simd.max_f32s(
            simd.max_f32s(tops[0], tops[1]),
            simd.max_f32s(tops[2], tops[3]),
        );
        let top = simd.mul_f32s(top, scale);

        let mut reference = load(simd, block.reference.as_ptr().add(at));
        let mut sum = load(simd, block.sum.as_ptr().add(at));
        let limit = simd.add_f32s(reference, simd.splat_f32s(SLACK));
        if simd.first_true_m32s(simd.greater_than_f32s(top, limit)) < S::F32_LANES {
            let raises = simd.greater_than_f32s(top, reference);
            // Relative to a whole power of two, what is rounded is rounded alike whatever the reference, so that O − W plus
            // W is O.
            let top = if A::EACH == 2 { round(simd, top) } else { top };
            let new = simd.select_f32s(raises, top, reference);
            // Equal includes −∞ both times, whose difference would be NaN.
            let same = simd.equal_f32s(reference, new);
            let change =
                simd.select_f32s(same, simd.splat_f32s(0.0), simd.sub_f32s(reference, new));
            let factor = exp2(simd, change);
            for c in 0..dv {
                let p = block.o.as_mut_ptr().add(c * row_len::<S>() + at);
                store(simd, p, simd.mul_f32s(load(simd, p), factor));
            }
            sum = simd.mul_f32s(sum, factor);
            reference = new;
            store(simd, block.reference.as_mut_ptr().add(at), reference);
        }
        // A row that has seen −∞ only keeps probabilities of 0, not NaN.
        let nothing = simd.equal_f32s(reference, lowest);
        let shift = simd.sub_f32s(simd.splat_f32s(0.0), reference);
        let shift = simd.select_f32s(nothing, simd.splat_f32s(0.0), shift);

        let mut sums = [simd.splat_f32s(0.0); 2];
        for seg in segments {
            if !seg.vectors.contains(&v) {
                continue;
            }
            if A::EACH == 2 {
                let keys = seg.keys.start - first..seg.keys.end - first;
                let p = scores.add(at);
                sums[0] = probabilities(simd, arithmetic, scale, shift, p, keys, sums[0]);
                continue;
            }
            let mut p = scores.add((seg.keys.start - first) * row_len::<S>() + at);
            let n = seg.keys.len();
            for _ in 0..n / 2 {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let p = p.add(i * row_len::<S>());
                    let e = exp2(simd, mul_add(simd, load(simd, p), scale, shift));
                    store(simd, p, e);
                    *sum = simd.add_f32s(*sum, e);
                }
                p = p.wrapping_add(2 * row_len::<S>());
            }
            if n % 2 == 1 {
                let e = exp2(simd, mul_add(simd, load(simd, p), scale, shift));
                store(simd, p, e);
                sums[0] = simd.add_f32s(sums[0], e);
            }
        }
        let sum = simd.add_f32s(sum, simd.add_f32s(sums[0], sums[1]));
        store(simd, block.sum.as_mut_ptr().add(at), sum);
    }
}

/// Some whole number near `x`; infinities stay.
#[inline(always)]
fn round<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Beside 1.5 · 2²³ there is no room for fractions.
    let magic = simd.splat_f32s(12_582_912.0);
    simd.sub_f32s(simd.add_f32s(x, magic), magic)
}

/// Scores of a segment become words of probabilities, in place (see [`place`]), and are added to `sum`. A key of a pair that
/// the segment does not contain has the probability 0 in it.
///
/// # Safety
/// `scores` must point to a vector of `[KEYS, queries]`, of which `keys` are the segment's lines.
#[inline(always)]
unsafe fn probabilities<S: Simd, A: Arithmetic>(
    simd: S,
    arithmetic: A,
    scale: S::f32s,
    shift: S::f32s,
    scores: *mut f32,
    keys: Range<usize>,
    mut sum: S::f32s,
) -> S::f32s {
    let none = simd.splat_f32s(0.0);
    let ones = arithmetic.join(simd, simd.splat_f32s(1.0), simd.splat_f32s(1.0));
    let mut to = scores.wrapping_add(keys.start * row_len::<S>());
    // SAFETY (both): the lines are the segment's; words are written no later than the lines they come from.
    let at = |key: usize| unsafe {
        let score = load(simd, scores.add(key * row_len::<S>()));
        exp2(simd, mul_add(simd, score, scale, shift))
    };
    let mut write = |first: S::f32s, second: S::f32s| {
        let word = arithmetic.join(simd, first, second);
        unsafe { store(simd, to, word) };
        sum = arithmetic.mul_add(simd, word, ones, sum);
        to = to.wrapping_add(row_len::<S>());
    };
    let whole = keys.start.next_multiple_of(2)..keys.end / 2 * 2;
    if keys.start % 2 == 1 {
        write(none, at(keys.start));
    }
    for key in whole.step_by(2) {
        write(at(key), at(key + 1));
    }
    if keys.end % 2 == 1 {
        write(at(keys.end - 1), none);
    }
    sum
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

/// `to = from / sum − minus`, a query per lane.
#[inline(always)]
fn divide<S: Simd>(simd: S, from: &[f32], to: &mut [f32], sum: &[f32], minus: Option<&[f32]>) {
    assert!(
        from.len() == to.len()
            && from.len().is_multiple_of(row_len::<S>())
            && sum.len() >= row_len::<S>()
    );
    assert!(minus.is_none_or(|m| m.len() == to.len()));
    for at in (0..row_len::<S>()).step_by(S::F32_LANES) {
        // SAFETY: the assertions above.
        unsafe {
            let factor = simd.div_f32s(simd.splat_f32s(1.0), load(simd, sum.as_ptr().add(at)));
            for p in (at..from.len()).step_by(row_len::<S>()) {
                let mut x = simd.mul_f32s(load(simd, from.as_ptr().add(p)), factor);
                if let Some(minus) = minus {
                    x = simd.sub_f32s(x, load(simd, minus.as_ptr().add(p)));
                }
                store(simd, to.as_mut_ptr().add(p), x);
            }
        }
    }
}

/// Whether the first `n` of `[channels, queries]` are finite, and remain so when rounded to a type.
#[inline(always)]
fn stays_finite<S: Simd>(simd: S, x: &[f32], n: usize, dtype: DType) -> bool {
    let row = row_len::<S>();
    assert!(x.len().is_multiple_of(row) && n <= row && S::F32_LANES <= 16);
    // What is beyond the type's range overflows here already; and an infinity times 0 is NaN.
    let factor = simd.splat_f32s(f32::MAX / dtype.largest());
    let zero = simd.splat_f32s(0.0);
    let mut finite = true;
    for at in (0..n).step_by(S::F32_LANES) {
        let (mut sum, mut sums) = (zero, [0f32; 16]);
        for line in (at..x.len()).step_by(row) {
            // SAFETY: a vector inside a row, by the assertion above.
            let x = unsafe { load(simd, x.as_ptr().add(line)) };
            sum = simd.add_f32s(sum, simd.mul_f32s(simd.mul_f32s(x, factor), zero));
        }
        // SAFETY: a vector is no longer than 16.
        unsafe { store(simd, sums.as_mut_ptr(), sum) };
        let lanes = &sums[..(n - at).min(S::F32_LANES)];
        finite &= lanes.iter().all(|&sum| sum == 0.0);
    }
    finite
}

/// Rows of `[channels, queries]` whose sum is zero, since they see nothing, become 0 in place of 0 / 0.
fn clear_empty(x: &mut [f32], sum: &[f32]) {
    for (lane, _) in sum.iter().enumerate().filter(|(_, sum)| **sum == 0.0) {
        x.iter_mut()
            .skip(lane)
            .step_by(sum.len())
            .for_each(|x| *x = 0.0);
    }
}

/// Divides by the sums and writes a block's output, and its residual in captures.
///
/// # Safety
/// The block's queries must lie inside the shape and belong to this task alone.
#[inline(always)]
unsafe fn finish<S: Simd>(
    simd: S,
    a: &Attention<'_>,
    block: &mut Block<'_>,
    finite: &AtomicBool,
    rows: &mut [f32],
    more: &mut [f32],
) {
    let (dv, plane) = (a.shape.v_dim, block.plane);
    let zeros = match a.mask {
        Some(mask) => mask.guarded || matches!(a.mode, Mode::Window { .. }),
        None => false,
    };
    if zeros || a.shape.kv_tokens == 0 {
        // Where nothing was added the empty sum is 0, not 0 / 0.
        for sum in block.sum.iter_mut().filter(|sum| **sum == 0.0) {
            *sum = 1.0;
        }
    }
    let o = &mut more[..dv * row_len::<S>()];
    let tokens = block.queries.clone();
    if let Mode::FullCapture { residual, .. } = &a.mode {
        divide(simd, block.o, o, block.sum, Some(block.w));
        if !stays_finite(simd, o, tokens.len(), residual.dtype) {
            finite.store(false, Ordering::Relaxed);
        }
        // SAFETY: promised by the caller.
        unsafe {
            scatter_channels::<S>(residual, plane, tokens.clone(), dv, row_len::<S>(), o, rows)
        };
    }
    divide(simd, block.o, o, block.sum, None);
    if let Mode::Window {
        residual: Some(residual),
        ..
    } = &a.mode
    {
        let plus = (residual, &mut *block.o);
        // SAFETY: promised by the caller. The sums are spent; their place takes the residual.
        unsafe {
            scatter_sum::<S>(&a.out, plus, plane, tokens, dv, row_len::<S>(), o, rows);
        }
        return;
    }
    // SAFETY: promised by the caller.
    unsafe { scatter_channels::<S>(&a.out, plane, tokens, dv, row_len::<S>(), o, rows) };
}
