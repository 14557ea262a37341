//! The cached tensors of one layer, per branch of guidance, and when they die.

use super::cached::Cached;
use super::directive::{Directive, Rows, Work};

/// A residual R = O − W and the rows it covers.
#[derive(Clone, Debug)]
pub struct Residual<T> {
    pub tensor: T,
    /// `Half`: R of the conditional half, which stands for both.
    pub rows: Rows,
}

/// What a layer keeps between runs. With `cfg: separate` branch 0 is the conditional run and branch 1 the other;
/// otherwise everything is in branch 0.
#[derive(Clone, Debug)]
pub struct LayerCaches<T> {
    pub residual: [Option<Residual<T>>; 2],
    /// The layer's outputs, one per sink of its region; empty if not kept.
    pub output: [Vec<T>; 2],
    /// The timesteps of the runs that left them.
    pub residual_at: [f64; 2],
    pub output_at: [f64; 2],
}

impl<T> Default for LayerCaches<T> {
    fn default() -> Self {
        LayerCaches {
            residual: [None, None],
            output: [Vec::new(), Vec::new()],
            residual_at: [f64::NAN; 2],
            output_at: [f64::NAN; 2],
        }
    }
}

impl<T: Cached> LayerCaches<T> {
    /// Drops what turned out not to be fit to serve; how many tensors that were.
    pub fn drop_unsound(&mut self) -> usize {
        let mut dropped = 0;
        for residual in &mut self.residual {
            if residual
                .take_if(|residual| !residual.tensor.is_sound())
                .is_some()
            {
                dropped += 1;
            }
        }
        for output in &mut self.output {
            if output.iter().any(|tensor| !tensor.is_sound()) {
                dropped += output.len();
                output.clear();
            }
        }
        dropped
    }

    /// The second run takes over what the first run of the same step has: its output and, if that step refreshed R,
    /// its R (or the absence of one).
    pub fn take_from_first(&mut self, residual_too: bool) {
        self.output[1] = self.output[0].clone();
        self.output_at[1] = self.output_at[0];
        if residual_too {
            self.residual[1] = self.residual[0].clone();
            self.residual_at[1] = self.residual_at[0];
        }
    }

    /// The layer has run, at timestep `now`: replaces what it replaced and drops what nobody will read.
    ///
    /// `captured` and `outputs` are what the run left; `outputs` is empty if it kept none.
    pub fn settle(
        &mut self,
        branch: usize,
        now: f64,
        directive: &Directive,
        captured: Option<Residual<T>>,
        outputs: Vec<T>,
    ) {
        if directive.work == Work::Full && !directive.preserve_residual {
            // R is of the latest full step. If that one could not be kept, an older one must not stand in for it.
            self.residual[branch] = captured;
            self.residual_at[branch] = now;
        }
        if directive.work != Work::Reuse {
            self.output[branch] = outputs;
            self.output_at[branch] = now;
        }
        if !directive.residual_live {
            self.residual[branch] = None;
        }
        if !directive.keep {
            self.output[branch] = Vec::new();
        }
        if branch == 1 && !directive.first_output_live {
            self.output[0] = Vec::new();
        }
    }
}
