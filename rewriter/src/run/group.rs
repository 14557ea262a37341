//! The runs of one step over samples that share a batch: one, or under `cfg: separate` two, of which the second takes the module's
//! output of the first in every layer that is shared across guidance.

use super::array::Array;
use super::engine::{Engine, EngineError, Frontier, Memory, Values};
use ditfastattn_plans::Action;
use std::borrow::Cow;

/// Samples that share a batch: what their runs remember of committed steps, and what they are fed at the step at hand.
pub struct Group {
    runs: Vec<Run>,
}

struct Run {
    memory: Vec<Memory>,
    inputs: Values,
}

impl Group {
    /// Nothing remembered, nothing fed.
    pub fn new(runs: usize, layers: usize) -> Self {
        let run = || Run {
            memory: vec![Memory::default(); layers],
            inputs: Values::new(),
        };
        Self {
            runs: (0..runs).map(|_| run()).collect(),
        }
    }

    /// Sets what each run is fed at the step at hand.
    pub fn feed(&mut self, inputs: Vec<Values>) {
        for (run, inputs) in self.runs.iter_mut().zip(inputs) {
            run.inputs = inputs;
        }
    }

    /// Runs the step with `row`: everything, or from `layer` on, where `base` has computed what lies in front (see [`Engine::run`]).
    /// What it has computed, run by run.
    ///
    /// # Errors
    /// What the model says.
    pub fn run(
        &self,
        engine: &mut Engine,
        layer: Option<usize>,
        row: &[Action],
        base: &[Frontier],
    ) -> Result<Vec<Frontier>, EngineError> {
        let mut done: Vec<Frontier> = Vec::new();
        for (r, run) in self.runs.iter().enumerate() {
            let own = self.own(r, row);
            let memory = handed_over(engine, row, &run.memory, done.first());
            let before = base.get(r).map_or(&[][..], Vec::as_slice);
            done.push(engine.run(layer, &run.inputs, &own, &memory, before)?);
        }
        Ok(done)
    }

    /// The first result of `layer`'s module, which computes window attention alone (`wa-rs` with R = 0) behind what `base` has computed
    /// in front of it with `row`, the rows of the runs one after the other. Without any effect.
    ///
    /// # Errors
    /// What the model says.
    pub fn window(
        &self,
        engine: &mut Engine,
        layer: usize,
        row: &[Action],
        base: &[Frontier],
    ) -> Result<Array, EngineError> {
        let mut windowed = row.to_vec();
        windowed[layer] = Action::WaRs;
        let mut outputs = Vec::new();
        for (run, base) in self.runs.iter().zip(base) {
            let mut memory = run.memory.clone();
            if let Some(residual) = engine.residual(layer, base) {
                memory[layer].residual = Some(engine.zeros_like(residual)?);
            }
            outputs.push(engine.run_layer(layer, &run.inputs, &windowed, &memory, base)?);
        }
        output(engine, layer, &outputs)
    }

    /// The step has run with `row` and computed `done`: from now on its runs remember what later steps may read.
    pub fn remember(&mut self, engine: &Engine, row: &[Action], done: &[Frontier]) {
        for (r, done) in done.iter().enumerate() {
            let own = self.own(r, row);
            engine.remember(&own, done, &mut self.runs[r].memory);
        }
        let [first, second] = self.runs.as_mut_slice() else {
            return;
        };
        for (l, action) in row.iter().enumerate() {
            if action.uses_halves() {
                second.memory[l].outputs = first.memory[l].outputs.clone();
            }
            if *action == Action::Asc {
                second.memory[l].residual = first.memory[l].residual.clone();
            }
        }
    }

    /// What the layers do in run `r`.
    fn own(&self, r: usize, row: &[Action]) -> Vec<Action> {
        let own = |&action: &Action| match (self.runs.len(), r, action) {
            (1, ..) => action,
            (_, 0, Action::Asc) => Action::Full,
            (_, 0, Action::WaRsAsc) => Action::WaRs,
            (_, _, Action::Asc | Action::WaRsAsc) => Action::Ast,
            _ => action,
        };
        row.iter().map(own).collect()
    }
}

/// What a run remembers; behind a `first` run of the same step, that run's outputs where layers are shared.
fn handed_over<'m>(
    engine: &Engine,
    row: &[Action],
    memory: &'m [Memory],
    first: Option<&Frontier>,
) -> Cow<'m, [Memory]> {
    let mut memory = Cow::Borrowed(memory);
    if let Some(first) = first {
        for (l, _) in row.iter().enumerate().filter(|(_, a)| a.uses_halves()) {
            memory.to_mut()[l].outputs = engine.outputs(l, first);
        }
    }
    memory
}

/// The first result of `layer`'s module, the rows of the runs one after the other.
///
/// # Errors
/// If it was not computed.
pub fn output(engine: &Engine, layer: usize, done: &[Frontier]) -> Result<Array, EngineError> {
    let outputs = done.iter().map(|run| engine.output(layer, run));
    Ok(Array::stack(&outputs.collect::<Result<Vec<_>, _>>()?))
}

/// The model's first output, the rows of the runs one after the other.
///
/// # Errors
/// If it is no floating-point tensor.
pub fn result(engine: &Engine, done: &[Frontier]) -> Result<Array, EngineError> {
    let results = done.iter().map(|run| engine.result(run));
    Ok(Array::stack(&results.collect::<Result<Vec<_>, _>>()?))
}
