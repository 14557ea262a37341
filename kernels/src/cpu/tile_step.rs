//! One query block against one key block: Q·Kᵀ, online softmax, P·V.
//!
//! Captures need sums over the keys inside the band and over the others. Scores are computed for both at once, and each
//! vector of queries then turns those of either side into probabilities in place. Only at the band's edges, where some
//! queries of a vector see a key and others do not, both sides need them. Two passes over the keys instead, one for each
//! side, took 2 to 4 % longer at 1024 tokens.
//!
//! Owns the order inside a step and what is hidden from whom. Which blocks meet is the task's business.

use std::ops::Range;

use pulp::Simd;

use super::block::QueryBlock;
use super::context::{Context, KvBlock};
use super::gemm::Gemm;
use super::isa::{DotArithmetic, MAX_NR, block_m, load, mul_add, store};
use super::key_ranges::{BandSide, KeySegment, VisibleKeys};
use super::kv::BLOCK_N;
use super::mask_tile::TileKind;
use super::softmax::OnlineSoftmax;

/// Adds what `block` sees of `keys` to its softmax states. For each state there are its visible keys, and the segments of
/// these keys.
#[inline(always)]
pub(super) fn tile_step<S: Simd, A: DotArithmetic>(
    simd: S,
    context: &mut Context<'_, A>,
    block: &mut QueryBlock<'_>,
    keys: Range<usize>,
    visible: &[VisibleKeys],
    segments: &[Vec<KeySegment>],
) {
    let lanes = S::F32_LANES;
    let (d, dv) = (context.head_dim, context.v_dim);
    let (first, count) = (keys.start, keys.len());
    assert!(
        context.scores.len() >= BLOCK_N * block_m::<S>() && block.q.len() >= d * block_m::<S>()
    );
    for state in &block.state[..visible.len()] {
        assert!(
            state.o.len() >= dv * block_m::<S>()
                && state.row_sum.len() >= block_m::<S>()
                && state.running_max.len() >= block_m::<S>()
        );
    }

    let (arithmetic, scores) = (context.arithmetic, context.scores.as_mut_ptr());
    let KvBlock { k, v, .. } = context.kv_blocks[block.kv_head];
    let (k_row, k_step) = context.kv.k.strides();
    let (whole, scored);
    match segments {
        [one] => scored = &one[..],
        _ => {
            whole = [KeySegment::whole(keys, visible[0].vectors())];
            scored = &whole;
        }
    }
    let tile = context
        .tile
        .as_ref()
        .filter(|tile| tile.kind() == TileKind::Additive);
    let has_mask = tile.is_some();
    let neg_inf = simd.splat_f32s(f32::NEG_INFINITY);
    // The largest scores of keys that all queries of a vector see; unused where a mask is still to be added.
    let mut row_max = [neg_inf; MAX_NR];
    for seg in scored {
        let key = seg.keys.start - first;
        let lane = seg.vectors.start * lanes;
        let mut segment_max = [neg_inf; MAX_NR];
        // SAFETY: keys and lanes of a segment lie inside the packed block; the matrices are separate scratch.
        unsafe {
            Gemm {
                a: k.add(key * k_row),
                a_row: k_row,
                a_step: k_step,
                b: block.q.as_ptr().add(lane),
                c: scores.add(key * block_m::<S>() + lane),
                rows: seg.keys.len(),
                steps: d.div_ceil(A::ELEMS_PER_WORD),
                vectors: seg.vectors.len(),
                add: false,
                row_max: if has_mask {
                    std::ptr::null_mut()
                } else {
                    segment_max.as_mut_ptr().cast::<f32>().add(lane)
                },
            }
            .run(simd, arithmetic, |steps| context.prefetch.run(steps));
        }
        for v in (0..MAX_NR).filter(|&v| seg.is_fully_visible(v)) {
            row_max[v] = simd.max_f32s(row_max[v], segment_max[v]);
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
        save_edge_scores(simd, context.scores, context.edge_scores, first, outside);
    }

    let (v_step, v_row) = context.kv.v.strides();
    for (side, (side_keys, segments)) in visible.iter().zip(segments).enumerate() {
        let edge_scores = (side == 1).then_some(&*context.edge_scores);
        apply_band(
            simd,
            context.scores,
            edge_scores,
            block,
            first,
            side_keys.side(),
            segments,
        );
        let vectors = segments.iter().map(|s| s.vectors.end).max().unwrap_or(0);
        let mut softmax = OnlineSoftmax {
            arithmetic,
            scale,
            scores: &mut *context.scores,
            state: &mut block.state[side],
            v_dim: dv,
            first,
            segments,
        };
        for (v, &known_max) in row_max[..vectors].iter().enumerate() {
            let shows_all = || {
                let shown = segments.iter().filter(|seg| seg.is_fully_visible(v));
                shown.map(|seg| seg.keys.len()).sum::<usize>() == count
            };
            // Each side needs its own, which that of all keys is if none of them are on the other side.
            let is_known = !has_mask && (visible.len() == 1 || shows_all());
            softmax.update(simd, v, is_known.then_some(known_max));
        }
        for seg in segments {
            let (key, end) = (seg.keys.start - first, seg.keys.end - first);
            // The other half of a pair may be of a key that the segment does not contain.
            let hides = seg.masked != 0 || has_mask || A::ELEMS_PER_WORD == 2;
            if context.kv_blocks[block.kv_head].has_non_finite && hides {
                accumulate_masked_pv(simd, context, block, side, first, side_keys, seg);
                continue;
            }
            let lane = seg.vectors.start * lanes;
            // SAFETY: as for the scores.
            unsafe {
                Gemm {
                    a: v.add(key / A::ELEMS_PER_WORD * v_step),
                    a_row: v_row,
                    a_step: v_step,
                    b: scores.add(key * block_m::<S>() + lane),
                    c: block.state[side].o.as_mut_ptr().add(lane),
                    rows: dv,
                    steps: end.div_ceil(A::ELEMS_PER_WORD) - key / A::ELEMS_PER_WORD,
                    vectors: seg.vectors.len(),
                    add: true,
                    row_max: std::ptr::null_mut(),
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
fn probability_index<A: DotArithmetic>(key: usize, start: usize) -> (usize, usize) {
    (
        start + key / A::ELEMS_PER_WORD - start / A::ELEMS_PER_WORD,
        key % A::ELEMS_PER_WORD,
    )
}

/// Which queries of a vector see a key, `shift` and `width` being theirs in [`QueryBlock`].
#[inline(always)]
fn band_mask<S: Simd>(
    simd: S,
    side: BandSide,
    key: usize,
    shift: S::u32s,
    width: S::u32s,
) -> S::m32s {
    let from_first = simd.add_u32s(simd.splat_u32s(key as u32), shift);
    let inside = simd.less_than_or_equal_u32s(from_first, width);
    match side {
        BandSide::Outside(_) => simd.not_m32s(inside),
        _ => inside,
    }
}

/// `shift` and `width` of vector `v`.
#[inline(always)]
fn band_bounds<S: Simd>(simd: S, block: &QueryBlock<'_>, v: usize) -> [S::u32s; 2] {
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

/// Saves the scores at the band's edges for the other side.
#[inline(always)]
fn save_edge_scores<S: Simd>(
    simd: S,
    scores: &[f32],
    edge_scores: &mut [f32],
    first: usize,
    segments: &[KeySegment],
) {
    assert!(edge_scores.len() >= BLOCK_N * block_m::<S>());
    let mut to = edge_scores.as_mut_ptr();
    for seg in segments {
        for v in seg.partial_vectors() {
            for key in seg.partial.clone() {
                // SAFETY: keys and vectors of a segment lie inside the block, and segments are disjoint.
                unsafe {
                    let at = (key - first) * block_m::<S>() + v * S::F32_LANES;
                    store(simd, to, load(simd, scores.as_ptr().add(at)));
                    to = to.add(S::F32_LANES);
                }
            }
        }
    }
}

/// Sets the scores that a query does not see on this side to −∞, the others of the band's edges to those in
/// `edge_scores`, which [`save_edge_scores`] has saved, if there are any.
#[inline(always)]
fn apply_band<S: Simd>(
    simd: S,
    scores: &mut [f32],
    edge_scores: Option<&[f32]>,
    block: &QueryBlock<'_>,
    first: usize,
    side: BandSide,
    segments: &[KeySegment],
) {
    let hidden = simd.splat_f32s(f32::NEG_INFINITY);
    let mut saved = edge_scores.map(<[f32]>::as_ptr);
    for seg in segments {
        for v in seg.partial_vectors() {
            let [shift, width] = band_bounds(simd, block, v);
            for key in seg.partial.clone() {
                // SAFETY: keys and vectors of a segment lie inside the block; so many scores were saved.
                unsafe {
                    let at = (key - first) * block_m::<S>() + v * S::F32_LANES;
                    let to = scores.as_mut_ptr().add(at);
                    let score = load(simd, saved.unwrap_or(to));
                    let shown = band_mask(simd, side, key, shift, width);
                    store(simd, to, simd.select_f32s(shown, score, hidden));
                    saved = saved.map(|saved| saved.wrapping_add(S::F32_LANES));
                }
            }
        }
    }
}

/// O += Vᵀ·P where masked probabilities stand beside values that are not finite: 0 · ∞ would spoil queries that do
/// not see the key, so each product is selected. Slow and rare.
#[inline(always)]
fn accumulate_masked_pv<S: Simd, A: DotArithmetic>(
    simd: S,
    context: &Context<'_, A>,
    block: &mut QueryBlock<'_>,
    side: usize,
    first: usize,
    visible: &VisibleKeys,
    seg: &KeySegment,
) {
    let text = visible.text();
    let tile = context
        .tile
        .as_ref()
        .filter(|tile| tile.kind() == TileKind::Additive);
    let hidden = simd.splat_f32s(f32::NEG_INFINITY);
    let values = context.kv_blocks[block.kv_head].v;
    let (v_step, v_row) = context.kv.v.strides();
    for v in seg.vectors.clone() {
        let at = v * S::F32_LANES;
        let [shift, width] = band_bounds(simd, block, v);
        for key in seg.keys.clone() {
            let (line, number) = probability_index::<A>(key - first, seg.keys.start - first);
            for c in 0..context.v_dim {
                // SAFETY: keys and vectors of a segment lie inside the block.
                unsafe {
                    let o = block.state[side]
                        .o
                        .as_mut_ptr()
                        .add(c * block_m::<S>() + at);
                    let p = load(
                        simd,
                        context.scores.as_ptr().add(line * block_m::<S>() + at),
                    );
                    let value = *values.add((key - first) / A::ELEMS_PER_WORD * v_step + c * v_row);
                    let value = simd.splat_f32s(A::unpack(value)[number]);
                    let old = load(simd, o);
                    let new = mul_add(simd, A::unpack_lane(simd, p, number), value, old);
                    let hides = seg.is_partially_masked(v) && !text.contains(&key);
                    let mut new = if hides {
                        simd.select_f32s(
                            band_mask(simd, visible.side(), key, shift, width),
                            new,
                            old,
                        )
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
