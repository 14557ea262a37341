//! Diffusion schedulers: which timesteps a model is fed, and how its prediction moves the latents on.
//!
//! Small and deterministic: what a search needs to run a calibration, not a library of samplers. Schedulers know nothing of models
//! or guidance; they are handed one prediction per step, in the order of the steps.

mod betas;
mod ddim;
mod dpm;
mod flow;
mod iddpm;

pub use betas::{BetaSchedule, Betas};
pub use ddim::Ddim;
pub use dpm::DpmSolver;
pub use flow::EulerFlow;
pub use iddpm::Iddpm;

/// A scheduler in the course of one generation.
pub trait Scheduler {
    /// What the model is fed, one per step, first to last.
    fn timesteps(&self) -> &[f64];

    /// Moves `sample` on by the next step, given the model's `prediction` for it (same length) and, where the model has learnt them,
    /// the interpolation weights of the variance in [-1, 1].
    fn step(&mut self, prediction: &[f32], variance: Option<&[f32]>, sample: &mut [f32]);
}

/// `n` numbers from `from` to `to`, both included.
fn linspace(from: f64, to: f64, n: usize) -> Vec<f64> {
    let width = (to - from) / (n.max(2) - 1) as f64;
    (0..n).map(|i| from + width * i as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `x` after each step of a model that predicts x·t/1000 + 0.1.
    pub fn follow(scheduler: &mut dyn Scheduler) -> Vec<[f32; 3]> {
        let mut x = [0.5f32, -1.25, 2.0];
        let mut path = Vec::new();
        for t in scheduler.timesteps().to_vec() {
            let prediction = x.map(|v| v * (t as f32 / 1000.0) + 0.1);
            scheduler.step(&prediction, None, &mut x);
            path.push(x);
        }
        path
    }

    #[track_caller]
    pub fn near(found: [f32; 3], expected: [f64; 3]) {
        for (&f, e) in found.iter().zip(expected) {
            assert!(
                (f64::from(f) - e).abs() <= 2e-4 * e.abs().max(1.0),
                "{found:?}, expected {expected:?}"
            );
        }
    }
}
