//! Where one unfinished generation stands: what its last run showed, and what it was fed until then.

use super::digest::{Digest, digest_of};
use super::latents::LatentSample;
use super::run_signature::{InputDigest, RunSignature};
use crate::state::schedule::At;

/// Where an unfinished generation stands: its last run.
#[derive(Clone, Debug)]
pub struct PendingGeneration {
    /// Unique in the tracker.
    pub id: u64,
    /// Positions that it probably came from, and that may be another generation's all the same: no obstacle to this one.
    pub ancestors: Vec<u64>,
    pub at: At,
    /// The place of its first run, as far as it is known.
    pub first: usize,
    /// The turn at which it was seen last.
    pub seen: u64,
    /// Per branch, where it is known.
    pub conditioning: [Option<(Vec<InputDigest>, At)>; 2],
    pub latents: LatentSample,
    /// How far the last step moved the latents.
    pub moved: Option<f64>,
    /// Of everything that its runs were fed since they began; `None` if that is not known.
    pub history: Option<Digest>,
}

impl PendingGeneration {
    pub fn same_history(&self, other: Option<Digest>) -> bool {
        self.history.is_some() && self.history == other
    }

    pub fn history_after(&self, signature: &RunSignature) -> Option<Digest> {
        digest_of([self.history, signature.digest()])
    }
}

/// The generation that a run clearly continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Slot,
    /// One that is not in the slot.
    Pending(usize),
    Unknown,
}
