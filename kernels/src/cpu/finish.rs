//! The end of a query block: sums become outputs and residuals in the caller's memory.
//!
//! Works on a strip of one vector of queries at a time, so that what is in between stays in the first cache. Owns division
//! by the sums, R = O − W, O = W + R and the question whether a residual is finite.

use std::ops::Range;

use pulp::Simd;

use super::block::Block;
use super::gemm::row_len;
#[cfg(target_arch = "x86_64")]
use super::in_registers;
use super::pack::{Plane, scatter_channels};
use super::softmax::rescale;
use super::vector::{load, mul_add, store};
use crate::api::{Attention, Input, Mode, Output};

/// Where blocks end.
pub(super) struct Finish<'a> {
    pub a: &'a Attention<'a>,
    /// Of [`Finish::len`] numbers.
    pub room: &'a mut [f32],
}

impl Finish<'_> {
    /// Numbers of room: a strip `[channels, lanes]`, the same turned, and one of R.
    pub fn len<S: Simd>(v_dim: usize) -> usize {
        3 * v_dim * S::F32_LANES
    }

    /// Writes a block's output, and its residual in captures.
    ///
    /// # Safety
    /// The block's queries must lie inside the shape and belong to this task alone.
    #[inline(always)]
    pub unsafe fn run<S: Simd>(&mut self, simd: S, block: &mut Block<'_>) -> Finite {
        let a = self.a;
        let zeros = match a.mask {
            Some(mask) => mask.guarded || matches!(a.mode, Mode::Window { .. }),
            None => false,
        };
        if zeros || a.shape.kv_tokens == 0 {
            // Where nothing was added the empty sum is 0, not 0 / 0.
            for sum in block.sums[0].sum.iter_mut().filter(|sum| **sum == 0.0) {
                *sum = 1.0;
            }
        }
        let plus = match &a.mode {
            Mode::Window { residual, .. } => residual.as_ref(),
            _ => None,
        };
        let mut finite = Finite {
            out: true,
            residual: true,
        };
        for lane in (0..block.queries.len()).step_by(S::F32_LANES) {
            let first = block.queries.start + lane;
            let strip = Strip {
                plane: block.plane,
                tokens: first..block.queries.end.min(first + S::F32_LANES),
                lane,
            };
            // SAFETY (both): promised by the caller.
            if let Mode::FullCapture { residual, .. } = &a.mode {
                let minus = Some(&*block.sums[1].o);
                finite.residual &=
                    unsafe { self.strip(simd, block, &strip, minus, None, residual) };
            }
            finite.out &= unsafe { self.strip(simd, block, &strip, None, plus, &a.out) };
        }
        finite
    }

    /// `to = o / sum − minus + plus`; says whether that without `plus` is finite, also in the type of `to`.
    ///
    /// # Safety
    /// As for [`Finish::run`].
    #[inline(always)]
    unsafe fn strip<S: Simd>(
        &mut self,
        simd: S,
        block: &Block<'_>,
        strip: &Strip,
        minus: Option<&[f32]>,
        plus: Option<&Input<'_>>,
        to: &Output<'_>,
    ) -> bool {
        let channels = self.a.shape.v_dim;
        #[cfg(target_arch = "x86_64")]
        // SAFETY: promised by the caller.
        if let Some(finite) =
            unsafe { in_registers::strip::<S>(block, strip, channels, minus, plus, to) }
        {
            return finite;
        }
        let Strip {
            plane,
            tokens,
            lane,
        } = strip.clone();
        let (lanes, row) = (S::F32_LANES, row_len::<S>());
        assert!(
            block.sums[0].o.len() == channels * row
                && block.sums[0].sum.len() == row
                && lane + lanes <= row
        );
        assert!(minus.is_none_or(|m| m.len() == block.sums[0].o.len()));
        let (values, rest) = self.room.split_at_mut(channels * lanes);
        let (rows, room) = rest.split_at_mut(channels * lanes);
        // What is beyond the type's range overflows here already; and an infinity times 0 is NaN.
        let limit = simd.splat_f32s(f32::MAX / to.dtype.largest());
        let zero = simd.splat_f32s(0.0);
        let mut check = zero;
        // SAFETY: the assertions above; the rest is promised by the caller.
        unsafe {
            let factor = reciprocal(simd, block.sums[0].sum, lane);
            for c in 0..channels {
                let mut x = simd.mul_f32s(
                    load(simd, block.sums[0].o.as_ptr().add(c * row + lane)),
                    factor,
                );
                if let Some(minus) = minus {
                    x = simd.sub_f32s(x, load(simd, minus.as_ptr().add(c * row + lane)));
                }
                store(simd, values.as_mut_ptr().add(c * lanes), x);
                check = simd.add_f32s(check, simd.mul_f32s(simd.mul_f32s(x, limit), zero));
            }
            let n = tokens.len();
            scatter_channels::<S>(to, plus, plane, tokens, channels, lanes, values, rows, room);
            are_zero(simd, check, n)
        }
    }
}

/// Whether what was written is finite.
pub(super) struct Finite {
    /// The output, before R was added.
    pub out: bool,
    /// The residual; true where none was written.
    pub residual: bool,
}

/// Some queries of a block, which are the lanes of a vector from `lane` on.
#[derive(Clone)]
pub(super) struct Strip {
    pub plane: Plane,
    pub tokens: Range<usize>,
    pub lane: usize,
}

/// 1 / sum of a vector of queries.
///
/// # Safety
/// `sum` must have a vector from `lane` on.
#[inline(always)]
unsafe fn reciprocal<S: Simd>(simd: S, sum: &[f32], lane: usize) -> S::f32s {
    // SAFETY: promised by the caller.
    unsafe { simd.div_f32s(simd.splat_f32s(1.0), load(simd, sum.as_ptr().add(lane))) }
}

/// Whether the first `n` lanes are zero.
#[inline(always)]
fn are_zero<S: Simd>(simd: S, x: S::f32s, n: usize) -> bool {
    assert!(S::F32_LANES <= 16);
    let mut lanes = [0f32; 16];
    // SAFETY: a vector is no longer than 16.
    unsafe { store(simd, lanes.as_mut_ptr(), x) };
    lanes[..n.min(S::F32_LANES)].iter().all(|&x| x == 0.0)
}

/// The end of captures: of the sums over both sides of the band, those over all keys become the first, and W, what those
/// inside the band come to, the second's O. Where `empties` says that there may be none inside, W is 0 then, not 0 / 0.
#[inline(always)]
pub(super) fn merge<S: Simd>(simd: S, block: &mut Block<'_>, empties: bool) {
    let row = row_len::<S>();
    let [inside, outside] = &mut block.sums;
    assert!(inside.o.len() == outside.o.len() && inside.o.len().is_multiple_of(row));
    for sums in [&inside, &outside] {
        assert!(sums.sum.len() == row && sums.reference.len() == row);
    }
    let zero = simd.splat_f32s(0.0);
    for lane in (0..row).step_by(S::F32_LANES) {
        // SAFETY: the assertions above.
        unsafe {
            let reference = load(simd, inside.reference.as_ptr().add(lane));
            let other = load(simd, outside.reference.as_ptr().add(lane));
            let higher = simd.greater_than_f32s(other, reference);
            let top = simd.select_f32s(higher, other, reference);
            let (a, b) = (rescale(simd, reference, top), rescale(simd, other, top));
            let sum = load(simd, inside.sum.as_ptr().add(lane));
            let mut w = reciprocal(simd, inside.sum, lane);
            if empties {
                w = simd.select_f32s(simd.equal_f32s(sum, zero), zero, w);
            }
            let rest = load(simd, outside.sum.as_ptr().add(lane));
            let sum = mul_add(simd, rest, b, simd.mul_f32s(sum, a));
            store(simd, inside.sum.as_mut_ptr().add(lane), sum);
            for line in (lane..inside.o.len()).step_by(row) {
                let to = [&mut inside.o, &mut outside.o].map(|o| o.as_mut_ptr().add(line));
                let (x, y) = (load(simd, to[0]), load(simd, to[1]));
                store(simd, to[0], mul_add(simd, y, b, simd.mul_f32s(x, a)));
                store(simd, to[1], simd.mul_f32s(x, w));
            }
        }
    }
}

/// Whether the first `n` of `[channels, queries]` are finite.
#[inline(always)]
pub(super) fn are_finite<S: Simd>(simd: S, x: &[f32], n: usize) -> bool {
    let row = row_len::<S>();
    assert!(x.len().is_multiple_of(row) && n <= row);
    let zero = simd.splat_f32s(0.0);
    let mut finite = true;
    for at in (0..n).step_by(S::F32_LANES) {
        let mut check = zero;
        for line in (at..x.len()).step_by(row) {
            // SAFETY: a vector inside a row, by the assertion above.
            let x = unsafe { load(simd, x.as_ptr().add(line)) };
            check = simd.add_f32s(check, simd.mul_f32s(x, zero));
        }
        finite &= are_zero(simd, check, n - at);
    }
    finite
}
