//! The noise schedule that a model was trained with.

/// How β grows over the training steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BetaSchedule {
    /// Evenly: DiT, PixArt.
    Linear,
    /// √β evenly: the latent diffusion family.
    ScaledLinear,
}

/// The schedule of T training steps as ᾱ, the part of the signal's variance that is left after each.
#[derive(Clone, Debug)]
pub struct Betas {
    kept: Vec<f64>,
}

impl Betas {
    /// T = 1000 steps with β from `start` to `end`.
    pub fn new(schedule: BetaSchedule, start: f64, end: f64) -> Self {
        let of = |part: f64| match schedule {
            BetaSchedule::Linear => start + (end - start) * part,
            BetaSchedule::ScaledLinear => {
                let root = start.sqrt() + (end.sqrt() - start.sqrt()) * part;
                root * root
            }
        };
        let mut kept = 1.0;
        let all = (0..Self::STEPS).map(|i| {
            kept *= 1.0 - of(i as f64 / (Self::STEPS - 1) as f64);
            kept
        });
        Self {
            kept: all.collect(),
        }
    }

    /// T.
    pub const STEPS: usize = 1000;

    /// ᾱ after training step `t`.
    pub fn kept(&self, t: usize) -> f64 {
        self.kept[t]
    }
}

impl Default for Betas {
    /// DDPM's: linear from 1e-4 to 0.02.
    fn default() -> Self {
        Self::new(BetaSchedule::Linear, 1e-4, 0.02)
    }
}
