//! Latents: how far apart the latents of two runs are.

use std::sync::Arc;

use super::digest::{Digest, digest};
use super::feed::Feed;
use crate::state::error::{StateError, list};

/// Latents whose relative distance to the last ones is at least this do not continue them. Independent noise is at
/// √2 ≈ 1.41; one step of a 10-step schedule moves about 0.13, a whole generation about 1.
pub(super) const CONTINUES: f64 = 0.9;

/// Elements of the latents that are compared.
const SAMPLES: usize = 4096;

/// The latents of one run: enough of them to tell how far apart two runs are, and a digest of them all.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentSample {
    /// Shared: they are remembered in several places.
    samples: Arc<Vec<f32>>,
    digest: Option<Digest>,
}

impl LatentSample {
    pub(super) fn new(feed: &Feed<'_>) -> Result<Self, StateError> {
        let len = feed.values.len();
        // A stride prime to the usual powers of two, so that samples do not line up in one channel or column.
        let stride = (len.div_ceil(SAMPLES)).max(1) | 1;
        let mut samples = list("samples of the latents", len.div_ceil(stride))?;
        samples.extend((0..len).step_by(stride).map(|i| feed.values.get(i) as f32));
        Ok(LatentSample {
            samples: Arc::new(samples),
            digest: digest(feed),
        })
    }

    pub(super) fn digest(&self) -> Option<Digest> {
        self.digest
    }

    pub(super) fn identical(&self, other: &LatentSample) -> bool {
        self.digest.is_some() && self.digest == other.digest
    }

    /// ‖a − b‖ / max(‖a‖, ‖b‖), infinite if they cannot be compared.
    pub(super) fn distance(&self, other: &LatentSample) -> f64 {
        if self.identical(other) {
            return 0.0;
        }
        if self.samples.is_empty() || self.samples.len() != other.samples.len() {
            return f64::INFINITY;
        }
        let (mut apart, mut a2, mut b2) = (0.0, 0.0, 0.0);
        for (&a, &b) in self.samples.iter().zip(&*other.samples) {
            let (a, b) = (f64::from(a), f64::from(b));
            apart += (a - b) * (a - b);
            a2 += a * a;
            b2 += b * b;
        }
        let distance = (apart / f64::max(a2, b2)).sqrt();
        if distance.is_nan() {
            f64::INFINITY
        } else {
            distance
        }
    }
}
