//! Epilogue of a query block: normalise O, form R = O − W or O = W + R, convert, transpose and store.
//!
//! Works on a strip of one vector of queries at a time, which stays in the L1. Owns the division by the row sums and the
//! question whether a residual is finite.

use pulp::Simd;

use super::block::{LaneStrip, QueryBlock};
use super::isa::{Backend, Native, RegisterEpilogue, block_m, load, mul_add, store};
use super::load_store::{ScatterChannels, offset};
use super::softmax::rescale;

use crate::api::{Attention, Mode};
use crate::tensor::{DType, Input, Output, Strides};

/// The epilogue of a task's query blocks.
pub(super) struct Epilogue<'a> {
    pub a: &'a Attention<'a>,
    /// Of [`Epilogue::len`] numbers.
    pub strip_buf: &'a mut [f32],
}

impl Epilogue<'_> {
    /// Floats of scratch: a strip `[channels, lanes]`, the same transposed, and one of R.
    pub fn len<S: Simd>(v_dim: usize) -> usize {
        3 * v_dim * S::F32_LANES
    }

    /// Writes a block's output, and its residual in captures.
    ///
    /// # Safety
    /// The block's queries must lie inside the shape and belong to this task alone.
    #[inline(always)]
    pub unsafe fn run<S: Simd>(&mut self, simd: S, block: &mut QueryBlock<'_>) -> FiniteFlag {
        let a = self.a;
        let zeros = match a.mask {
            Some(mask) => mask.guarded || matches!(a.mode, Mode::Window { .. }),
            None => false,
        };
        if zeros || a.shape.kv_tokens == 0 {
            // Where nothing was added the empty sum is 0, not 0 / 0.
            for sum in block.state[0].row_sum.iter_mut().filter(|sum| **sum == 0.0) {
                *sum = 1.0;
            }
        }
        let add = match &a.mode {
            Mode::Window { residual, .. } => residual.as_ref(),
            _ => None,
        };
        let mut finite = FiniteFlag {
            out: true,
            residual: true,
        };
        for lane in (0..block.queries.len()).step_by(S::F32_LANES) {
            let first = block.queries.start + lane;
            let strip = LaneStrip {
                batch_head: block.batch_head,
                tokens: first..block.queries.end.min(first + S::F32_LANES),
                lane,
            };
            // SAFETY (both): promised by the caller.
            if let Mode::FullCapture { residual, .. } = &a.mode {
                let subtract = Some(&*block.state[1].o);
                finite.residual &=
                    unsafe { self.strip(simd, block, &strip, subtract, None, residual) };
            }
            finite.out &= unsafe { self.strip(simd, block, &strip, None, add, &a.out) };
        }
        finite
    }

    /// `to = o / sum − subtract + add`; says whether that without `add` is finite, also in the type of `to`.
    ///
    /// # Safety
    /// As for [`Epilogue::run`].
    #[inline(always)]
    unsafe fn strip<S: Simd>(
        &mut self,
        simd: S,
        block: &QueryBlock<'_>,
        strip: &LaneStrip,
        subtract: Option<&[f32]>,
        add: Option<&Input<'_>>,
        to: &Output<'_>,
    ) -> bool {
        let channels = self.a.shape.v_dim;
        if in_registers::<S>(strip, channels, add, to) {
            // SAFETY: promised by the caller.
            return unsafe { strip_in_registers::<S>(block, strip, channels, subtract, add, to) };
        }
        let LaneStrip {
            batch_head,
            tokens,
            lane,
        } = strip.clone();
        let (lanes, row) = (S::F32_LANES, block_m::<S>());
        assert!(
            block.state[0].o.len() == channels * row
                && block.state[0].row_sum.len() == row
                && lane + lanes <= row
        );
        assert!(subtract.is_none_or(|m| m.len() == block.state[0].o.len()));
        let (values, rest) = self.strip_buf.split_at_mut(channels * lanes);
        let (rows, buf) = rest.split_at_mut(channels * lanes);
        // What is beyond the type's range overflows here already; and an infinity times 0 is NaN.
        let limit = simd.splat_f32s(f32::MAX / to.dtype.largest());
        let zero = simd.splat_f32s(0.0);
        let mut check = zero;
        // SAFETY: the assertions above; the rest is promised by the caller.
        unsafe {
            let factor = reciprocal(simd, block.state[0].row_sum, lane);
            for c in 0..channels {
                let mut x = simd.mul_f32s(
                    load(simd, block.state[0].o.as_ptr().add(c * row + lane)),
                    factor,
                );
                if let Some(subtract) = subtract {
                    x = simd.sub_f32s(x, load(simd, subtract.as_ptr().add(c * row + lane)));
                }
                store(simd, values.as_mut_ptr().add(c * lanes), x);
                check = simd.add_f32s(check, simd.mul_f32s(simd.mul_f32s(x, limit), zero));
            }
            let n = tokens.len();
            let scatter = ScatterChannels {
                to,
                add,
                batch_head,
                tokens,
                channels,
            };
            scatter.run::<S>(lanes, values, rows, buf);
            are_zero(simd, check, n)
        }
    }
}

/// Whether a strip can be written by the instruction set's epilogue in registers: float32 with contiguous channels.
///
/// Everything else goes by way of a strip in the L1. Window + R of 1024 tokens takes 2 % less with AVX-512, 4 to 11 % less
/// with AVX2.
#[inline(always)]
fn in_registers<S: Simd>(
    strip: &LaneStrip,
    channels: usize,
    add: Option<&Input<'_>>,
    to: &Output<'_>,
) -> bool {
    let fits = |dtype: DType, strides: Strides| dtype == DType::F32 && strides.channel == 1;
    Native::has_register_epilogue::<S>(channels)
        && strip.tokens.len() == S::F32_LANES
        && fits(to.dtype, to.strides)
        && add.is_none_or(|r| fits(r.dtype, r.strides))
}

/// [`Epilogue::strip`] in registers, in one pass.
///
/// # Safety
/// As for [`Epilogue::run`], where [`in_registers`] says so.
#[inline(always)]
unsafe fn strip_in_registers<S: Simd>(
    block: &QueryBlock<'_>,
    strip: &LaneStrip,
    channels: usize,
    subtract: Option<&[f32]>,
    add: Option<&Input<'_>>,
    to: &Output<'_>,
) -> bool {
    let (row, lane) = (block_m::<S>(), strip.lane);
    let state = &block.state[0];
    assert!(
        state.o.len() == channels * row && state.row_sum.len() == row && lane + S::F32_LANES <= row
    );
    assert!(subtract.is_none_or(|m| m.len() == state.o.len()));
    let at = |s: Strides| offset(s, strip.batch_head, strip.tokens.start, 0);
    // SAFETY: the assertions above, and what the caller promises.
    unsafe {
        Native::register_epilogue::<S>(RegisterEpilogue {
            o: state.o.as_ptr().add(lane),
            sum: state.row_sum.as_ptr().add(lane),
            subtract: subtract.map(|m| m.as_ptr().add(lane)),
            row,
            channels,
            add: add.map(|r| (r.data.cast::<f32>().offset(at(r.strides)), r.strides.token)),
            to: (
                to.data.cast::<f32>().offset(at(to.strides)),
                to.strides.token,
            ),
        })
    }
}

/// Whether what was written is finite.
pub(super) struct FiniteFlag {
    /// The output, before R was added.
    pub out: bool,
    /// The residual; true where none was written.
    pub residual: bool,
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

/// Merges the states of both sides of the band at the end of a capture: the first becomes that over all keys, and W, the
/// output over the keys inside the band, the second's O. Where `empties` says that there may be none inside, W is 0 then,
/// not 0 / 0.
#[inline(always)]
pub(super) fn merge_states<S: Simd>(simd: S, block: &mut QueryBlock<'_>, empties: bool) {
    let row = block_m::<S>();
    let [inside, outside] = &mut block.state;
    assert!(inside.o.len() == outside.o.len() && inside.o.len().is_multiple_of(row));
    for state in [&inside, &outside] {
        assert!(state.row_sum.len() == row && state.running_max.len() == row);
    }
    let zero = simd.splat_f32s(0.0);
    for lane in (0..row).step_by(S::F32_LANES) {
        // SAFETY: the assertions above.
        unsafe {
            let max = load(simd, inside.running_max.as_ptr().add(lane));
            let other = load(simd, outside.running_max.as_ptr().add(lane));
            let higher = simd.greater_than_f32s(other, max);
            let new_max = simd.select_f32s(higher, other, max);
            let (a, b) = (rescale(simd, max, new_max), rescale(simd, other, new_max));
            let sum = load(simd, inside.row_sum.as_ptr().add(lane));
            let mut w = reciprocal(simd, inside.row_sum, lane);
            if empties {
                w = simd.select_f32s(simd.equal_f32s(sum, zero), zero, w);
            }
            let rest = load(simd, outside.row_sum.as_ptr().add(lane));
            let sum = mul_add(simd, rest, b, simd.mul_f32s(sum, a));
            store(simd, inside.row_sum.as_mut_ptr().add(lane), sum);
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
    let row = block_m::<S>();
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
