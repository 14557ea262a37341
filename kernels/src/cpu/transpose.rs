//! Transposes of small matrices, in blocks that fit the registers: 4 × 4 (SSE or scalar), 8 × 8 (AVX2), 16 × 16 and 16 × 4
//! (AVX-512).

use super::isa::{Backend, Native};
use pulp::Simd;

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
    let done = unsafe {
        Native::transpose_blocked::<S, READS>(from, from_stride, to, to_stride, outer, inner)
    };
    let inner4 = inner / 4 * 4;
    let outer4 = done + (outer - done) / 4 * 4;
    for a in (done..outer4).step_by(4) {
        for b in (0..inner4).step_by(4) {
            let (i, j) = if READS { (a, b) } else { (b, a) };
            let from = from.wrapping_offset(i as isize * from_stride + j as isize);
            let to = to.wrapping_offset(j as isize * to_stride + i as isize);
            // SAFETY: i + 3 < rows and j + 3 < columns.
            unsafe { Native::transpose_4x4(from, from_stride, to, to_stride) }
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

#[cfg(test)]
mod tests {
    use pulp::WithSimd;

    use super::*;
    use crate::cpu::Isa;

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
