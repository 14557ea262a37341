//! x86 epilogue for float32 with contiguous channels: normalise, subtract, transpose, add and store in registers, in one pass.
//!
//! Everything else goes by way of a strip in the L1, in `epilogue`. Window + R of 1024 tokens takes 2 % less with AVX-512, 4
//! to 11 % less with AVX2.

use std::arch::x86_64::*;

use pulp::Simd;

use super::block::QueryBlock;
use super::epilogue::LaneStrip;
use super::gemm::block_m;
use super::load_store::offset;
use super::transpose::{transpose_registers_8x8, transpose_registers_16x16};
use super::vector::is;
use crate::api::{DType, Input, Output, Strides};

/// A vector of queries of all channels: `to = o / sum − subtract + add`.
struct RegisterEpilogue {
    /// `[channels, row]`.
    o: *const f32,
    /// `[row]`.
    sum: *const f32,
    /// `[channels, row]`.
    subtract: Option<*const f32>,
    row: usize,
    channels: usize,
    /// `[queries, channels]`, and the distance of its lines.
    add: Option<(*const f32, isize)>,
    /// Likewise.
    to: (*mut f32, isize),
}

/// [`Epilogue::strip`](super::epilogue::Epilogue), `None` where it cannot be done in registers.
///
/// # Safety
/// As for [`Epilogue::run`](super::epilogue::Epilogue::run).
#[inline(always)]
pub(super) unsafe fn strip<S: Simd>(
    block: &QueryBlock<'_>,
    strip: &LaneStrip,
    channels: usize,
    subtract: Option<&[f32]>,
    add: Option<&Input<'_>>,
    to: &Output<'_>,
) -> Option<bool> {
    let avx512 = is::<S, pulp::x86::V4>();
    // Head dims that are not a multiple of 8 are rare: not worth a second path with masks.
    let avx2 = is::<S, pulp::x86::V3>() && channels.is_multiple_of(8);
    let fits = |dtype: DType, strides: Strides| dtype == DType::F32 && strides.channel == 1;
    if !(avx512 || avx2)
        || strip.tokens.len() != S::F32_LANES
        || !fits(to.dtype, to.strides)
        || !add.is_none_or(|r| fits(r.dtype, r.strides))
    {
        return None;
    }
    let (row, lane) = (block_m::<S>(), strip.lane);
    let state = &block.state[0];
    assert!(
        state.o.len() == channels * row && state.row_sum.len() == row && lane + S::F32_LANES <= row
    );
    assert!(subtract.is_none_or(|m| m.len() == state.o.len()));
    let at = |s: Strides| offset(s, strip.batch_head, strip.tokens.start, 0);
    // SAFETY: the assertions above, and what the caller promises; `S` says which instructions are there.
    unsafe {
        let end = RegisterEpilogue {
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
        };
        Some(if avx512 {
            epilogue_avx512(end)
        } else {
            epilogue_avx2(end)
        })
    }
}

/// 16 queries; says whether what is written is finite before `add` is added.
///
/// # Safety
/// These elements must be readable, and those of `to` writable.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn epilogue_avx512(end: RegisterEpilogue) -> bool {
    let RegisterEpilogue {
        o,
        sum,
        subtract,
        row,
        channels,
        add,
        to: (to, to_stride),
    } = end;
    let zero = _mm512_setzero_ps();
    let mut check = zero;
    // Stores wait for their cache lines one after the other; prefetching all of them takes 1 to 3 % off window + R where
    // the tensors do not fit the L2.
    for i in 0..16 {
        for first in (0..channels).step_by(16).chain([channels - 1]) {
            let at = to.wrapping_offset(i * to_stride + first as isize);
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
        }
    }
    // SAFETY: promised by the caller.
    unsafe {
        let factor = _mm512_div_ps(_mm512_set1_ps(1.0), _mm512_loadu_ps(sum));
        for first in (0..channels).step_by(16) {
            let n = 16.min(channels - first);
            let there = (!0u16) >> (16 - n);
            let mut x = [zero; 16];
            for (i, x) in x.iter_mut().enumerate().take(n) {
                let at = (first + i) * row;
                *x = _mm512_mul_ps(_mm512_loadu_ps(o.add(at)), factor);
                if let Some(subtract) = subtract {
                    *x = _mm512_sub_ps(*x, _mm512_loadu_ps(subtract.add(at)));
                }
                check = _mm512_fmadd_ps(*x, zero, check);
            }
            for (i, mut y) in transpose_registers_16x16(x).into_iter().enumerate() {
                let at = |stride: isize| i as isize * stride + first as isize;
                if let Some((add, stride)) = add {
                    y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(there, add.offset(at(stride))));
                }
                _mm512_mask_storeu_ps(to.offset(at(to_stride)), there, y);
            }
        }
    }
    _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(check, zero) == !0
}

/// 8 queries, likewise, of a multiple of 8 channels.
///
/// # Safety
/// As for [`epilogue_avx512`].
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn epilogue_avx2(end: RegisterEpilogue) -> bool {
    let zero = _mm256_setzero_ps();
    let mut check = zero;
    // SAFETY: promised by the caller.
    unsafe {
        let factor = _mm256_div_ps(_mm256_set1_ps(1.0), _mm256_loadu_ps(end.sum));
        for first in (0..end.channels).step_by(8) {
            let mut x = [zero; 8];
            for (i, x) in x.iter_mut().enumerate() {
                let at = (first + i) * end.row;
                *x = _mm256_mul_ps(_mm256_loadu_ps(end.o.add(at)), factor);
                if let Some(subtract) = end.subtract {
                    *x = _mm256_sub_ps(*x, _mm256_loadu_ps(subtract.add(at)));
                }
                check = _mm256_fmadd_ps(*x, zero, check);
            }
            for (i, mut y) in transpose_registers_8x8(x).into_iter().enumerate() {
                let at = |stride: isize| i as isize * stride + first as isize;
                if let Some((add, stride)) = end.add {
                    y = _mm256_add_ps(y, _mm256_loadu_ps(add.offset(at(stride))));
                }
                _mm256_storeu_ps(end.to.0.offset(at(end.to.1)), y);
            }
        }
    }
    _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_EQ_OQ>(check, zero)) == 0xff
}
