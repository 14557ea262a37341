//! How far an output is from the dense one: the losses that Algorithm 1 can be run with.
//!
//! Everything is accumulated in float64 in the order of the elements, so equal outputs give equal
//! losses to the last bit.

use std::fmt;
use std::str::FromStr;

/// The distance between a dense output `a` and a trial's output `b`.
///
/// A loss is computed per sample over all its elements and averaged over the samples. It is 0 for
/// equal outputs. An output with an infinity or NaN in it has no loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Metric {
    /// Mean relative absolute error (the paper's appendix A.2): the mean of
    /// `|a − b| / max(|a|, |b|)`, in which 0/0 is 0. From 0 to 2.
    #[default]
    Mrae,
    /// What the authors' code computes instead: the mean of `|(a − b) / (max(a, b) + 1e-6)|`,
    /// each term at most 10, with the *signed* maximum. The paper's thresholds D1 to D6 (δ from
    /// 0.025 to 0.15) were searched with it; it is about 1.35 to 1.8 times the paper's formula.
    Authors,
    /// `1 − cos(a, b)`; two outputs that are all zero are equal. From 0 to 2.
    Cosine,
    /// Relative mean squared error, `Σ(a − b)² / Σa²`, in which 0/0 is 0.
    Mse,
}

impl Metric {
    /// Every metric, the default first.
    pub const ALL: [Metric; 4] = [Metric::Mrae, Metric::Authors, Metric::Cosine, Metric::Mse];

    /// The name in journals: `mrae`, `authors`, `cosine` or `mse`.
    pub const fn name(self) -> &'static str {
        match self {
            Metric::Mrae => "mrae",
            Metric::Authors => "authors",
            Metric::Cosine => "cosine",
            Metric::Mse => "mse",
        }
    }

    /// The loss of `found` against `reference`, averaged over the samples; `None` where it is no
    /// finite number, which no threshold can accept.
    ///
    /// # Errors
    ///
    /// When the two differ in the number of samples or in a sample's number of elements.
    pub fn loss<A: AsRef<[f32]>, B: AsRef<[f32]>>(
        self,
        reference: &[A],
        found: &[B],
    ) -> Result<Option<f64>, OutputMismatch> {
        if reference.len() != found.len() {
            return Err(OutputMismatch {
                what: "samples".to_owned(),
                expected: reference.len(),
                found: found.len(),
            });
        }
        let mut sum = 0.0;
        for (sample, (a, b)) in reference.iter().zip(found).enumerate() {
            let (a, b) = (a.as_ref(), b.as_ref());
            if a.len() != b.len() {
                return Err(OutputMismatch {
                    what: format!("elements in sample {sample}"),
                    expected: a.len(),
                    found: b.len(),
                });
            }
            sum += self.of_sample(a, b);
        }
        let loss = if reference.is_empty() {
            0.0
        } else {
            sum / reference.len() as f64
        };
        Ok(loss.is_finite().then_some(loss))
    }

    fn of_sample(self, a: &[f32], b: &[f32]) -> f64 {
        let pairs = || a.iter().zip(b).map(|(a, b)| (f64::from(*a), f64::from(*b)));
        if pairs().any(|(a, b)| !a.is_finite() || !b.is_finite()) {
            return f64::NAN;
        }
        let mean = |term: fn(f64, f64) -> f64| {
            pairs().map(|(a, b)| term(a, b)).sum::<f64>() / a.len().max(1) as f64
        };
        match self {
            Metric::Mrae => mean(|a, b| ratio((a - b).abs(), a.abs().max(b.abs()))),
            // A zero denominator is infinite and clipped, or NaN and so no loss, as in the original.
            Metric::Authors => mean(|a, b| clipped(((a - b) / (a.max(b) + 1e-6)).abs())),
            Metric::Cosine => {
                let (mut ab, mut aa, mut bb) = (0.0, 0.0, 0.0);
                for (a, b) in pairs() {
                    ab += a * b;
                    aa += a * a;
                    bb += b * b;
                }
                match (aa == 0.0, bb == 0.0) {
                    (true, true) => 0.0,
                    (true, false) | (false, true) => 1.0,
                    // sqrt(x·x) is exact, so equal outputs have a loss of exactly 0.
                    (false, false) => (1.0 - ab / (aa * bb).sqrt()).max(0.0),
                }
            }
            Metric::Mse => {
                let squares = pairs().map(|(a, b)| (a - b) * (a - b)).sum();
                ratio(squares, pairs().map(|(a, _)| a * a).sum())
            }
        }
    }
}

fn ratio(part: f64, whole: f64) -> f64 {
    if part == 0.0 { 0.0 } else { part / whole }
}

/// At most 10; NaN stays NaN, unlike with `min`.
fn clipped(term: f64) -> f64 {
    if term > 10.0 { 10.0 } else { term }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no [`Metric`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown metric `{0}`, expected one of mrae, authors, cosine, mse")]
pub struct UnknownMetric(pub String);

impl FromStr for Metric {
    type Err = UnknownMetric;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Metric::ALL.into_iter().find(|metric| metric.name() == name);
        known.ok_or_else(|| UnknownMetric(name.to_owned()))
    }
}

/// Two outputs that cannot be compared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the dense output has {expected} {what}, the trial's {found}; every run of a step must return the same shapes"
)]
pub struct OutputMismatch {
    /// What was counted.
    pub what: String,
    /// As many has the dense output.
    pub expected: usize,
    /// As many has the trial's.
    pub found: usize,
}
