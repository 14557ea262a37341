//! DDIM without noise (η = 0): Song et al. 2020, arXiv 2010.02502, equation 12.
//!
//! Timesteps as diffusers' `DDIMScheduler` spaces them by default ("leading", no offset, ᾱ = 1 behind the last step).

use super::{Betas, Scheduler};

/// One generation of DDIM.
pub struct Ddim {
    timesteps: Vec<f64>,
    /// ᾱ at every step, then 1.
    kept: Vec<f64>,
    step: usize,
}

impl Ddim {
    /// `steps` steps, at most as many as the training had.
    pub fn new(betas: &Betas, steps: usize) -> Self {
        let width = Betas::STEPS / steps.max(1);
        let timesteps: Vec<usize> = (0..steps).rev().map(|i| i * width).collect();
        let mut kept: Vec<f64> = timesteps.iter().map(|&t| betas.kept(t)).collect();
        kept.push(1.0);
        Self {
            timesteps: timesteps.iter().map(|&t| t as f64).collect(),
            kept,
            step: 0,
        }
    }
}

impl Scheduler for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&mut self, noise: &[f32], _: Option<&[f32]>, sample: &mut [f32]) {
        let (now, next) = (self.kept[self.step], self.kept[self.step + 1]);
        for (x, &e) in sample.iter_mut().zip(noise) {
            let e = f64::from(e);
            let clean = (f64::from(*x) - (1.0 - now).sqrt() * e) / now.sqrt();
            *x = (next.sqrt() * clean + (1.0 - next).sqrt() * e) as f32;
        }
        self.step += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::scheduler::tests::{follow, near};

    /// Equation 12 in float64 (NumPy).
    #[test]
    fn ten_steps_follow_the_formula() {
        let mut scheduler = Ddim::new(&Betas::default(), 10);
        assert_eq!(scheduler.timesteps()[..2], [900.0, 800.0]);
        assert_eq!(scheduler.timesteps()[9], 0.0);
        let path = follow(&mut scheduler);
        near(path[0], [0.431_668_06, -1.555_971_64, 2.135_359_23]);
        near(path[4], [0.553_617_62, -4.517_788_67, 4.900_537_3]);
        near(path[9], [0.702_924_36, -7.419_936_93, 7.665_376_89]);
    }
}
