//! Small transposes in registers: 4 × 4 (SSE or scalar), 8 × 8 (AVX2), 16 × 16 and 16 × 4 (AVX-512).

use pulp::Simd;

#[cfg(target_arch = "x86_64")]
use super::vector::is;

/// `to[j][i] = from[i][j]` for i < rows, j < columns; rows of `from` are `from_stride` apart, of `to` `to_stride`.
///
/// Walks along the rows of `from` if `READS`, else along those of `to`: whichever is far away in memory.
///
/// # Safety
/// Those elements must be readable and writable, and the two matrices must not overlap.
#[inline(always)]
pub(crate) unsafe fn transpose<S: Simd, const READS: bool>(
    from: *const f32,
    from_stride: isize,
    to: *mut f32,
    to_stride: isize,
    rows: usize,
    columns: usize,
) {
    let (outer, inner) = if READS {
        (rows, columns)
    } else {
        (columns, rows)
    };
    // SAFETY: promised by the caller.
    let done =
        unsafe { transpose_blocked::<S, READS>(from, from_stride, to, to_stride, outer, inner) };
    let inner4 = inner / 4 * 4;
    let outer4 = done + (outer - done) / 4 * 4;
    for a in (done..outer4).step_by(4) {
        for b in (0..inner4).step_by(4) {
            let (i, j) = if READS { (a, b) } else { (b, a) };
            let from = from.wrapping_offset(i as isize * from_stride + j as isize);
            let to = to.wrapping_offset(j as isize * to_stride + i as isize);
            // SAFETY: i + 3 < rows and j + 3 < columns.
            unsafe { transpose_4x4(from, from_stride, to, to_stride) }
        }
    }
    for a in 0..outer {
        let ragged = if a < outer4 { inner4 } else { 0 };
        for b in ragged..inner {
            let (i, j) = if READS { (a, b) } else { (b, a) };
            let from = from.wrapping_offset(i as isize * from_stride + j as isize);
            let to = to.wrapping_offset(j as isize * to_stride + i as isize);
            // SAFETY: i < rows and j < columns.
            unsafe { *to = *from }
        }
    }
}

/// Transposes what it can in squares with a vector to a side, or a vector by 4; says how much of `outer` that was, all but the
/// last `inner` % 4 of it.
///
/// Where lines are a multiple of 4 KB apart (16 heads of 64 channels) 16 of them alias to one set of the L1: what is not
/// taken of a cache line at once has to be fetched again. A square of 16 takes all of it.
///
/// # Safety
/// As for [`transpose`], rows and columns being `outer` and `inner` if `READS`, else the other way round.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose_blocked<S: Simd, const READS: bool>(
    from: *const f32,
    from_stride: isize,
    to: *mut f32,
    to_stride: isize,
    outer: usize,
    inner: usize,
) -> usize {
    let avx512 = is::<S, pulp::x86::V4>();
    if !avx512 && !is::<S, pulp::x86::V3>() {
        return 0;
    }
    let side = S::F32_LANES;
    let done = outer / side * side;
    let squares = inner / side * side;
    let at = |a: usize, b: usize| {
        let (i, j) = if READS { (a, b) } else { (b, a) };
        (
            from.wrapping_offset(i as isize * from_stride + j as isize),
            to.wrapping_offset(j as isize * to_stride + i as isize),
        )
    };
    for a in (0..done).step_by(side) {
        for b in (0..squares).step_by(side) {
            let (from, to) = at(a, b);
            // SAFETY: `side` by `side` elements from here on lie inside; `S` says which instructions are there.
            unsafe {
                if avx512 {
                    transpose_16x16(from, from_stride, to, to_stride);
                } else {
                    transpose_8x8(from, from_stride, to, to_stride);
                }
            }
        }
        for b in (squares..inner / 4 * 4).step_by(4) {
            // SAFETY: `side` by 4 elements from here on lie inside, of the matrix if `READS`, else of the transposed one.
            unsafe {
                let (from, to) = at(a, b);
                if !avx512 {
                    transpose_4x4(from, from_stride, to, to_stride);
                    let (from, to) = at(a + 4, b);
                    transpose_4x4(from, from_stride, to, to_stride);
                } else if READS {
                    transpose_16x4(from, from_stride, to, to_stride);
                } else {
                    transpose_4x16(from, from_stride, to, to_stride);
                }
            }
        }
    }
    done
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn transpose_blocked<S: Simd, const READS: bool>(
    _: *const f32,
    _: isize,
    _: *mut f32,
    _: isize,
    _: usize,
    _: usize,
) -> usize {
    0
}

/// Left to itself the compiler moves the 16 elements one by one.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose_4x4(from: *const f32, from_stride: isize, to: *mut f32, to_stride: isize) {
    use std::arch::x86_64::{
        _mm_loadu_ps, _mm_movehl_ps, _mm_movelh_ps, _mm_storeu_ps, _mm_unpackhi_ps, _mm_unpacklo_ps,
    };
    // SAFETY: SSE is part of x86-64; the caller says that 4 × 4 elements can be read and written.
    unsafe {
        let row = |i: isize| _mm_loadu_ps(from.offset(i * from_stride));
        let (a, b, c, d) = (row(0), row(1), row(2), row(3));
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        _mm_storeu_ps(to, _mm_movelh_ps(ab, cd));
        _mm_storeu_ps(to.offset(to_stride), _mm_movehl_ps(cd, ab));
        _mm_storeu_ps(to.offset(2 * to_stride), _mm_movelh_ps(ab_high, cd_high));
        _mm_storeu_ps(to.offset(3 * to_stride), _mm_movehl_ps(cd_high, ab_high));
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
unsafe fn transpose_4x4(from: *const f32, from_stride: isize, to: *mut f32, to_stride: isize) {
    for i in 0..4 {
        for j in 0..4 {
            // SAFETY: the caller says that 4 × 4 elements can be read and written.
            unsafe { *to.offset(j * to_stride + i) = *from.offset(i * from_stride + j) }
        }
    }
}

/// 8 rows of 8. Halves of rows 4 apart make a vector, as they are read: then the rest is four 4 × 4.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn transpose_8x8(from: *const f32, from_stride: isize, to: *mut f32, to_stride: isize) {
    use std::arch::x86_64::*;
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
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn transpose_registers_8x8(
    x: [std::arch::x86_64::__m256; 8],
) -> [std::arch::x86_64::__m256; 8] {
    use std::arch::x86_64::*;
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
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_halves(
    [a, b, c, d]: [std::arch::x86_64::__m256; 4],
) -> [std::arch::x86_64::__m256; 4] {
    use std::arch::x86_64::*;
    let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
    let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
    [
        _mm256_shuffle_ps::<0x44>(ab, cd),
        _mm256_shuffle_ps::<0xee>(ab, cd),
        _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
        _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
    ]
}

/// 16 rows of 16.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_16x16(from: *const f32, from_stride: isize, to: *mut f32, to_stride: isize) {
    use std::arch::x86_64::*;
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
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose_registers_16x16(
    x: [std::arch::x86_64::__m512; 16],
) -> [std::arch::x86_64::__m512; 16] {
    use std::arch::x86_64::*;
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
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_16x4(from: *const f32, from_stride: isize, to: *mut f32, to_stride: isize) {
    use std::arch::x86_64::*;
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
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_4x16(from: *const f32, from_stride: isize, to: *mut f32, to_stride: isize) {
    use std::arch::x86_64::*;
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
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose_quarters(
    [a, b, c, d]: [std::arch::x86_64::__m512; 4],
) -> [std::arch::x86_64::__m512; 4] {
    use std::arch::x86_64::*;
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

#[cfg(test)]
mod tests {
    use pulp::WithSimd;

    use super::super::Isa;
    use super::*;

    struct Ragged;

    impl WithSimd for Ragged {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for rows in (0..10).chain(15..18).chain([31, 37]) {
                for columns in (0..10).chain(15..18).chain([31, 37]) {
                    ragged::<S>(rows, columns);
                }
            }
        }
    }

    fn ragged<S: Simd>(rows: usize, columns: usize) {
        let (from_stride, to_stride) = (columns + 3, rows + 2);
        let from: Vec<f32> = (0..rows * from_stride).map(|i| i as f32).collect();
        for reads in [false, true] {
            let mut to = vec![-1f32; columns * to_stride];
            // SAFETY: both matrices are inside their vectors.
            unsafe {
                let (f, t) = (from.as_ptr(), to.as_mut_ptr());
                let (fs, ts) = (from_stride as isize, to_stride as isize);
                if reads {
                    transpose::<S, true>(f, fs, t, ts, rows, columns);
                } else {
                    transpose::<S, false>(f, fs, t, ts, rows, columns);
                }
            }
            for (at, &x) in to.iter().enumerate() {
                let (j, i) = (at / to_stride, at % to_stride);
                let want = if i < rows {
                    from[i * from_stride + j]
                } else {
                    -1.0
                };
                assert_eq!(x, want, "{rows} x {columns}: [{i}, {j}]");
            }
        }
    }

    #[test]
    fn transposition_of_ragged_matrices() {
        for isa in Isa::available() {
            isa.run(Ragged);
        }
    }
}
