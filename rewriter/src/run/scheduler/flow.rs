//! Euler's method on a rectified flow: Liu et al. 2022, arXiv 2209.03003; the shift is that of SD3 (arXiv 2403.03206, §5.3.2).
//!
//! σ goes evenly from 1 to 1/steps and is then shifted, as the pipelines of SD3 and Flux ask of
//! `FlowMatchEulerDiscreteScheduler`; behind the last step it is 0.

use super::{Scheduler, linspace};

/// One generation of Euler steps.
pub struct EulerFlow {
    timesteps: Vec<f64>,
    sigmas: Vec<f64>,
    step: usize,
}

impl EulerFlow {
    /// `steps` steps; `shift` 1 leaves σ as it is. The model is fed σ · `scale`: 1000 (SD3), or 1 (exports of Flux).
    pub fn new(steps: usize, shift: f64, scale: f64) -> Self {
        let shifted = |s: f64| shift * s / (1.0 + (shift - 1.0) * s);
        let even = linspace(1.0, 1.0 / steps.max(1) as f64, steps);
        let mut sigmas: Vec<f64> = even.into_iter().map(shifted).collect();
        let timesteps = sigmas.iter().map(|s| s * scale).collect();
        sigmas.push(0.0);
        Self {
            timesteps,
            sigmas,
            step: 0,
        }
    }
}

impl Scheduler for EulerFlow {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&mut self, velocity: &[f32], _: Option<&[f32]>, sample: &mut [f32]) {
        let width = self.sigmas[self.step + 1] - self.sigmas[self.step];
        for (x, &v) in sample.iter_mut().zip(velocity) {
            *x = (f64::from(*x) + width * f64::from(v)) as f32;
        }
        self.step += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::scheduler::tests::{follow, near};

    /// x ← x + (σ' − σ)·v in float64 (NumPy).
    #[test]
    fn four_shifted_steps_follow_the_formula() {
        let mut scheduler = EulerFlow::new(4, 3.0, 1000.0);
        near_all(scheduler.timesteps(), &[1000.0, 900.0, 750.0, 500.0]);
        let path = follow(&mut scheduler);
        near(path[0], [0.44, -1.135, 1.79]);
        near(path[3], [0.154_037_5, -0.676_159_77, 0.865_635_16]);
        near_all(EulerFlow::new(2, 1.0, 1.0).timesteps(), &[1.0, 0.5]);
    }

    fn near_all(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        assert!(
            found
                .iter()
                .zip(expected)
                .all(|(f, e)| (f - e).abs() < 1e-9)
        );
    }
}
