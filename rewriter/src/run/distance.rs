//! How far two results are apart, sample by sample.

use ditfastattn_plans::{Metric, OutputMismatch};
use serde::Serialize;
use std::collections::BTreeMap;

/// From a dense result to another one. JSON has null for what is no finite number.
#[derive(Clone, Debug, Serialize)]
pub struct Distance {
    /// Largest absolute difference.
    pub max_abs: f64,
    /// The same as a part of the largest dense number.
    pub relative: f64,
    /// Peak signal-to-noise ratio in dB; the peak is the range of the dense numbers. Infinite for equal results.
    pub psnr: f64,
    /// Every [`Metric`] by name; none where a number is not finite.
    #[serde(flatten)]
    pub losses: BTreeMap<&'static str, Option<f64>>,
}

impl Distance {
    /// Both have a list of numbers per sample.
    ///
    /// # Errors
    /// If they differ in the number of samples or of elements.
    pub fn between(dense: &[Vec<f32>], found: &[Vec<f32>]) -> Result<Self, OutputMismatch> {
        let losses = Metric::ALL.map(|m| Ok((m.name(), m.loss(dense, found)?)));
        let losses = losses.into_iter().collect::<Result<_, OutputMismatch>>()?;
        let (a, b) = (dense.concat(), found.concat());
        let wider = |(low, high): (f32, f32), &x: &f32| (low.min(x), high.max(x));
        let (low, high) = a.iter().fold((f32::INFINITY, f32::NEG_INFINITY), wider);
        Ok(Self {
            max_abs: max_abs(&a, &b),
            relative: relative(&a, &b),
            psnr: psnr(&a, &b, f64::from(high) - f64::from(low)),
            losses,
        })
    }
}

/// Largest absolute difference of two arrays of one length; NaN if one of them has a number that is not finite.
fn max_abs(a: &[f32], b: &[f32]) -> f64 {
    let pairs = a.iter().zip(b);
    let differences = pairs.map(|(&a, &b)| match a.is_finite() && b.is_finite() {
        true => (f64::from(a) - f64::from(b)).abs(),
        false => f64::NAN,
    });
    // `f64::max` would drop a NaN.
    differences.fold(0.0, |most, d| if d > most || d.is_nan() { d } else { most })
}

/// The largest difference as a part of the largest `expected` number; 0 where both are all zero, NaN where a number is not finite.
pub fn relative(expected: &[f32], found: &[f32]) -> f64 {
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    match max_abs(expected, found) {
        0.0 => 0.0,
        most => most / f64::from(largest),
    }
}

/// Peak signal-to-noise ratio in dB; infinite for equal images. `range` is the width of the values' range.
pub fn psnr(a: &[f32], b: &[f32], range: f64) -> f64 {
    assert_eq!(a.len(), b.len(), "images of different sizes");
    let squares = a.iter().zip(b).map(|(&a, &b)| f64::from(a - b).powi(2));
    10.0 * (range * range / (squares.sum::<f64>() / a.len() as f64)).log10()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_difference_counts_and_nan_is_never_small() {
        assert_eq!(relative(&[1.0, -4.0], &[2.0, -4.0]), 0.25);
        assert_eq!(relative(&[0.0], &[0.0]), 0.0);
        assert_eq!(relative(&[0.0], &[1.0]), f64::INFINITY);
        for found in [[f32::NAN, 2.0], [2.0, f32::NAN], [1.0, f32::INFINITY]] {
            assert!(relative(&[1.0, 1.0], &found).is_nan());
        }
    }

    #[test]
    fn a_distance_has_every_metric() {
        let dense = [vec![1.0, -1.0], vec![0.0, 1.0]];
        let found = [vec![1.0, -1.0], vec![0.0, 0.5]];
        let far = Distance::between(&dense, &found).unwrap();
        assert_eq!((far.max_abs, far.relative), (0.5, 0.5));
        // Range 2, mean square 1/16.
        assert!((far.psnr - 10.0 * 64f64.log10()).abs() < 1e-12);
        assert_eq!(far.losses["mrae"], Some(0.125));
        assert_eq!(far.losses.len(), Metric::ALL.len());
        assert!(Distance::between(&dense, &found[..1]).is_err());
    }
}
