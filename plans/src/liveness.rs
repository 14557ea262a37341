//! Which cached tensors the rest of a plan will still read.
//!
//! A layer has two: the residual R (before the output projection) and the module's output. Both
//! are kept from their last writer to their last reader, never longer. This module derives those
//! intervals and their bytes; it holds no tensors.

use crate::cost::one_per_layer;
use crate::{Action, Cfg, LayerCount, Plan};

/// The lifetimes of every cache under one plan; from [`Plan::liveness`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Liveness {
    steps: usize,
    layers: usize,
    cfg: Cfg,
    cells: Vec<Cell>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cell {
    residual: bool,
    output: bool,
    halves: bool,
}

/// The shape of the tensors that a layer caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Batch rows of a whole step: both halves of guidance, both runs of `separate`.
    pub rows: usize,
    /// Tokens of a sequence, text included.
    pub tokens: usize,
    /// Channels: heads × head dim of R, and the width of the module's output.
    pub width: usize,
    /// Bytes of one element of the model's dtype.
    pub element_bytes: usize,
}

impl CacheShape {
    /// Bytes of one cached tensor of one layer, both halves stored; saturates.
    pub fn tensor_bytes(&self) -> u64 {
        [self.tokens, self.width, self.element_bytes]
            .into_iter()
            .fold(self.rows as u64, |bytes, n| bytes.saturating_mul(n as u64))
    }
}

/// The moment at which a plan's caches are largest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeakBytes {
    /// Bytes of all cached tensors at that moment.
    pub bytes: u64,
    /// The first step at which they are that many.
    pub step: usize,
    /// The layer that is running then.
    pub layer: usize,
    /// How many of the bytes are residuals; the rest are outputs.
    pub residual_bytes: u64,
}

impl Plan {
    /// What each layer has to keep after each step so that the rest of the plan can run.
    pub fn liveness(&self) -> Liveness {
        let (steps, layers) = (self.step_count(), self.layers());
        let mut cells = vec![Cell::default(); steps * layers];
        for step in (0..steps).rev() {
            for layer in 0..layers {
                let next = if step + 1 < steps {
                    Some(self.action(step + 1, layer))
                } else {
                    None
                };
                let later = cells
                    .get((step + 1) * layers + layer)
                    .copied()
                    .unwrap_or_default();
                cells[step * layers + layer] = Cell {
                    residual: match next {
                        Some(Action::WaRs | Action::WaRsAsc) => true,
                        Some(Action::Ast) => later.residual,
                        Some(Action::Full | Action::Asc) | None => false,
                    },
                    output: next == Some(Action::Ast),
                    halves: self.action(step, layer).uses_halves(),
                };
            }
        }
        Liveness {
            steps,
            layers,
            cfg: self.cfg,
            cells,
        }
    }
}

impl Liveness {
    fn cell(&self, step: usize, layer: usize) -> Cell {
        if step >= self.steps || layer >= self.layers {
            return Cell::default();
        }
        self.cells[step * self.layers + layer]
    }

    /// R of `layer` must exist after `step` has run: some later step reads it (`wa-rs`,
    /// `wa-rs+asc`) before the next one that refreshes it (`full`, `asc`). False outside the plan.
    pub fn residual_live_after(&self, step: usize, layer: usize) -> bool {
        self.cell(step, layer).residual
    }

    /// The module's output must exist after `step` has run: the layer's next step is `ast`.
    /// False outside the plan.
    pub fn output_live_after(&self, step: usize, layer: usize) -> bool {
        self.cell(step, layer).output
    }

    /// Under `cfg: separate` the first run of this step must hand the module's output to the
    /// second one (`asc`, `wa-rs+asc`). False for every other `cfg` and outside the plan.
    pub fn output_shared_within(&self, step: usize, layer: usize) -> bool {
        self.cfg == Cfg::Separate && self.cell(step, layer).halves
    }

    /// The largest number of bytes that the caches of one generation take at any time.
    ///
    /// While a layer runs it holds both what it reads and what it leaves behind; layers above it
    /// are already in the state after this step, layers below it in the state before. Under
    /// `cfg: separate` the two runs of a step keep their own halves, and what the first shares
    /// with the second is held from one to the other.
    pub fn peak_bytes(&self, shape: &CacheShape) -> PeakBytes {
        self.peak(|_| shape.tensor_bytes())
    }

    /// [`Liveness::peak_bytes`] of a model whose layers differ in size.
    ///
    /// # Errors
    ///
    /// When `shapes` are not as many as the plan has layers.
    pub fn peak_bytes_by_layer(&self, shapes: &[CacheShape]) -> Result<PeakBytes, LayerCount> {
        one_per_layer(self.layers, shapes)?;
        Ok(self.peak(|layer| shapes[layer].tensor_bytes()))
    }

    fn peak(&self, tensor_bytes: impl Fn(usize) -> u64) -> PeakBytes {
        let runs: u64 = if self.cfg == Cfg::Separate { 2 } else { 1 };
        let mut peak = PeakBytes::default();
        let bytes_if = |live: bool, tensor: u64| if live { u128::from(tensor) } else { 0 };
        let (mut residuals, mut outputs) = (0u128, 0u128);
        for step in 0..self.steps {
            for run in 0..runs {
                for layer in 0..self.layers {
                    let tensor = tensor_bytes(layer) / runs;
                    let before = self.kept_before(step, layer);
                    let after = self.cell(step, layer);
                    // An output that is cached anyway is not held a second time to be shared.
                    let handed_over = self.output_shared_within(step, layer) && !after.output;
                    residuals += bytes_if(after.residual && !before.residual, tensor);
                    outputs += bytes_if(after.output && !before.output, tensor);
                    outputs += bytes_if(handed_over && run == 0, tensor);
                    let saturated = |bytes: u128| u64::try_from(bytes).unwrap_or(u64::MAX);
                    let bytes = saturated(residuals + outputs);
                    if bytes > peak.bytes {
                        peak = PeakBytes {
                            bytes,
                            step,
                            layer,
                            residual_bytes: saturated(residuals),
                        };
                    }
                    residuals -= bytes_if(before.residual && !after.residual, tensor);
                    outputs -= bytes_if(before.output && !after.output, tensor);
                    outputs -= bytes_if(handed_over && run == 1, tensor);
                }
            }
        }
        peak
    }

    fn kept_before(&self, step: usize, layer: usize) -> Cell {
        step.checked_sub(1)
            .map_or(Cell::default(), |step| self.cell(step, layer))
    }
}
