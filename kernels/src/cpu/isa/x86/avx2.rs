//! AVX2 and FMA: vectors of 8 floats.

use std::arch::x86_64::*;

use crate::cpu::isa::backend::RegisterEpilogue;

/// 8 rows of 8. Halves of rows 4 apart make a vector, as they are read: then the rest is four 4 × 4.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn transpose_8x8(
    from: *const f32,
    from_stride: isize,
    to: *mut f32,
    to_stride: isize,
) {
    // SAFETY: the caller says that 8 × 8 elements can be read and written.
    unsafe {
        for half in [0, 4] {
            let row = |i: isize| _mm_loadu_ps(from.offset(i * from_stride + half));
            let rows = |i: isize| {
                let x = _mm256_castps128_ps256(row(i));
                _mm256_insertf128_ps::<1>(x, row(i + 4))
            };
            let transposed = transpose_halves([rows(0), rows(1), rows(2), rows(3)]);
            for (j, x) in transposed.into_iter().enumerate() {
                _mm256_storeu_ps(to.offset((half + j as isize) * to_stride), x);
            }
        }
    }
}

/// The columns of 8 rows: elements of four rows change places inside halves of vectors, then halves between vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_registers_8x8(x: [__m256; 8]) -> [__m256; 8] {
    let first = transpose_halves([x[0], x[1], x[2], x[3]]);
    let second = transpose_halves([x[4], x[5], x[6], x[7]]);
    let mut y = x;
    for j in 0..4 {
        y[j] = _mm256_permute2f128_ps::<0x20>(first[j], second[j]);
        y[4 + j] = _mm256_permute2f128_ps::<0x31>(first[j], second[j]);
    }
    y
}

/// Transposes the 4 × 4 elements in each half of four vectors.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_halves([a, b, c, d]: [__m256; 4]) -> [__m256; 4] {
    let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
    let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
    [
        _mm256_shuffle_ps::<0x44>(ab, cd),
        _mm256_shuffle_ps::<0xee>(ab, cd),
        _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
        _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
    ]
}

/// The epilogue of 8 queries, of a multiple of 8 channels; says whether what is written is finite before `add` is added.
///
/// # Safety
/// These elements must be readable, and those of `to` writable.
#[inline]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn epilogue(end: RegisterEpilogue) -> bool {
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
