//! What one run shows of the generation it belongs to.

use super::digest::{Digest, digest, digest_of};
use super::feed::Feed;
use super::latents::LatentSample;
use crate::state::error::StateError;

/// What one run shows of the generation it belongs to: everything that it is fed.
#[derive(Clone, Debug, PartialEq)]
pub struct RunSignature {
    /// Of every input but the timestep, the latents and the request inputs, those with a default included.
    pub conditioning: Vec<InputDigest>,
    pub latents: LatentSample,
    /// All bytes of the timestep tensor: values within the schedule's tolerance are one place but not one run.
    pub timestep: Option<Digest>,
}

impl RunSignature {
    /// `rows` is the batch: an input of no more numbers may be a schedule that moves with the steps.
    ///
    /// # Errors
    /// If there is no memory for the samples.
    pub fn new(
        latents: Feed<'_>,
        conditioning: &[Feed<'_>],
        rows: usize,
    ) -> Result<Self, StateError> {
        Ok(RunSignature {
            conditioning: conditioning
                .iter()
                .map(|feed| InputDigest::new(feed, rows))
                .collect(),
            latents: LatentSample::new(&latents)?,
            timestep: None,
        })
    }

    /// The same run, which was also fed this timestep tensor.
    pub fn with_timestep(mut self, timestep: &Feed<'_>) -> Self {
        self.timestep = digest(timestep);
        self
    }

    /// Of everything that is fed; `None` if something cannot be read.
    pub(super) fn digest(&self) -> Option<Digest> {
        let conditioning = self.conditioning.iter().map(|input| input.digest);
        let timestep = self.timestep.or(Some(0));
        digest_of(
            [self.latents.digest(), timestep]
                .into_iter()
                .chain(conditioning),
        )
    }
}

/// Identifies the contents of one conditioning input.
#[derive(Clone, Debug, PartialEq)]
pub struct InputDigest {
    /// `None` if the contents cannot be read: then it equals nothing, itself included.
    pub(super) digest: Option<Digest>,
    /// Its numbers, if there are no more than rows of the batch.
    pub(super) scalars: Option<Vec<f64>>,
}

impl InputDigest {
    fn new(feed: &Feed<'_>, rows: usize) -> Self {
        let count = feed.values.len();
        let scalars = (1..=rows.max(1))
            .contains(&count)
            .then(|| (0..count).map(|i| feed.values.get(i)).collect());
        InputDigest {
            digest: digest(feed),
            scalars,
        }
    }

    pub(super) fn same(&self, other: &InputDigest) -> bool {
        self.digest.is_some() && self.digest == other.digest
    }

    /// Which way every element moved from `self` to `next`; `None` if they did not all move one way.
    pub(super) fn direction(&self, next: &InputDigest) -> Option<std::cmp::Ordering> {
        let (from, to) = (self.scalars.as_ref()?, next.scalars.as_ref()?);
        let mut moves = from.iter().zip(to).map(|(a, b)| b.partial_cmp(a));
        let first = moves.next()??;
        (first.is_ne() && from.len() == to.len() && moves.all(|m| m == Some(first)))
            .then_some(first)
    }
}
