//! The search's view of a model: runs that begin at the layer that is tried.
//!
//! Keeps, per group of samples, what the latest accepted run of the step at hand (the base) and the latest trial have computed; what
//! layers remember of committed steps is in the `group`. Trials change neither the state nor the base.

use super::array::Array;
use super::engine::{Engine, EngineError, Frontier, Values};
use super::feed::{Feed, FeedError, samples};
use super::group::{Group, output, result};
use ditfastattn_plans::{Action, Cfg, Denoiser, Forward, Trial};

/// Why a search's run failed.
#[derive(Debug, thiserror::Error)]
pub enum TrialError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Feed(#[from] FeedError),
}

/// A model under search.
pub struct Trials<F> {
    engine: Engine,
    feed: F,
    cfg: Cfg,
    samples: Vec<Samples>,
    /// The step whose inputs and base the samples have.
    step: Option<usize>,
    base_row: Vec<Action>,
    trial_row: Vec<Action>,
}

/// Samples that share a batch; what is computed is run by run.
struct Samples {
    group: Group,
    base: Vec<Frontier>,
    trial: Vec<Frontier>,
}

impl<F: Feed> Trials<F> {
    pub fn new(engine: Engine, feed: F, cfg: Cfg) -> Self {
        let samples = || Samples {
            group: Group::new(feed.runs(), engine.layers()),
            base: Vec::new(),
            trial: Vec::new(),
        };
        Self {
            samples: (0..feed.groups()).map(|_| samples()).collect(),
            engine,
            feed,
            cfg,
            step: None,
            base_row: Vec::new(),
            trial_row: Vec::new(),
        }
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn feed(&self) -> &F {
        &self.feed
    }

    /// What the base of the step at hand has computed, group by group and in those run by run.
    pub fn bases(&self) -> impl Iterator<Item = &[Frontier]> {
        self.samples.iter().map(|s| s.base.as_slice())
    }

    /// Runs `row` at `step` and makes it the base, reusing what the base has already computed of it. Returns the share of a forward
    /// pass that this took.
    ///
    /// # Errors
    /// What the model or its inputs say.
    pub fn settle(&mut self, step: usize, row: &[Action]) -> Result<f64, TrialError> {
        let first = match self.step == Some(step) {
            true if self.base_row == row => return Ok(0.0),
            true => self.base_row.iter().zip(row).position(|(a, b)| a != b),
            false => None,
        };
        for (g, samples) in self.samples.iter_mut().enumerate() {
            if self.step != Some(step) {
                let runs = 0..self.feed.runs();
                let inputs = runs.map(|run| self.feed.inputs(step, g, run));
                samples.group.feed(inputs.collect::<Result<_, _>>()?);
            }
            let Samples { group, base, .. } = samples;
            *base = group.run(&mut self.engine, first, row, base)?;
        }
        self.step = Some(step);
        self.base_row = row.to_vec();
        Ok(self.engine.share(first))
    }

    /// The first result of `layer`'s module in the base of each group, and what it would be with window attention alone (`wa-rs` with
    /// R = 0). Without any effect.
    ///
    /// # Errors
    /// What the model says.
    pub fn full_and_window(&mut self, layer: usize) -> Result<Vec<[Array; 2]>, TrialError> {
        let mut both = Vec::new();
        for Samples { group, base, .. } in &self.samples {
            let full = output(&self.engine, layer, base)?;
            let window = group.window(&mut self.engine, layer, &self.base_row, base)?;
            both.push([full, window]);
        }
        Ok(both)
    }

    fn outputs(&self, of: impl Fn(&Samples) -> &[Frontier]) -> Result<Vec<Array>, TrialError> {
        let results = self.samples.iter().map(|s| result(&self.engine, of(s)));
        Ok(results.collect::<Result<_, _>>()?)
    }

    fn forward(
        &self,
        forwards: f64,
        of: impl Fn(&Samples) -> &[Frontier],
    ) -> Result<Forward, TrialError> {
        let outputs = self.outputs(of)?;
        let samples = outputs.iter().flat_map(|o| samples(o, self.cfg)).collect();
        Ok(Forward { samples, forwards })
    }
}

impl<F: Feed> Denoiser for Trials<F> {
    type Error = TrialError;

    fn base(&mut self, step: usize, chosen: &[Action]) -> Result<Forward, TrialError> {
        let mut row = chosen.to_vec();
        row.resize(self.engine.layers(), Action::Full);
        let forwards = self.settle(step, &row)?;
        self.forward(forwards, |s| &s.base)
    }

    fn trial(&mut self, trial: &Trial<'_>) -> Result<Forward, TrialError> {
        let (layer, row) = (trial.layer(), trial.row(self.engine.layers()));
        debug_assert_eq!(self.base_row[..layer], row[..layer]);
        for Samples { group, base, trial } in &mut self.samples {
            *trial = group.run(&mut self.engine, Some(layer), &row, base)?;
        }
        self.trial_row = row;
        self.forward(self.engine.share(Some(layer)), |s| &s.trial)
    }

    fn accept(&mut self, _: &Trial<'_>) -> Result<f64, TrialError> {
        self.base_row.clone_from(&self.trial_row);
        for samples in &mut self.samples {
            samples.base = std::mem::take(&mut samples.trial);
        }
        Ok(0.0)
    }

    fn commit(&mut self, step: usize, row: &[Action]) -> Result<f64, TrialError> {
        let forwards = self.settle(step, row)?;
        let outputs = self.outputs(|s| &s.base)?;
        for (g, samples) in self.samples.iter_mut().enumerate() {
            samples.group.remember(&self.engine, row, &samples.base);
            self.feed.advance(step, g, &outputs[g])?;
            samples.base = Vec::new();
            samples.trial = Vec::new();
        }
        self.step = None;
        Ok(forwards)
    }
}

impl<F: Feed + ?Sized> Feed for Box<F> {
    fn steps(&self) -> usize {
        (**self).steps()
    }

    fn timesteps(&self) -> Option<Vec<f64>> {
        (**self).timesteps()
    }

    fn groups(&self) -> usize {
        (**self).groups()
    }

    fn runs(&self) -> usize {
        (**self).runs()
    }

    fn inputs(&self, step: usize, group: usize, run: usize) -> Result<Values, FeedError> {
        (**self).inputs(step, group, run)
    }

    fn advance(&mut self, step: usize, group: usize, output: &Array) -> Result<(), FeedError> {
        (**self).advance(step, group, output)
    }

    fn latents(&self) -> Option<Vec<&Array>> {
        (**self).latents()
    }
}
