//! What a plan's MACs mean in seconds, given how fast a machine does them.
//!
//! A prediction for planning and for reports: nothing here measures.

use crate::cost::one_per_layer;
use crate::{Action, LayerCount, LayerWork, Plan, band_density};

/// How fast a machine runs a model; measured, or assumed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Throughput {
    /// MACs per second of QKᵀ and PV over all keys.
    pub full: f64,
    /// MACs per second of QKᵀ and PV inside the band. Blocks at its edges are computed whole, so
    /// that this is less than `full`, the more so the narrower the band is.
    pub band: f64,
    /// MACs per second of the projections.
    pub projection: f64,
    /// Seconds that `ast` takes in one layer at one step.
    pub reuse_seconds: f64,
    /// Seconds of a step outside of the attention modules.
    pub other_seconds: f64,
}

/// Predicted seconds of one generation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// In the attention modules, without a plan.
    pub dense_attention: f64,
    /// In the attention modules, under the plan.
    pub attention: f64,
    /// Outside of them.
    pub other: f64,
}

impl Times {
    /// Share of the attention modules in a generation without a plan.
    pub fn attention_share(&self) -> f64 {
        fraction(self.dense_attention, self.dense_attention + self.other)
    }

    /// Time of a generation under the plan as a fraction of that without.
    pub fn share(&self) -> f64 {
        fraction(
            self.attention + self.other,
            self.dense_attention + self.other,
        )
    }
}

fn fraction(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 1.0 }
}

impl Plan {
    /// Predicted time of one generation; `layers` has the sizes of each layer.
    ///
    /// # Errors
    ///
    /// When `layers` are not as many as the plan has.
    pub fn times(&self, layers: &[LayerWork], machine: &Throughput) -> Result<Times, LayerCount> {
        one_per_layer(self.layers(), layers)?;
        let mut times = Times {
            dense_attention: 0.0,
            attention: 0.0,
            other: machine.other_seconds * self.step_count() as f64,
        };
        for (layer, work) in layers.iter().enumerate() {
            let (tokens, text) = (work.work.tokens, work.work.text);
            let half_width = self.half_width(tokens, text);
            let density = band_density(tokens, text, half_width);
            let covers = work.work.window_covers(half_width);
            let seconds = |action: Action| {
                let rate = match action.is_windowed() && !covers {
                    true => machine.band,
                    false => machine.full,
                };
                let matmul = work.work.matmul_macs() * action.matmul_share(density) / rate;
                let projections = work.projection_macs() * work.projection_share(action);
                let reuse = match action {
                    Action::Ast => machine.reuse_seconds,
                    _ => 0.0,
                };
                matmul + projections / machine.projection + reuse
            };
            for step in 0..self.step_count() {
                times.dense_attention += seconds(Action::Full);
                times.attention += seconds(self.action(step, layer));
            }
        }
        Ok(times)
    }
}
