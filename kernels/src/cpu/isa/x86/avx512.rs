//! AVX-512: vectors of 16 floats.

use std::arch::x86_64::*;

use pulp::Simd;

use crate::cpu::isa::backend::RegisterEpilogue;
use crate::cpu::isa::exp2::COEFFICIENTS;
use crate::cpu::isa::vector::is;

/// A vector as AVX-512 names it, `None` on other instruction sets.
#[inline(always)]
pub(super) fn as_avx512<S: Simd>(x: S::f32s) -> Option<__m512> {
    // SAFETY: its vectors are 16 floats.
    is::<S, pulp::x86::V4>().then(|| unsafe { std::mem::transmute_copy(&x) })
}

/// The way back from [`as_avx512`], on the instruction set that gave it.
#[inline(always)]
pub(super) fn from_avx512<S: Simd>(x: __m512) -> S::f32s {
    assert!(size_of::<S::f32s>() == 64);
    // SAFETY: 16 floats both.
    unsafe { std::mem::transmute_copy(&x) }
}

/// 2^x by the same polynomial as elsewhere; rounding and scaling are instructions of their own, and zeroing rides along
/// with the scaling.
///
/// # Safety
/// The machine must have AVX-512 F.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn exp2(x: __m512) -> __m512 {
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    let n = _mm512_roundscale_ps::<NEAREST>(x);
    let r = _mm512_sub_ps(x, n);
    let mut p = _mm512_set1_ps(COEFFICIENTS[4]);
    for c in [
        COEFFICIENTS[3],
        COEFFICIENTS[2],
        COEFFICIENTS[1],
        COEFFICIENTS[0],
        1.0,
    ] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    // Not greater than the limit: true for NaN too, which stays NaN.
    let keeps = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(x, _mm512_set1_ps(-126.5));
    _mm512_maskz_scalef_ps(keeps, p, n)
}

/// 16 rows of 16.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose_16x16(
    from: *const f32,
    from_stride: isize,
    to: *mut f32,
    to_stride: isize,
) {
    // SAFETY: the caller says that 16 × 16 elements can be read and written.
    unsafe {
        let mut x = [_mm512_setzero_ps(); 16];
        for (i, x) in x.iter_mut().enumerate() {
            *x = _mm512_loadu_ps(from.offset(i as isize * from_stride));
        }
        for (i, y) in transpose_registers_16x16(x).into_iter().enumerate() {
            _mm512_storeu_ps(to.offset(i as isize * to_stride), y);
        }
    }
}

/// The columns of 16 rows: elements of four rows change places inside quarters of vectors, then quarters between vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_registers_16x16(x: [__m512; 16]) -> [__m512; 16] {
    // Quarter q of `parts[g][j]` is column 4 q + j of the rows 4 g to 4 g + 3.
    let parts = [
        transpose_quarters([x[0], x[1], x[2], x[3]]),
        transpose_quarters([x[4], x[5], x[6], x[7]]),
        transpose_quarters([x[8], x[9], x[10], x[11]]),
        transpose_quarters([x[12], x[13], x[14], x[15]]),
    ];
    let mut y = x;
    for j in 0..4 {
        let [a, b, c, d] = [parts[0][j], parts[1][j], parts[2][j], parts[3][j]];
        let (ab, cd) = (
            _mm512_shuffle_f32x4::<0x44>(a, b),
            _mm512_shuffle_f32x4::<0x44>(c, d),
        );
        let (ab_high, cd_high) = (
            _mm512_shuffle_f32x4::<0xee>(a, b),
            _mm512_shuffle_f32x4::<0xee>(c, d),
        );
        y[j] = _mm512_shuffle_f32x4::<0x88>(ab, cd);
        y[4 + j] = _mm512_shuffle_f32x4::<0xdd>(ab, cd);
        y[8 + j] = _mm512_shuffle_f32x4::<0x88>(ab_high, cd_high);
        y[12 + j] = _mm512_shuffle_f32x4::<0xdd>(ab_high, cd_high);
    }
    y
}

/// 16 rows of 4: a vector has 4 elements of every fourth row, so that quarters of vectors are transposed like 4 × 4.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose_16x4(
    from: *const f32,
    from_stride: isize,
    to: *mut f32,
    to_stride: isize,
) {
    // SAFETY: the caller says that 16 × 4 elements can be read and written.
    unsafe {
        let row = |i: isize| _mm_loadu_ps(from.offset(i * from_stride));
        let quarters = |i: isize| {
            let x = _mm512_castps128_ps512(row(i));
            let x = _mm512_insertf32x4::<1>(x, row(i + 4));
            let x = _mm512_insertf32x4::<2>(x, row(i + 8));
            _mm512_insertf32x4::<3>(x, row(i + 12))
        };
        let transposed = transpose_quarters([quarters(0), quarters(1), quarters(2), quarters(3)]);
        for (j, x) in transposed.into_iter().enumerate() {
            _mm512_storeu_ps(to.offset(j as isize * to_stride), x);
        }
    }
}

/// 4 rows of 16, likewise.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose_4x16(
    from: *const f32,
    from_stride: isize,
    to: *mut f32,
    to_stride: isize,
) {
    // SAFETY: the caller says that 4 × 16 elements can be read and written.
    unsafe {
        let row = |i: isize| _mm512_loadu_ps(from.offset(i * from_stride));
        let transposed = transpose_quarters([row(0), row(1), row(2), row(3)]);
        for (i, x) in transposed.into_iter().enumerate() {
            let to = |quarter: isize| to.offset((i as isize + 4 * quarter) * to_stride);
            _mm_storeu_ps(to(0), _mm512_castps512_ps128(x));
            _mm_storeu_ps(to(1), _mm512_extractf32x4_ps::<1>(x));
            _mm_storeu_ps(to(2), _mm512_extractf32x4_ps::<2>(x));
            _mm_storeu_ps(to(3), _mm512_extractf32x4_ps::<3>(x));
        }
    }
}

/// Transposes the 4 × 4 elements in each quarter of four vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_quarters([a, b, c, d]: [__m512; 4]) -> [__m512; 4] {
    let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
    let (ab_high, cd_high) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
    // Pairs of elements move as one.
    let low = |x, y| _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    let high =
        |x, y| _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    [
        low(ab, cd),
        high(ab, cd),
        low(ab_high, cd_high),
        high(ab_high, cd_high),
    ]
}

/// The epilogue of 16 queries; says whether what is written is finite before `add` is added.
///
/// # Safety
/// These elements must be readable, and those of `to` writable.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn epilogue(end: RegisterEpilogue) -> bool {
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
