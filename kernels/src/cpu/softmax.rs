//! The online softmax: scores of a block become probabilities, relative to a reference that sums so far share.

use std::ops::Range;

use pulp::Simd;

use super::arithmetic::Arithmetic;
use super::block::Sums;
use super::exp::exp2;
use super::gemm::row_len;
use super::sight::Segment;
use super::vector::{load, mul_add, store};

/// How much a row's scores (in powers of two) may exceed its reference before sums are rescaled.
const SLACK: f32 = 8.0;

/// Online softmax of one vector of queries: scores become probabilities relative to the row's reference, which is
/// raised (and sums so far rescaled) only where scores exceed it by more than [`SLACK`].
///
/// `known` is the largest score of the keys that segments show to all of these queries, if that is known.
///
/// Where probabilities are rounded to bfloat16 the rounded ones are summed: what values are multiplied with adds up to 1.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn softmax<S: Simd, A: Arithmetic>(
    simd: S,
    arithmetic: A,
    scale: f32,
    scores: &mut [f32],
    sums: &mut Sums<'_>,
    dv: usize,
    first: usize,
    segments: &[Segment],
    v: usize,
    known: Option<S::f32s>,
) {
    let at = v * S::F32_LANES;
    let scores = scores.as_mut_ptr();
    let lowest = simd.splat_f32s(f32::NEG_INFINITY);
    let scale = simd.splat_f32s(scale);
    // SAFETY (all of the function): keys and vectors of a segment lie inside the block, whose lengths `step` asserts.
    unsafe {
        let mut tops = [lowest; 4];
        tops[0] = known.unwrap_or(lowest);
        for seg in segments {
            if !seg.vectors.contains(&v) || known.is_some() && seg.shows(v) {
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

        let mut reference = load(simd, sums.reference.as_ptr().add(at));
        let mut sum = load(simd, sums.sum.as_ptr().add(at));
        let limit = simd.add_f32s(reference, simd.splat_f32s(SLACK));
        if simd.first_true_m32s(simd.greater_than_f32s(top, limit)) < S::F32_LANES {
            let raises = simd.greater_than_f32s(top, reference);
            // Relative to a whole power of two, what is rounded is rounded alike whatever the reference, so that O − W plus
            // W is O.
            let top = if A::EACH == 2 { round(simd, top) } else { top };
            let new = simd.select_f32s(raises, top, reference);
            let factor = rescale(simd, reference, new);
            for c in 0..dv {
                let p = sums.o.as_mut_ptr().add(c * row_len::<S>() + at);
                store(simd, p, simd.mul_f32s(load(simd, p), factor));
            }
            sum = simd.mul_f32s(sum, factor);
            reference = new;
            store(simd, sums.reference.as_mut_ptr().add(at), reference);
        }
        // A row that has seen −∞ only keeps probabilities of 0, not NaN.
        let nothing = simd.equal_f32s(reference, lowest);
        let shift = simd.sub_f32s(simd.splat_f32s(0.0), reference);
        let shift = simd.select_f32s(nothing, simd.splat_f32s(0.0), shift);

        let mut added = [simd.splat_f32s(0.0); 2];
        for seg in segments {
            if !seg.vectors.contains(&v) {
                continue;
            }
            if A::EACH == 2 {
                let keys = seg.keys.start - first..seg.keys.end - first;
                let p = scores.add(at);
                added[0] = probabilities(simd, arithmetic, scale, shift, p, keys, added[0]);
                continue;
            }
            let mut p = scores.add((seg.keys.start - first) * row_len::<S>() + at);
            let n = seg.keys.len();
            for _ in 0..n / 2 {
                for (i, sum) in added.iter_mut().enumerate() {
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
                added[0] = simd.add_f32s(added[0], e);
            }
        }
        let sum = simd.add_f32s(sum, simd.add_f32s(added[0], added[1]));
        store(simd, sums.sum.as_mut_ptr().add(at), sum);
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

/// Scores of a segment become words of probabilities, in place (see `step`), and are added to `sum`. A key of a pair that
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
