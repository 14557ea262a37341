//! 2^x in vectors. Owns the approximation and its error, knows nothing of attention.
//!
//! x = n + r with n the nearest integer and |r| ≤ 1/2; 2^r by a polynomial, 2^n by placing n in the exponent bits.

use super::isa::{Backend, EXP2_COEFFICIENTS as C, Native, mul_add};
use pulp::Simd;

/// 1.5·2²³ + 127: adding it rounds to an integer, and leaves that integer plus the exponent bias in the low bits.
const MAGIC: f32 = 12_583_039.0;

/// 2^x with relative error ≤ 2.5e-7 for −126.5 < x ≤ 127, and exactly 0 for x ≤ −126.5 (−∞ included).
///
/// NaN gives NaN. Above 127 the result is meaningless; a softmax never gets there unless the row is NaN anyway.
#[inline(always)]
pub(crate) fn exp2<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    if let Some(y) = Native::exp2::<S>(x) {
        return y;
    }
    // A comparison and not `max`: whether `max` drops a NaN differs between instruction sets.
    let low = simd.splat_f32s(-127.0);
    let x = simd.select_f32s(simd.less_than_f32s(x, low), low, x);
    let magic = simd.splat_f32s(MAGIC);
    let t = simd.add_f32s(x, magic);
    let r = simd.sub_f32s(x, simd.sub_f32s(t, magic));
    let mut p = simd.splat_f32s(C[4]);
    for c in [C[3], C[2], C[1], C[0], 1.0] {
        p = mul_add(simd, p, r, simd.splat_f32s(c));
    }
    let bits = simd.transmute_u32s_f32s(t);
    let scale = simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(23));
    simd.mul_f32s(p, simd.transmute_f32s_u32s(scale))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use pulp::WithSimd;

    struct Each<'a>(&'a mut [f32]);

    impl WithSimd for Each<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let (vectors, rest) = S::as_mut_simd_f32s(self.0);
            assert!(rest.is_empty());
            for x in vectors {
                *x = exp2(simd, *x);
            }
        }
    }

    #[test]
    fn error_over_the_whole_range() {
        for isa in Isa::available() {
            let n = 1 << 20;
            let x: Vec<f32> = (0..n)
                .map(|i| 127.0 - 253.5 * i as f32 / n as f32)
                .collect();
            let mut y = x.clone();
            isa.run(Each(&mut y));
            let mut worst = 0f64;
            for (&x, &y) in x.iter().zip(&y).filter(|&(&x, _)| x > -126.5) {
                let want = f64::from(x).exp2();
                // Below 2^−126 the spacing of subnormal numbers is what can be had.
                let error = (f64::from(y) - want).abs() - 2f64.powi(-149);
                worst = worst.max(error / want);
            }
            assert!(worst < 2.5e-7, "{isa:?}: {worst:.2e}");
        }
    }

    #[test]
    fn exact_and_special_values() {
        for isa in Isa::available() {
            let mut x = [
                0.0,
                1.0,
                -1.0,
                10.0,
                -126.0,
                -126.6,
                -1e30,
                f32::NEG_INFINITY,
                f32::NAN,
                127.0,
            ]
            .repeat(8);
            isa.run(Each(&mut x));
            for x in x.chunks(10) {
                assert_eq!(
                    x[..8],
                    [1.0, 2.0, 0.5, 1024.0, f32::MIN_POSITIVE, 0.0, 0.0, 0.0]
                );
                assert!(x[8].is_nan());
                assert_eq!(x[9], 2f32.powi(127));
            }
        }
    }
}
