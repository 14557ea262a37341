//! How far two images are apart: PSNR and SSIM.
//!
//! Both by scikit-image's default definitions (SSIM: 7×7 uniform window, sample covariance,
//! borders left out). Plain numbers in, plain numbers out.

pub use ditfastattn_rewriter::run::distance::psnr;

/// Structural similarity of two images of `width` columns, at least 7×7 each, rows contiguous.
pub fn ssim(a: &[f32], b: &[f32], width: usize, range: f64) -> f64 {
    const WINDOW: usize = 7;
    assert_eq!(a.len(), b.len(), "images of different sizes");
    let height = a.len() / width;
    assert!(
        height >= WINDOW && width >= WINDOW,
        "SSIM needs at least 7x7 pixels, got {width}x{height}"
    );
    let (c1, c2) = ((0.01 * range).powi(2), (0.03 * range).powi(2));
    let count = (WINDOW * WINDOW) as f64;
    let mut sum = 0.0;
    for top in 0..=height - WINDOW {
        for left in 0..=width - WINDOW {
            let (mut sa, mut sb, mut saa, mut sbb, mut sab) = (0.0, 0.0, 0.0, 0.0, 0.0);
            for y in top..top + WINDOW {
                for x in left..left + WINDOW {
                    let (p, q) = (f64::from(a[y * width + x]), f64::from(b[y * width + x]));
                    sa += p;
                    sb += q;
                    saa += p * p;
                    sbb += q * q;
                    sab += p * q;
                }
            }
            let (ma, mb) = (sa / count, sb / count);
            let va = (saa - sa * ma) / (count - 1.0);
            let vb = (sbb - sb * mb) / (count - 1.0);
            let vab = (sab - sa * mb) / (count - 1.0);
            sum += (2.0 * ma * mb + c1) * (2.0 * vab + c2)
                / ((ma * ma + mb * mb + c1) * (va + vb + c2));
        }
    }
    sum / ((height - WINDOW + 1) * (width - WINDOW + 1)) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(shift: f64, stretch: f64) -> Vec<f32> {
        (0..32 * 32)
            .map(|i| {
                let (x, y) = (f64::from(i % 32), f64::from(i / 32));
                ((x * 0.3 + shift).sin() * (y * stretch).cos()) as f32
            })
            .collect()
    }

    #[test]
    fn agrees_with_the_definitions_in_scipy() {
        // the same formulas over scipy.ndimage.uniform_filter(size=7), data range 2.0
        let (a, b) = (wave(0.0, 0.2), wave(0.2, 0.25));
        assert!((ssim(&a, &b, 32, 2.0) - 0.253_102_025).abs() < 1e-5);
        assert!((psnr(&a, &b, 2.0) - 14.276_261_316).abs() < 1e-5);
    }

    #[test]
    fn equal_images_are_perfect() {
        let a = wave(0.1, 0.2);
        assert!((ssim(&a, &a, 32, 2.0) - 1.0).abs() < 1e-12);
        assert_eq!(psnr(&a, &a, 2.0), f64::INFINITY);
    }
}
