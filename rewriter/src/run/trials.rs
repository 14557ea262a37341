//! The search's view of a model: runs that begin at the layer that is tried.
//!
//! Keeps, per group of samples, what layers remember of committed steps, and of the step at hand what the latest accepted run (the
//! base) and the latest trial have computed. Trials change neither the state nor the base.

use super::array::Array;
use super::engine::{Engine, EngineError, Frontier, Memory, Values, to_array};
use super::feed::{Feed, FeedError, samples};
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
    groups: Vec<Group>,
    /// The step whose inputs and base the groups have.
    step: Option<usize>,
    base_row: Vec<Action>,
    trial_row: Vec<Action>,
}

struct Group {
    memory: Vec<Memory>,
    inputs: Values,
    base: Frontier,
    trial: Frontier,
}

impl<F: Feed> Trials<F> {
    pub fn new(engine: Engine, feed: F, cfg: Cfg) -> Self {
        let group = || Group {
            memory: vec![Memory::default(); engine.layers()],
            inputs: Values::new(),
            base: Frontier::new(),
            trial: Frontier::new(),
        };
        let groups = (0..feed.groups()).map(|_| group()).collect();
        Self {
            engine,
            feed,
            cfg,
            groups,
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

    /// What the base of the step at hand has computed, group by group.
    pub fn bases(&self) -> impl Iterator<Item = &Frontier> {
        self.groups.iter().map(|g| &g.base)
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
        for (g, group) in self.groups.iter_mut().enumerate() {
            if self.step != Some(step) {
                group.inputs = self.feed.inputs(step, g)?;
            }
            let Group {
                inputs,
                memory,
                base,
                ..
            } = group;
            group.base = self.engine.run(first, inputs, row, memory, base)?;
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
        for group in &self.groups {
            let Group {
                inputs,
                memory,
                base,
                ..
            } = group;
            let mut memory = memory.clone();
            if let Some(residual) = self.engine.residual(layer, base) {
                memory[layer].residual = Some(self.engine.zeros_like(residual)?);
            }
            let mut row = self.base_row.clone();
            row[layer] = Action::WaRs;
            let windowed = self.engine.run_layer(layer, inputs, &row, &memory, base)?;
            let output = |frontier| {
                let missing = || EngineError::Missing(format!("the output of layer {layer}"));
                let value = self.engine.output(layer, frontier).ok_or_else(missing)?;
                to_array("attention", value)
            };
            both.push([output(base)?, output(&windowed)?]);
        }
        Ok(both)
    }

    fn outputs(&self, of: impl Fn(&Group) -> &Frontier) -> Result<Vec<Array>, TrialError> {
        let results = self.groups.iter().map(|g| self.engine.result(of(g)));
        Ok(results.collect::<Result<_, _>>()?)
    }

    fn forward(
        &self,
        forwards: f64,
        of: impl Fn(&Group) -> &Frontier,
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
        self.forward(forwards, |g| &g.base)
    }

    fn trial(&mut self, trial: &Trial<'_>) -> Result<Forward, TrialError> {
        let (layer, row) = (trial.layer(), trial.row(self.engine.layers()));
        debug_assert_eq!(self.base_row[..layer], row[..layer]);
        for group in &mut self.groups {
            let Group {
                inputs,
                memory,
                base,
                ..
            } = group;
            group.trial = self.engine.run(Some(layer), inputs, &row, memory, base)?;
        }
        self.trial_row = row;
        self.forward(self.engine.share(Some(layer)), |g| &g.trial)
    }

    fn accept(&mut self, _: &Trial<'_>) -> Result<f64, TrialError> {
        self.base_row.clone_from(&self.trial_row);
        for group in &mut self.groups {
            group.base = std::mem::take(&mut group.trial);
        }
        Ok(0.0)
    }

    fn commit(&mut self, step: usize, row: &[Action]) -> Result<f64, TrialError> {
        let forwards = self.settle(step, row)?;
        let outputs = self.outputs(|g| &g.base)?;
        for (g, group) in self.groups.iter_mut().enumerate() {
            self.engine.remember(row, &group.base, &mut group.memory);
            self.feed.advance(step, g, &outputs[g])?;
            group.base = Frontier::new();
            group.trial = Frontier::new();
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

    fn inputs(&self, step: usize, group: usize) -> Result<Values, FeedError> {
        (**self).inputs(step, group)
    }

    fn advance(&mut self, step: usize, group: usize, output: &Array) -> Result<(), FeedError> {
        (**self).advance(step, group, output)
    }
}
