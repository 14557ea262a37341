//! Improved DDPM: ancestral sampling with a learnt variance. Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15.
//!
//! Timesteps are spaced as in the authors' `space_timesteps`, which DiT and Open-Sora use.

use super::{Betas, Scheduler, linspace};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

/// One generation of improved DDPM.
pub struct Iddpm {
    timesteps: Vec<f64>,
    /// ᾱ at every step, then 1.
    kept: Vec<f64>,
    noise: ChaCha8Rng,
    step: usize,
}

impl Iddpm {
    /// `steps` steps, whose noise follows from `seed`.
    pub fn new(betas: &Betas, steps: usize, seed: u64) -> Self {
        let spaced = linspace(0.0, (Betas::STEPS - 1) as f64, steps);
        let spaced = spaced.iter().rev();
        let timesteps: Vec<usize> = spaced.map(|t| t.round_ties_even() as usize).collect();
        let mut kept: Vec<f64> = timesteps.iter().map(|&t| betas.kept(t)).collect();
        kept.push(1.0);
        Self {
            timesteps: timesteps.iter().map(|&t| t as f64).collect(),
            kept,
            noise: ChaCha8Rng::seed_from_u64(seed),
            step: 0,
        }
    }

    /// β of step `i`, and the variance of the posterior q(x_next | x, x₀).
    fn variances(&self, i: usize) -> (f64, f64) {
        let (now, next) = (self.kept[i], self.kept[i + 1]);
        let beta = 1.0 - now / next;
        (beta, beta * (1.0 - next) / (1.0 - now))
    }
}

impl Scheduler for Iddpm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    /// Without learnt weights the variance is the posterior's.
    fn step(&mut self, noise: &[f32], variance: Option<&[f32]>, sample: &mut [f32]) {
        let i = self.step;
        let (now, next) = (self.kept[i], self.kept[i + 1]);
        let (beta, posterior) = self.variances(i);
        let last = i + 1 == self.timesteps.len();
        // The last posterior is 0, whose logarithm nobody wants: the one before stands in, as in the original.
        let smallest = match (last, i) {
            (true, 0) => beta,
            (true, _) => self.variances(i - 1).1,
            (false, _) => posterior,
        };
        let of_clean = beta * next.sqrt() / (1.0 - now);
        let of_sample = (1.0 - next) * (now / next).sqrt() / (1.0 - now);
        for (k, (x, &e)) in sample.iter_mut().zip(noise).enumerate() {
            let clean = (f64::from(*x) - (1.0 - now).sqrt() * f64::from(e)) / now.sqrt();
            let mean = of_clean * clean + of_sample * f64::from(*x);
            let weight = variance.map_or(0.0, |v| f64::from(v[k] + 1.0) / 2.0);
            let deviation = (0.5 * (weight * beta.ln() + (1.0 - weight) * smallest.ln())).exp();
            let z: f64 = match last {
                true => 0.0,
                false => StandardNormal.sample(&mut self.noise),
            };
            *x = (mean + deviation * z) as f32;
        }
        self.step += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::scheduler::tests::near;

    /// The formulas of the paper in float64 (NumPy), x = [0.5, -1.25, 2.0], noise x·t/1000 + 0.1.
    #[test]
    fn a_step_is_the_posterior_mean_and_noise_of_its_deviation() {
        for (variance, deviation) in [
            (None, 0.937_831_732_392_424_6),
            (Some([-1f32; 3]), 0.937_831_732_392_424_6),
            (Some([1f32; 3]), 0.937_970_271_592_772_1),
        ] {
            let mut scheduler = Iddpm::new(&Betas::default(), 10, 7);
            assert_eq!(scheduler.timesteps()[..4], [999.0, 888.0, 777.0, 666.0]);
            let mut x = [0.5f32, -1.25, 2.0];
            let noise = x.map(|v| v * 0.999 + 0.1);
            scheduler.step(&noise, variance.as_ref().map(|v| v.as_slice()), &mut x);
            let mut z = ChaCha8Rng::seed_from_u64(7);
            let mean = [-0.079_153_29, -0.690_256_84, 0.444_649_75];
            near(
                x,
                mean.map(|m| {
                    let z: f64 = StandardNormal.sample(&mut z);
                    m + deviation * z
                }),
            );
        }
    }

    #[test]
    fn the_last_step_adds_no_noise() {
        let mut scheduler = Iddpm::new(&Betas::default(), 10, 7);
        scheduler.step = 9;
        let mut x = [0.5f32, -1.25, 2.0];
        scheduler.step(&[0.1; 3], None, &mut x);
        near(x, [0.499_024_95, -1.251_062_55, 1.999_099_96]);
    }
}
