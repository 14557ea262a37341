//! DPM-Solver++ (2M, midpoint): from noise to an image in a few dozen steps. Lu et al. 2022, arXiv 2211.01095.
//!
//! The numbers are those of diffusers' `DPMSolverMultistepScheduler` with its defaults: noise prediction, linspace spacing, first
//! order in the first and the last step.

use super::{Betas, Scheduler};

/// One generation of DPM-Solver++.
pub struct DpmSolver {
    timesteps: Vec<f64>,
    /// √(1−ᾱ)/√ᾱ at every timestep, then 0 for the finished image.
    sigmas: Vec<f64>,
    /// The clean image as the previous step saw it.
    previous: Option<Vec<f64>>,
    step: usize,
}

impl DpmSolver {
    /// `steps` steps.
    pub fn new(betas: &Betas, steps: usize) -> Self {
        let timesteps = timesteps(steps);
        let sigma = |&t: &usize| {
            let kept = betas.kept(t);
            ((1.0 - kept) / kept).sqrt()
        };
        let mut sigmas: Vec<f64> = timesteps.iter().map(sigma).collect();
        sigmas.push(0.0);
        Self {
            timesteps: timesteps.into_iter().map(|t| t as f64).collect(),
            sigmas,
            previous: None,
            step: 0,
        }
    }
}

impl Scheduler for DpmSolver {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&mut self, noise: &[f32], _: Option<&[f32]>, sample: &mut [f32]) {
        let (now, next) = (self.sigmas[self.step], self.sigmas[self.step + 1]);
        let (alpha, alpha_next) = (alpha(now), alpha(next));
        let clean: Vec<f64> = sample
            .iter()
            .zip(noise)
            .map(|(&x, &e)| (f64::from(x) - now * alpha * f64::from(e)) / alpha)
            .collect();

        // λ = ln(α/σ) = −ln(sigma); e^(−h) with h = λ_next − λ_now is the ratio of the sigmas.
        let decay = next / now;
        let carry = decay * alpha_next / alpha;
        let gain = alpha_next * (1.0 - decay);
        let last = self.step + 1 == self.timesteps.len();
        // D1/2 of the paper: how the clean image changed, scaled to this step's width.
        let slope = match &self.previous {
            Some(_) if !last => 0.5 * (now / next).ln() / (self.sigmas[self.step - 1] / now).ln(),
            _ => 0.0,
        };
        for (i, x) in sample.iter_mut().enumerate() {
            let before = self.previous.as_ref().map_or(clean[i], |p| p[i]);
            let target = clean[i] + slope * (clean[i] - before);
            *x = (carry * f64::from(*x) + gain * target) as f32;
        }
        self.previous = Some(clean);
        self.step += 1;
    }
}

/// `round(linspace(0, 999, steps + 1))` from the end, without the 0; ties to even, as NumPy does.
fn timesteps(steps: usize) -> Vec<usize> {
    let width = (Betas::STEPS - 1) as f64 / steps as f64;
    (1..=steps)
        .rev()
        .map(|i| (i as f64 * width).round_ties_even() as usize)
        .collect()
}

/// √ᾱ of a sigma.
fn alpha(sigma: f64) -> f64 {
    1.0 / (1.0 + sigma * sigma).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::scheduler::tests::{follow, near};

    /// `DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)` of diffusers 0.42.1.
    fn path(steps: usize) -> Vec<[f32; 3]> {
        follow(&mut DpmSolver::new(&Betas::default(), steps))
    }

    #[test]
    fn fifty_steps_follow_diffusers() {
        let path = path(50);
        near(path[0], [0.4779554307, -1.2724226713, 1.9782794714]);
        near(path[1], [0.4618185163, -1.3001804352, 1.9721033573]);
        near(path[2], [0.4475976527, -1.3325246572, 1.9734168053]);
        near(path[25], [0.4750105143, -3.742388010, 4.0899233818]);
        near(path[48], [0.7143077850, -7.7789311409, 7.9942245483]);
        near(path[49], [0.7074816227, -7.7989993095, 7.9987487793]);
    }

    #[test]
    fn five_steps_follow_diffusers() {
        let path = path(5);
        near(path[0], [-0.0139388589, -1.7718485594, 1.4928408861]);
        near(path[1], [0.2898031771, -2.9732978344, 3.0867469311]);
        near(path[2], [0.6111158729, -4.7060089111, 5.1686511040]);
        near(path[3], [0.8963657618, -6.4893813133, 7.2270059586]);
        near(path[4], [0.9043365121, -7.1433014870, 7.8023118973]);
    }

    #[test]
    fn timesteps_are_those_of_diffusers() {
        let fifty = timesteps(50);
        assert_eq!(fifty[..4], [999, 979, 959, 939]);
        // 499.5 goes to the even neighbour.
        assert_eq!(fifty[24..27], [519, 500, 480]);
        assert_eq!(fifty[47..], [60, 40, 20]);
        assert_eq!(timesteps(5), [999, 799, 599, 400, 200]);
    }

    #[test]
    fn the_last_step_returns_the_clean_image() {
        let mut sampler = DpmSolver::new(&Betas::default(), 1);
        let mut x = [1.0f32];
        sampler.step(&[0.5], None, &mut x);
        let sigma = 157.407_27_f64;
        let expected = (1.0 - 0.5 * sigma * alpha(sigma)) / alpha(sigma);
        assert!((f64::from(x[0]) / expected - 1.0).abs() < 1e-4);
    }
}
