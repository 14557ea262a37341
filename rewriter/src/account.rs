//! What a plan saves of a model whose sizes are known: FLOPs in both of the paper's accountings, time, cache memory.
//!
//! Owns how the numbers are told, as a few lines for people and as JSON; the numbers are `ditfastattn_plans`'.

use crate::report::bytes;
use ditfastattn_plans::{CacheShape, LayerCount, LayerWork, Plan, Throughput, band_density};
use serde::Serialize;
use std::fmt;

/// How fast parts of a step are relative to attention over all keys, for a prediction without a measurement: a band's edge blocks
/// are computed whole, and large matrix products are a little faster than attention (`cargo bench -p ditfastattn-kernels`).
const RELATIVE: Throughput = Throughput {
    full: 1.0,
    band: 0.9,
    projection: 1.07,
    reuse_seconds: 0.0,
    other_seconds: 0.0,
};

/// The account of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct Account {
    /// Layers of equal size together.
    pub sizes: Vec<Sizes>,
    /// Share of the QKᵀ and PV work that the plan leaves out.
    pub attention_flops: f64,
    /// Share of the modules' work, projections included.
    pub module_flops: f64,
    /// QKᵀ and PV of all layers and steps without a plan, in 10⁹ multiply-accumulates.
    pub dense_attention_gmac: f64,
    /// The modules' work without a plan, in 10⁹ multiply-accumulates.
    pub dense_module_gmac: f64,
    /// Predicted time in the attention modules under the plan, as a share of that without.
    pub attention_time: f64,
    /// Predicted time of a whole step, likewise, if the modules' share of a dense step is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_time: Option<f64>,
    /// Layer-steps with a windowed action whose band holds every token pair: counted as what they compute, full attention.
    pub covered: usize,
    /// The most that the caches of one generation hold at once.
    pub peak_cache_bytes: u64,
}

/// Layers of equal size.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sizes {
    pub layers: usize,
    pub tokens: usize,
    pub text: usize,
    pub width: usize,
    pub rows: usize,
    /// `module`, or `core`: the projections are computed whatever the plan says.
    pub form: &'static str,
    /// The exact part of all token pairs that lies in the band.
    pub band_density: f64,
}

impl Account {
    /// `attention_share`: what part of a dense step's time the attention modules take, if that was measured.
    ///
    /// # Errors
    /// If there are not as many sizes as the plan has layers.
    pub fn new(
        plan: &Plan,
        works: &[LayerWork],
        caches: &[CacheShape],
        attention_share: Option<f64>,
    ) -> Result<Self, LayerCount> {
        let cost = plan.cost_by_layer(works)?;
        let times = plan.times(works, &RELATIVE)?;
        let attention_time = times.share();
        let mut sizes: Vec<Sizes> = Vec::new();
        for layer in works {
            let work = layer.work;
            let one = Sizes {
                layers: 0,
                tokens: work.tokens,
                text: work.text,
                width: work.width,
                rows: work.rows,
                form: if layer.shares_projections {
                    "module"
                } else {
                    "core"
                },
                band_density: band_density(
                    work.tokens,
                    work.text,
                    plan.half_width(work.tokens, work.text),
                ),
            };
            let like = |s: &&mut Sizes| {
                Sizes {
                    layers: 0,
                    ..(*s).clone()
                } == one
            };
            match sizes.iter_mut().find(like) {
                Some(same) => same.layers += 1,
                None => sizes.push(Sizes { layers: 1, ..one }),
            }
        }
        Ok(Self {
            sizes,
            attention_flops: cost.matmul_saved(),
            module_flops: cost.module_saved(),
            dense_attention_gmac: cost.dense_matmul_macs / 1e9,
            dense_module_gmac: cost.dense_module_macs / 1e9,
            attention_time,
            step_time: attention_share.map(|s| 1.0 - s * (1.0 - attention_time)),
            covered: cost.covered,
            peak_cache_bytes: plan.liveness().peak_bytes_by_layer(caches)?.bytes,
        })
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "attention FLOPs saved: {:.1} % (module: {:.1} %) of {:.2} GMAC (module: {:.2} GMAC)",
            100.0 * self.attention_flops,
            100.0 * self.module_flops,
            self.dense_attention_gmac,
            self.dense_module_gmac,
        )?;
        write!(
            f,
            "predicted time in attention: {:.1} % of dense",
            100.0 * self.attention_time
        )?;
        match self.step_time {
            Some(share) => writeln!(f, "; of a whole step: {:.1} %", 100.0 * share)?,
            None => writeln!(f)?,
        }
        writeln!(
            f,
            "peak cache {} per generation",
            bytes(self.peak_cache_bytes)
        )?;
        for s in &self.sizes {
            let text = match s.text {
                0 => String::new(),
                n => format!(" ({n} text)"),
            };
            let core = match s.form {
                "core" => ", projections always computed",
                _ => "",
            };
            writeln!(
                f,
                "{} layer(s): {} tokens{text} × {}, {} row(s), band {:.2} % of all pairs{core}",
                s.layers,
                s.tokens,
                s.width,
                s.rows,
                100.0 * s.band_density
            )?;
        }
        if self.covered > 0 {
            writeln!(
                f,
                "{} windowed layer-step(s) have a band over everything: they compute full attention and are counted as such",
                self.covered
            )?;
        }
        Ok(())
    }
}
