//! The online softmax: scores of a block become probabilities, relative to a running maximum.

use std::ops::Range;

use pulp::Simd;

use super::block::SoftmaxState;
use super::exp::exp2;
use super::isa::{DotArithmetic, block_m, load, mul_add, store};
use super::key_ranges::KeySegment;

/// How much a row's scores (in powers of two) may exceed its running maximum before the state is rescaled
/// (FlashAttention-4's lazy rescaling).
const RESCALE_THRESHOLD: f32 = 8.0;

/// The online softmax of one query block over one key block.
///
/// Where probabilities are rounded to bfloat16 the rounded ones are summed: what values are multiplied with adds up to 1.
pub(super) struct OnlineSoftmax<'a, 's, A> {
    pub arithmetic: A,
    /// What scores are multiplied with to be powers of two.
    pub scale: f32,
    /// `[BLOCK_N, queries]`.
    pub scores: &'a mut [f32],
    pub state: &'a mut SoftmaxState<'s>,
    pub v_dim: usize,
    /// The first key of the block.
    pub first: usize,
    pub segments: &'a [KeySegment],
}

impl<A: DotArithmetic> OnlineSoftmax<'_, '_, A> {
    /// Scores of one vector of queries become probabilities relative to the row's running maximum, which is raised (and the
    /// state rescaled) only where scores exceed it by more than [`RESCALE_THRESHOLD`].
    ///
    /// `precomputed_max` is the largest score of the keys that all of these queries see, if that is known.
    #[inline(always)]
    pub fn update<S: Simd>(
        &mut self,
        simd: S,
        lane_group: usize,
        precomputed_max: Option<S::f32s>,
    ) {
        let (arithmetic, first, segments) = (self.arithmetic, self.first, self.segments);
        let state = &mut *self.state;
        let at = lane_group * S::F32_LANES;
        let scores = self.scores.as_mut_ptr();
        let neg_inf = simd.splat_f32s(f32::NEG_INFINITY);
        let scale = simd.splat_f32s(self.scale);
        // SAFETY (all of the function): keys and vectors of a segment lie inside the block, whose lengths `tile_step`
        // asserts.
        unsafe {
            let mut partial_max = [neg_inf; 4];
            partial_max[0] = precomputed_max.unwrap_or(neg_inf);
            for seg in segments {
                if !seg.vectors.contains(&lane_group)
                    || precomputed_max.is_some() && seg.is_fully_visible(lane_group)
                {
                    continue;
                }
                let mut p = scores
                    .add((seg.keys.start - first) * block_m::<S>() + at)
                    .cast_const();
                let n = seg.keys.len();
                for _ in 0..n / 4 {
                    for (i, max) in partial_max.iter_mut().enumerate() {
                        *max = simd.max_f32s(*max, load(simd, p.add(i * block_m::<S>())));
                    }
                    p = p.wrapping_add(4 * block_m::<S>());
                }
                for _ in 0..n % 4 {
                    partial_max[0] = simd.max_f32s(partial_max[0], load(simd, p));
                    p = p.wrapping_add(block_m::<S>());
                }
            }
            let row_max = simd.max_f32s(
                simd.max_f32s(partial_max[0], partial_max[1]),
                simd.max_f32s(partial_max[2], partial_max[3]),
            );
            let row_max = simd.mul_f32s(row_max, scale);

            let mut running_max = load(simd, state.running_max.as_ptr().add(at));
            let mut row_sum = load(simd, state.row_sum.as_ptr().add(at));
            let limit = simd.add_f32s(running_max, simd.splat_f32s(RESCALE_THRESHOLD));
            if simd.first_true_m32s(simd.greater_than_f32s(row_max, limit)) < S::F32_LANES {
                let raised = simd.greater_than_f32s(row_max, running_max);
                // Relative to a whole power of two, what is rounded is rounded alike whatever the running maximum, so
                // that O − W plus W is O.
                let row_max = if A::ELEMS_PER_WORD == 2 {
                    round(simd, row_max)
                } else {
                    row_max
                };
                let new = simd.select_f32s(raised, row_max, running_max);
                let factor = rescale(simd, running_max, new);
                for c in 0..self.v_dim {
                    let p = state.o.as_mut_ptr().add(c * block_m::<S>() + at);
                    store(simd, p, simd.mul_f32s(load(simd, p), factor));
                }
                row_sum = simd.mul_f32s(row_sum, factor);
                running_max = new;
                store(simd, state.running_max.as_mut_ptr().add(at), running_max);
            }
            // A row that has seen −∞ only keeps probabilities of 0, not NaN.
            let is_empty = simd.equal_f32s(running_max, neg_inf);
            let shift = simd.sub_f32s(simd.splat_f32s(0.0), running_max);
            let shift = simd.select_f32s(is_empty, simd.splat_f32s(0.0), shift);

            let mut block_sum = [simd.splat_f32s(0.0); 2];
            for seg in segments {
                if !seg.vectors.contains(&lane_group) {
                    continue;
                }
                if A::ELEMS_PER_WORD == 2 {
                    let keys = seg.keys.start - first..seg.keys.end - first;
                    let p = scores.add(at);
                    block_sum[0] =
                        probabilities(simd, arithmetic, scale, shift, p, keys, block_sum[0]);
                    continue;
                }
                let mut p = scores.add((seg.keys.start - first) * block_m::<S>() + at);
                let n = seg.keys.len();
                for _ in 0..n / 2 {
                    for (i, sum) in block_sum.iter_mut().enumerate() {
                        let p = p.add(i * block_m::<S>());
                        let e = exp2(simd, mul_add(simd, load(simd, p), scale, shift));
                        store(simd, p, e);
                        *sum = simd.add_f32s(*sum, e);
                    }
                    p = p.wrapping_add(2 * block_m::<S>());
                }
                if n % 2 == 1 {
                    let e = exp2(simd, mul_add(simd, load(simd, p), scale, shift));
                    store(simd, p, e);
                    block_sum[0] = simd.add_f32s(block_sum[0], e);
                }
            }
            let row_sum = simd.add_f32s(row_sum, simd.add_f32s(block_sum[0], block_sum[1]));
            store(simd, state.row_sum.as_mut_ptr().add(at), row_sum);
        }
    }
}

/// What sums relative to `from` are multiplied with to be relative to `to`.
#[inline(always)]
pub(super) fn rescale<S: Simd>(simd: S, from: S::f32s, to: S::f32s) -> S::f32s {
    // Equal includes −∞ both times, whose difference would be NaN.
    let same = simd.equal_f32s(from, to);
    let change = simd.select_f32s(same, simd.splat_f32s(0.0), simd.sub_f32s(from, to));
    exp2(simd, change)
}

/// Some whole number near `x`; infinities stay.
#[inline(always)]
fn round<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Beside 1.5 · 2²³ there is no room for fractions.
    let magic = simd.splat_f32s(12_582_912.0);
    simd.sub_f32s(simd.add_f32s(x, magic), magic)
}

/// Scores of a segment become words of probabilities, in place (see `tile_step`), and are added to `sum`. A key of a pair
/// that the segment does not contain has the probability 0 in it.
///
/// # Safety
/// `scores` must point to a vector of `[BLOCK_N, queries]`, of which `keys` are the segment's lines.
#[inline(always)]
unsafe fn probabilities<S: Simd, A: DotArithmetic>(
    simd: S,
    arithmetic: A,
    scale: S::f32s,
    shift: S::f32s,
    scores: *mut f32,
    keys: Range<usize>,
    mut sum: S::f32s,
) -> S::f32s {
    let none = simd.splat_f32s(0.0);
    let ones = arithmetic.pack_pair(simd, simd.splat_f32s(1.0), simd.splat_f32s(1.0));
    let mut to = scores.wrapping_add(keys.start * block_m::<S>());
    // SAFETY (both): the lines are the segment's; words are written no later than the lines they come from.
    let at = |key: usize| unsafe {
        let score = load(simd, scores.add(key * block_m::<S>()));
        exp2(simd, mul_add(simd, score, scale, shift))
    };
    let mut write = |first: S::f32s, second: S::f32s| {
        let word = arithmetic.pack_pair(simd, first, second);
        unsafe { store(simd, to, word) };
        sum = arithmetic.mul_add(simd, word, ones, sum);
        to = to.wrapping_add(block_m::<S>());
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
