//! One task: some query blocks of one (batch, head) against all keys that they see.
//!
//! Owns the order of things (which pass, which block, when to pack, snapshot and finish) and the online softmax.
//! Which keys are seen is `sight`'s business, products are `gemm`'s, memory outside the scratch is `pack`'s.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::exp::exp2;
use super::gemm::{Gemm, QUERIES};
use super::mask::{Effect, Tile};
use super::pack::{Ahead, Order, Plane, gather, gather_channels, scatter_channels};
use super::scratch::Scratch;
use super::sight::{Pass, Segment, Segments, Sight, row};
use super::vector::{load, mul_add, store};
use crate::api::{Attention, Mode};

/// Keys in a block. With [`QUERIES`] it sets the working set: scores, Q, O, K and V of a block should stay in L2
/// and mostly in L1.
const KEYS: usize = 120;

/// How much a row's scores (in powers of two) may exceed its reference before sums are rescaled.
const SLACK: f32 = 8.0;

pub(crate) struct Task<'a, 'b> {
    pub a: &'a Attention<'b>,
    pub batch: usize,
    pub head: usize,
    /// Query blocks, of [`QUERIES`] queries each.
    pub blocks: Range<usize>,
    pub scratch: &'a mut Scratch,
}

impl WithSimd for Task<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        run(simd, self);
    }
}

/// What a query block carries from key block to key block; a query per lane.
struct Block<'s> {
    queries: Range<usize>,
    /// `[head_dim, QUERIES]`: q, with the sign of the scale.
    q: &'s mut [f32],
    /// `[v_dim, QUERIES]`: Σ 2^(score − reference) · v so far.
    o: &'s mut [f32],
    /// `[v_dim, QUERIES]`: W, in captures.
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

/// What all steps of a task share.
struct Context<'s> {
    prefetch: Prefetch,
    /// |scale| · log2(e): exponents are base 2.
    scale: f32,
    head_dim: usize,
    v_dim: usize,
    /// `[KEYS, QUERIES]`, scores and then probabilities of one block.
    scores: &'s mut [f32],
    k: &'s mut [f32],
    k_order: Order,
    v: &'s mut [f32],
    v_order: Order,
    /// Whether the packed values hold an infinity or a NaN, which must not reach queries that do not see them.
    v_wild: bool,
    /// The mask of the block at work; `None` if the call has none.
    tile: Option<Tile<'s>>,
}

#[inline(always)]
fn run<S: Simd>(simd: S, t: Task<'_, '_>) {
    let a = t.a;
    let s = a.shape;
    let (d, dv) = (s.head_dim, s.v_dim);
    let count = t.blocks.len();
    let captures = matches!(a.mode, Mode::FullCapture { .. });
    let w_len = if captures { dv * QUERIES } else { 0 };
    let tile_len = if a.mask.is_some() { Tile::len(KEYS) } else { 0 };

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
        count * d * QUERIES,
        count * dv * QUERIES,
        count * w_len,
        count * QUERIES,
        count * QUERIES,
        count * QUERIES,
        count * QUERIES,
        KEYS * QUERIES,
        KEYS * d,
        KEYS * dv,
        QUERIES * d.max(dv),
        QUERIES * dv,
        tile_len,
        tile_len,
    ]);
    let plane = Plane {
        batch: t.batch,
        head: t.head,
    };
    let kv_plane = Plane {
        batch: t.batch,
        head: t.head / (s.heads / s.kv_heads),
    };
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
    let mut cut = [q, o, w, reference, sum, from, to];
    for index in t.blocks.clone() {
        let lens = [
            d * QUERIES,
            dv * QUERIES,
            w_len,
            QUERIES,
            QUERIES,
            QUERIES,
            QUERIES,
        ];
        let mut n = 0;
        let [q, o, w, reference, sum, from, to] = cut.each_mut().map(|all| {
            let (head, tail) = std::mem::take(all).split_at_mut(lens[n]);
            *all = tail;
            n += 1;
            head
        });
        let first = index * QUERIES;
        let queries = first..s.q_tokens.min(first + QUERIES);
        // While these queries are packed, the next ones arrive, and finally the first keys and values.
        if index + 1 < t.blocks.end {
            let next = queries.end..s.q_tokens.min(queries.end + QUERIES);
            Ahead::new(&a.q, plane, next, d).all();
        } else {
            let keys = first_keys(a, t.blocks.start * QUERIES);
            Ahead::new(&a.k, kv_plane, keys.clone(), d).all();
            Ahead::new(&a.v, kv_plane, keys, dv).all();
        }
        // SAFETY: queries lie inside the shape.
        unsafe { pack_q(a, plane, &queries, sign, rows, q) };
        o.fill(0.0);
        reference.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        if let Mode::FullCapture { band, .. } | Mode::Window { band, .. } = &a.mode {
            for lane in 0..QUERIES {
                let keys = row(band, (first + lane).min(s.q_tokens - 1), s.kv_tokens);
                from[lane] = f32::from_bits(keys.start as u32);
                to[lane] = f32::from_bits(keys.end as u32);
            }
        }
        blocks.push(Block {
            queries,
            q,
            o,
            w,
            reference,
            sum,
            from,
            to,
        });
    }

    let queries = t.blocks.start * QUERIES..s.q_tokens.min(t.blocks.end * QUERIES);
    let residual = match &a.mode {
        Mode::Window {
            residual: Some(r), ..
        } => Ahead::new(r, plane, queries.clone(), dv),
        Mode::FullCapture { residual: r, .. } => Ahead::output(r, plane, queries.clone(), dv),
        _ => Ahead::nothing(),
    };
    let mut context = Context {
        prefetch: Prefetch {
            mask: Ahead::nothing(),
            lists: [
                Ahead::nothing(),
                Ahead::nothing(),
                residual,
                Ahead::output(&a.out, plane, queries, dv),
            ],
            rate: 1,
        },
        scale,
        head_dim: d,
        v_dim: dv,
        scores,
        k,
        k_order: Order::natural(a.k.strides, KEYS),
        v,
        v_order: Order::natural(a.v.strides, KEYS),
        v_wild: false,
        tile: a.mask.map(|mask| Tile::new(mask, plane, turned, lines)),
    };
    match &a.mode {
        Mode::Full => pass(simd, a, kv_plane, Pass::All, &mut context, &mut blocks),
        Mode::Window { band, .. } => {
            pass(
                simd,
                a,
                kv_plane,
                Pass::Inside(*band),
                &mut context,
                &mut blocks,
            );
        }
        Mode::FullCapture { band, .. } => {
            pass(
                simd,
                a,
                kv_plane,
                Pass::Inside(*band),
                &mut context,
                &mut blocks,
            );
            for block in &mut blocks {
                divide(simd, block.o, block.w, block.sum, None);
                if a.mask.is_some() {
                    clear_empty(block.w, block.sum);
                }
            }
            pass(
                simd,
                a,
                kv_plane,
                Pass::Outside(*band),
                &mut context,
                &mut blocks,
            );
        }
    }
    for block in &mut blocks {
        // SAFETY: the block's queries lie inside the shape, and belong to this task alone.
        unsafe { finish(simd, a, plane, block, rows, more) };
    }
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

/// Q of a block, a query per lane, times `sign`; lanes beyond the sequence are zero.
///
/// # Safety
/// `queries` must lie inside the shape.
#[inline(always)]
unsafe fn pack_q(
    a: &Attention<'_>,
    plane: Plane,
    queries: &Range<usize>,
    sign: f32,
    rows: &mut [f32],
    q: &mut [f32],
) {
    let d = a.shape.head_dim;
    if queries.len() < QUERIES {
        q.fill(0.0);
    }
    // SAFETY: promised by the caller.
    unsafe { gather_channels(&a.q, plane, queries.clone(), d, QUERIES, q, rows) };
    if sign != 1.0 {
        for x in q.iter_mut() {
            *x *= sign;
        }
    }
}

/// Takes every query block past the keys of one pass.
#[inline(always)]
fn pass<S: Simd>(
    simd: S,
    a: &Attention<'_>,
    plane: Plane,
    pass: Pass,
    context: &mut Context<'_>,
    blocks: &mut [Block<'_>],
) {
    let s = a.shape;
    let sights: Vec<Sight> = blocks
        .iter()
        .map(|b| Sight::new(pass, b.queries.clone(), s.kv_tokens, S::F32_LANES))
        .collect();
    let all =
        blocks.first().map_or(0, |b| b.queries.start)..blocks.last().map_or(0, |b| b.queries.end);
    let mut segments = Segments::default();
    for first in (0..s.kv_tokens).step_by(KEYS) {
        let keys = first..s.kv_tokens.min(first + KEYS);
        if !sights.iter().any(|sight| sight.touches(&keys)) {
            continue;
        }
        // SAFETY: the keys lie inside the shape.
        unsafe {
            gather(
                &a.k,
                plane,
                keys.clone(),
                s.head_dim,
                context.k_order,
                context.k,
            );
            gather(
                &a.v,
                plane,
                keys.clone(),
                s.v_dim,
                context.v_order,
                context.v,
            );
        }
        context.v_wild = (pass != Pass::All || a.mask.is_some()) && wild(keys.len(), context);
        let touched = sights.iter().filter(|sight| sight.touches(&keys)).count();
        let next = keys.end..s.kv_tokens.min(keys.end + KEYS);
        if sights.iter().any(|sight| sight.touches(&next)) {
            context.prefetch.lists[0] = Ahead::new(&a.k, plane, next.clone(), s.head_dim);
            context.prefetch.lists[1] = Ahead::new(&a.v, plane, next, s.v_dim);
        }
        let tiles = touched * (keys.len() + s.v_dim) / 6 + 1;
        let mut tokens = context.prefetch.lists[0].left() + context.prefetch.lists[1].left();
        if a.mask.is_some() {
            tokens += touched * QUERIES;
        }
        context.prefetch.rate = 1 + tokens / tiles;
        for (block, sight) in blocks.iter_mut().zip(&sights) {
            if sight.touches(&keys) {
                if let Some(tile) = &mut context.tile {
                    // SAFETY: the block's queries and the keys lie inside the shape.
                    unsafe { tile.read(block.queries.clone(), keys.clone()) };
                    if tile.effect() == Effect::HidesAll {
                        continue;
                    }
                    let (queries, keys) = next_tile(block.queries.end, &all, &keys, s.kv_tokens);
                    context.prefetch.mask = tile.ahead(queries, keys);
                }
                sight.segments(keys.clone(), &mut segments);
                step(simd, context, block, sight, pass, first, &segments.list);
            }
        }
    }
}

/// The queries and keys that come after the query block that ends at `end`, if the band hides none of them; `all` are
/// the queries of the task.
fn next_tile(
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
    (first..all.end.min(first + QUERIES), keys)
}

#[inline(always)]
fn any_wild(line: &[f32]) -> bool {
    // x · 0 is NaN for an x that is not finite, and stays NaN in a sum.
    let mut sum = [0f32; 16];
    let (lines, rest) = line.as_chunks::<16>();
    for x in lines {
        for i in 0..16 {
            sum[i] += x[i] * 0.0;
        }
    }
    let mut all = 0.0;
    for x in sum.iter().chain(rest) {
        all += x * 0.0;
    }
    all != 0.0
}

/// Whether the packed values of `keys` keys hold an infinity or a NaN.
#[inline(always)]
fn wild(keys: usize, context: &Context<'_>) -> bool {
    match context.v_order {
        Order::Tokens => any_wild(&context.v[..keys * context.v_dim]),
        Order::Channels { stride } => {
            (0..context.v_dim).any(|c| any_wild(&context.v[c * stride..c * stride + keys]))
        }
    }
}

/// One query block against one key block: scores, softmax, values.
#[inline(always)]
fn step<S: Simd>(
    simd: S,
    context: &mut Context<'_>,
    block: &mut Block<'_>,
    sight: &Sight,
    pass: Pass,
    first: usize,
    segments: &[Segment],
) {
    let lanes = S::F32_LANES;
    let (d, dv) = (context.head_dim, context.v_dim);
    assert!(context.scores.len() >= KEYS * QUERIES && block.q.len() >= d * QUERIES);
    assert!(
        block.o.len() >= dv * QUERIES
            && block.sum.len() >= QUERIES
            && block.reference.len() >= QUERIES
    );
    let scores = context.scores.as_mut_ptr();

    let (k_row, k_step) = match context.k_order {
        Order::Tokens => (d, 1),
        Order::Channels { stride } => (1, stride),
    };
    for seg in segments {
        let key = seg.keys.start - first;
        let lane = seg.vectors.start * lanes;
        // SAFETY: keys and lanes of a segment lie inside the packed block; the matrices are separate scratch.
        unsafe {
            Gemm {
                a: context.k.as_ptr().add(key * k_row),
                a_row: k_row,
                a_step: k_step,
                b: block.q.as_ptr().add(lane),
                c: scores.add(key * QUERIES + lane),
                rows: seg.keys.len(),
                steps: d,
                vectors: seg.vectors.len(),
                add: false,
            }
            .run(simd, || context.prefetch.poke());
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
        softmax(simd, scale, context.scores, block, dv, first, segments, v);
    }

    let (v_row, v_step) = match context.v_order {
        Order::Tokens => (1, dv),
        Order::Channels { stride } => (stride, 1),
    };
    for seg in segments {
        let key = seg.keys.start - first;
        if context.v_wild && (seg.masked != 0 || tile.is_some()) {
            values_seen(simd, context, block, sight, pass, first, seg);
            continue;
        }
        let lane = seg.vectors.start * lanes;
        // SAFETY: as for the scores.
        unsafe {
            Gemm {
                a: context.v.as_ptr().add(key * v_step),
                a_row: v_row,
                a_step: v_step,
                b: scores.add(key * QUERIES + lane),
                c: block.o.as_mut_ptr().add(lane),
                rows: dv,
                steps: seg.keys.len(),
                vectors: seg.vectors.len(),
                add: true,
            }
            .run(simd, || context.prefetch.poke());
        }
    }
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
                    .add((key - first) * QUERIES + v * S::F32_LANES);
                let shown = seen(simd, block, pass, key, v);
                store(simd, p, simd.select_f32s(shown, load(simd, p), hidden));
            }
        }
    }
}

/// Online softmax of one vector of queries: scores become probabilities relative to the row's reference, which is
/// raised (and sums so far rescaled) only where scores exceed it by more than [`SLACK`].
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn softmax<S: Simd>(
    simd: S,
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
                .add((seg.keys.start - first) * QUERIES + at)
                .cast_const();
            let n = seg.keys.len();
            for _ in 0..n / 4 {
                for (i, top) in tops.iter_mut().enumerate() {
                    *top = simd.max_f32s(*top, load(simd, p.add(i * QUERIES)));
                }
                p = p.wrapping_add(4 * QUERIES);
            }
            for _ in 0..n % 4 {
                tops[0] = simd.max_f32s(tops[0], load(simd, p));
                p = p.wrapping_add(QUERIES);
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
            let new = simd.select_f32s(simd.greater_than_f32s(top, reference), top, reference);
            // Equal includes −∞ both times, whose difference would be NaN.
            let same = simd.equal_f32s(reference, new);
            let change =
                simd.select_f32s(same, simd.splat_f32s(0.0), simd.sub_f32s(reference, new));
            let factor = exp2(simd, change);
            for c in 0..dv {
                let p = block.o.as_mut_ptr().add(c * QUERIES + at);
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
            let mut p = scores.add((seg.keys.start - first) * QUERIES + at);
            let n = seg.keys.len();
            for _ in 0..n / 2 {
                for (i, sum) in sums.iter_mut().enumerate() {
                    let p = p.add(i * QUERIES);
                    let e = exp2(simd, mul_add(simd, load(simd, p), scale, shift));
                    store(simd, p, e);
                    *sum = simd.add_f32s(*sum, e);
                }
                p = p.wrapping_add(2 * QUERIES);
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

/// O += Vᵀ·P where masked probabilities stand beside values that are not finite: 0 · ∞ would spoil queries that do
/// not see the key, so each product is selected. Slow and rare.
#[inline(always)]
fn values_seen<S: Simd>(
    simd: S,
    context: &Context<'_>,
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
    for v in seg.vectors.clone() {
        let at = v * S::F32_LANES;
        for key in seg.keys.clone() {
            for c in 0..context.v_dim {
                let value = match context.v_order {
                    Order::Tokens => context.v[(key - first) * context.v_dim + c],
                    Order::Channels { stride } => context.v[c * stride + key - first],
                };
                // SAFETY: keys and vectors of a segment lie inside the block.
                unsafe {
                    let o = block.o.as_mut_ptr().add(c * QUERIES + at);
                    let p = context.scores.as_ptr().add((key - first) * QUERIES + at);
                    let old = load(simd, o);
                    let new = mul_add(simd, load(simd, p), simd.splat_f32s(value), old);
                    let hides = seg.masked >> v & 1 == 1 && !text.contains(&key);
                    let mut new = if hides {
                        simd.select_f32s(seen(simd, block, pass, key, v), new, old)
                    } else {
                        new
                    };
                    if let Some(tile) = tile {
                        let mask = load(simd, tile.lanes(key - first)[at..].as_ptr());
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
    assert!(from.len() == to.len() && from.len().is_multiple_of(QUERIES) && sum.len() >= QUERIES);
    assert!(minus.is_none_or(|m| m.len() == to.len()));
    for at in (0..QUERIES).step_by(S::F32_LANES) {
        // SAFETY: the assertions above.
        unsafe {
            let factor = simd.div_f32s(simd.splat_f32s(1.0), load(simd, sum.as_ptr().add(at)));
            for p in (at..from.len()).step_by(QUERIES) {
                let mut x = simd.mul_f32s(load(simd, from.as_ptr().add(p)), factor);
                if let Some(minus) = minus {
                    x = simd.sub_f32s(x, load(simd, minus.as_ptr().add(p)));
                }
                store(simd, to.as_mut_ptr().add(p), x);
            }
        }
    }
}

/// Rows of `[channels, QUERIES]` whose sum is zero, since they see nothing, become 0 in place of 0 / 0.
fn clear_empty(x: &mut [f32], sum: &[f32]) {
    for (lane, _) in sum.iter().enumerate().filter(|(_, sum)| **sum == 0.0) {
        x.iter_mut()
            .skip(lane)
            .step_by(QUERIES)
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
    plane: Plane,
    block: &mut Block<'_>,
    rows: &mut [f32],
    more: &mut [f32],
) {
    let dv = a.shape.v_dim;
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
    let o = &mut more[..dv * QUERIES];
    let tokens = block.queries.clone();
    if let Mode::FullCapture { residual, .. } = &a.mode {
        divide(simd, block.o, o, block.sum, Some(block.w));
        // SAFETY: promised by the caller.
        unsafe { scatter_channels(residual, plane, tokens.clone(), dv, QUERIES, o, rows) };
    }
    divide(simd, block.o, o, block.sum, None);
    if let Mode::Window {
        residual: Some(residual),
        ..
    } = &a.mode
    {
        // The sums are spent; their place takes the residual.
        // SAFETY: promised by the caller.
        unsafe { gather_channels(residual, plane, tokens.clone(), dv, QUERIES, block.o, rows) };
        for (x, r) in o.iter_mut().zip(block.o.iter()) {
            *x += r;
        }
    }
    // SAFETY: promised by the caller.
    unsafe { scatter_channels(&a.out, plane, tokens, dv, QUERIES, o, rows) };
}
