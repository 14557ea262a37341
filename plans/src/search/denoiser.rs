//! The model under search, as the search sees it.

use crate::Action;

/// The model under search, with its scheduler, its calibration inputs and its caches.
///
/// For each step t from 1 the search calls [`base`](Denoiser::base) with no choices, then for each
/// layer some [`trial`](Denoiser::trial)s, after each that is taken [`accept`](Denoiser::accept),
/// and last [`commit`](Denoiser::commit). Step 0, and steps that a journal has decided, are only
/// committed.
///
/// # Caches
///
/// There are two kinds, as in a plan (`docs/plan-format.md`): of each layer the residual R of its
/// latest `full` or `asc` and the latest output that was not `ast`, both *of committed steps*.
/// `base` and `trial` read them and never change them; only `commit` does. While searching, every
/// `full` or `asc` has to leave R behind, because nobody knows yet which steps will read it.
///
/// # Cost
///
/// What has run once need not run again. The *base* is the latest `base` or accepted trial of the
/// step. A trial at layer l equals the base in front of l, so it can resume there with the base's
/// activations; that includes the dense run's, for as long as every choice was `full`. If the base
/// is the row of the `commit` (compare: after a resume it may not be), the commit has been run.
/// An implementation that runs everything from the start at every call is right too. What a call
/// has run it returns as a fraction of a forward pass.
pub trait Denoiser {
    /// Why a run failed; handed through.
    type Error;

    /// Runs `step`, after all committed steps, with `chosen` in the first layers and `full` in
    /// the rest, and makes it the base. The step's first call has no choices: that is the dense
    /// output, the reference of every loss. A second one only follows after a resume.
    ///
    /// # Errors
    ///
    /// Whatever keeps the model from running; it ends the search.
    fn base(&mut self, step: usize, chosen: &[Action]) -> Result<Forward, Self::Error>;

    /// Runs a step with some layers chosen, one on trial and the rest `full`. The output has the
    /// shapes that `base` returned.
    ///
    /// # Errors
    ///
    /// As [`base`](Denoiser::base).
    fn trial(&mut self, trial: &Trial<'_>) -> Result<Forward, Self::Error>;

    /// The latest trial was taken: it is the base from now on. Returns what it had to run for
    /// that, usually nothing.
    ///
    /// # Errors
    ///
    /// As [`base`](Denoiser::base).
    fn accept(&mut self, trial: &Trial<'_>) -> Result<f64, Self::Error> {
        let _ = trial;
        Ok(0.0)
    }

    /// Runs `step` as `row` says, one action per layer, updates the caches, and hands the output
    /// to the scheduler, so that the next call can be about `step + 1`. Returns the fraction of a
    /// forward pass that it ran.
    ///
    /// # Errors
    ///
    /// As [`base`](Denoiser::base).
    fn commit(&mut self, step: usize, row: &[Action]) -> Result<f64, Self::Error>;
}

/// What is to be run: `step` with `prefix` in the first layers, `candidate` in the layer behind
/// them, `full` in the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial<'a> {
    /// The step, from 1.
    pub step: usize,
    /// The choices for layers 0 to `layer − 1`.
    pub prefix: &'a [Action],
    /// What is tried at `layer`.
    pub candidate: Action,
}

impl Trial<'_> {
    /// The layer on trial, from 0.
    pub fn layer(&self) -> usize {
        self.prefix.len()
    }

    /// The whole row, for a model of `layers` layers.
    pub fn row(&self, layers: usize) -> Vec<Action> {
        let mut row = self.prefix.to_vec();
        row.push(self.candidate);
        row.resize(layers, Action::Full);
        row
    }
}

/// The outcome of one run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Forward {
    /// The model's final output in front of the scheduler and of guidance: for each calibration
    /// sample all its elements (both halves of guidance, all channels), in any fixed order. The
    /// loss is averaged over samples.
    pub samples: Vec<Vec<f32>>,
    /// What was run, as a fraction of a forward pass over all samples; 1 without any reuse. Under
    /// `cfg: separate` both runs of a step are one forward pass.
    pub forwards: f64,
}
