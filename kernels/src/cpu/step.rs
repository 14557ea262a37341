//! One query block against one key block: scores, softmax, values.
//!
//! Captures need sums over the keys inside the band and over the others. Scores are computed for both at once, and each
//! vector of queries then turns those of either side into probabilities where they are. Only at the band's edges, where some
//! queries of a vector see a key and others do not, both sides need them. Two passes over the keys instead, one for each
//! side, took 2 to 4 % longer at 1024 tokens.
//!
//! Owns the order inside a step and what is hidden from whom. Which blocks meet is the task's business.

use std::ops::Range;

use pulp::Simd;

use super::arithmetic::Arithmetic;
use super::block::Block;
use super::context::{Context, Packed};
use super::gemm::{Gemm, MOST_VECTORS, row_len};
use super::keys::KEYS;
use super::mask::Effect;
use super::sight::{Segment, Side, Sight};
use super::softmax::softmax;
use super::vector::{load, mul_add, store};

/// Adds what `block` sees of `keys` to its sums. For each of them, there is a sight, and its segments of these keys.
#[inline(always)]
pub(super) fn step<S: Simd, A: Arithmetic>(
    simd: S,
    context: &mut Context<'_, A>,
    block: &mut Block<'_>,
    keys: Range<usize>,
    sights: &[Sight],
    segments: &[Vec<Segment>],
) {
    let lanes = S::F32_LANES;
    let (d, dv) = (context.head_dim, context.v_dim);
    let (first, count) = (keys.start, keys.len());
    assert!(context.scores.len() >= KEYS * row_len::<S>() && block.q.len() >= d * row_len::<S>());
    for sums in &block.sums[..sights.len()] {
        assert!(
            sums.o.len() >= dv * row_len::<S>()
                && sums.sum.len() >= row_len::<S>()
                && sums.reference.len() >= row_len::<S>()
        );
    }

    let (arithmetic, scores) = (context.arithmetic, context.scores.as_mut_ptr());
    let Packed { k, v, .. } = context.packed[block.kv];
    let (k_row, k_step) = context.keys.k.strides();
    let (whole, scored);
    match segments {
        [one] => scored = &one[..],
        _ => {
            whole = [Segment::whole(keys, sights[0].vectors())];
            scored = &whole;
        }
    }
    let tile = context
        .tile
        .as_ref()
        .filter(|tile| tile.effect() == Effect::Adds);
    let adds = tile.is_some();
    let lowest = simd.splat_f32s(f32::NEG_INFINITY);
    // The largest scores of keys that all queries of a vector see; nobody asks where a mask is still to be added.
    let mut tops = [lowest; MOST_VECTORS];
    for seg in scored {
        let key = seg.keys.start - first;
        let lane = seg.vectors.start * lanes;
        let mut largest = [lowest; MOST_VECTORS];
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
                tops: if adds {
                    std::ptr::null_mut()
                } else {
                    largest.as_mut_ptr().cast::<f32>().add(lane)
                },
            }
            .run(simd, arithmetic, |steps| context.prefetch.run(steps));
        }
        for v in (0..MOST_VECTORS).filter(|&v| seg.shows(v)) {
            tops[v] = simd.max_f32s(tops[v], largest[v]);
        }
    }
    let mut scale = context.scale;
    if let Some(tile) = tile {
        for seg in scored {
            let keys = seg.keys.start - first..seg.keys.end - first;
            tile.add(simd, scale, context.scores, keys, seg.vectors.clone());
        }
        scale = 1.0;
    }
    if let [_, outside] = segments {
        keep_corners(simd, context.scores, context.corners, first, outside);
    }

    let (v_step, v_row) = context.keys.v.strides();
    for (side, (sight, segments)) in sights.iter().zip(segments).enumerate() {
        let corners = (side == 1).then_some(&*context.corners);
        mask(
            simd,
            context.scores,
            corners,
            block,
            first,
            sight.side(),
            segments,
        );
        let sums = &mut block.sums[side];
        let vectors = segments.iter().map(|s| s.vectors.end).max().unwrap_or(0);
        for (v, &top) in tops[..vectors].iter().enumerate() {
            let shows_all = || {
                let shown = segments.iter().filter(|seg| seg.shows(v));
                shown.map(|seg| seg.keys.len()).sum::<usize>() == count
            };
            // Each side needs its own, which that of all keys is if none of them are on the other side.
            let known = !adds && (sights.len() == 1 || shows_all());
            softmax(
                simd,
                arithmetic,
                scale,
                context.scores,
                sums,
                dv,
                first,
                segments,
                v,
                known.then_some(top),
            );
        }
        for seg in segments {
            let (key, end) = (seg.keys.start - first, seg.keys.end - first);
            // The other half of a pair may be of a key that the segment does not contain.
            let hides = seg.masked != 0 || adds || A::EACH == 2;
            if context.packed[block.kv].wild && hides {
                values_seen(simd, context, block, side, first, sight, seg);
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
                    c: block.sums[side].o.as_mut_ptr().add(lane),
                    rows: dv,
                    steps: end.div_ceil(A::EACH) - key / A::EACH,
                    vectors: seg.vectors.len(),
                    add: true,
                    tops: std::ptr::null_mut(),
                }
                .run(simd, arithmetic, |steps| context.prefetch.run(steps));
            }
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

/// Which queries of a vector see a key, `shift` and `width` being theirs in [`Block`].
#[inline(always)]
fn seen<S: Simd>(simd: S, side: Side, key: usize, shift: S::u32s, width: S::u32s) -> S::m32s {
    let from_first = simd.add_u32s(simd.splat_u32s(key as u32), shift);
    let inside = simd.less_than_or_equal_u32s(from_first, width);
    match side {
        Side::Outside(_) => simd.not_m32s(inside),
        _ => inside,
    }
}

/// `shift` and `width` of vector `v`.
#[inline(always)]
fn sees<S: Simd>(simd: S, block: &Block<'_>, v: usize) -> [S::u32s; 2] {
    let lanes = v * S::F32_LANES..(v + 1) * S::F32_LANES;
    let [shift, width] = [&block.shift[lanes.clone()], &block.width[lanes]];
    // SAFETY: a vector's length each.
    unsafe {
        [
            simd.transmute_u32s_f32s(load(simd, shift.as_ptr())),
            simd.transmute_u32s_f32s(load(simd, width.as_ptr())),
        ]
    }
}

/// Keeps the scores of the band's edges for the other side.
#[inline(always)]
fn keep_corners<S: Simd>(
    simd: S,
    scores: &[f32],
    corners: &mut [f32],
    first: usize,
    segments: &[Segment],
) {
    assert!(corners.len() >= KEYS * row_len::<S>());
    let mut to = corners.as_mut_ptr();
    for seg in segments {
        for v in seg.masked_vectors() {
            for key in seg.partial.clone() {
                // SAFETY: keys and vectors of a segment lie inside the block, and segments are disjoint.
                unsafe {
                    let at = (key - first) * row_len::<S>() + v * S::F32_LANES;
                    store(simd, to, load(simd, scores.as_ptr().add(at)));
                    to = to.add(S::F32_LANES);
                }
            }
        }
    }
}

/// Sets the scores that a query does not see on this side to −∞, the others of the band's edges to those in `corners`, which
/// [`keep_corners`] has kept, if there are any.
#[inline(always)]
fn mask<S: Simd>(
    simd: S,
    scores: &mut [f32],
    corners: Option<&[f32]>,
    block: &Block<'_>,
    first: usize,
    side: Side,
    segments: &[Segment],
) {
    let hidden = simd.splat_f32s(f32::NEG_INFINITY);
    let mut kept = corners.map(<[f32]>::as_ptr);
    for seg in segments {
        for v in seg.masked_vectors() {
            let [shift, width] = sees(simd, block, v);
            for key in seg.partial.clone() {
                // SAFETY: keys and vectors of a segment lie inside the block; so many scores were kept.
                unsafe {
                    let at = (key - first) * row_len::<S>() + v * S::F32_LANES;
                    let to = scores.as_mut_ptr().add(at);
                    let score = load(simd, kept.unwrap_or(to));
                    let shown = seen(simd, side, key, shift, width);
                    store(simd, to, simd.select_f32s(shown, score, hidden));
                    kept = kept.map(|kept| kept.wrapping_add(S::F32_LANES));
                }
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
    side: usize,
    first: usize,
    sight: &Sight,
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
        let [shift, width] = sees(simd, block, v);
        for key in seg.keys.clone() {
            let (line, number) = place::<A>(key - first, seg.keys.start - first);
            for c in 0..context.v_dim {
                // SAFETY: keys and vectors of a segment lie inside the block.
                unsafe {
                    let o = block.sums[side].o.as_mut_ptr().add(c * row_len::<S>() + at);
                    let p = load(
                        simd,
                        context.scores.as_ptr().add(line * row_len::<S>() + at),
                    );
                    let value = *values.add((key - first) / A::EACH * v_step + c * v_row);
                    let value = simd.splat_f32s(A::numbers(value)[number]);
                    let old = load(simd, o);
                    let new = mul_add(simd, A::number(simd, p, number), value, old);
                    let hides = seg.hides(v) && !text.contains(&key);
                    let mut new = if hides {
                        simd.select_f32s(seen(simd, sight.side(), key, shift, width), new, old)
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
