//! The table at the end: what the plan saved and what it cost. Formats, measures nothing itself.

use std::fmt;
use std::time::Duration;

use comfy_table::presets::ASCII_MARKDOWN;
use comfy_table::{CellAlignment, Table};
use ditfastattn_plans::{CacheShape, Plan, Workload};
use serde_json::{Map, Value};

use crate::model::{Generation, SIDE};
use crate::quality::{psnr, ssim};

/// Values of a pixel lie in [-1, 1].
const RANGE: f64 = 2.0;
/// The example model's tokens (32×32 pixels in patches of 2×2), width and bytes per value.
const TOKENS: usize = 256;
const WIDTH: usize = 128;
const BYTES: usize = 4;

/// Everything the table is made of.
pub struct Report<'a> {
    pub plan: &'a Plan,
    /// Rows of the guided batch.
    pub rows: usize,
    pub dense: &'a Generation,
    pub planned: &'a Generation,
    /// The op library's counters.
    pub counters: Map<String, Value>,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(ASCII_MARKDOWN);
        table.set_header(["", "dense", "planned", "saved"]);
        for column in 1..4 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        let (dense, planned) = (self.dense, self.planned);
        for (name, before, after) in [
            ("median step", median(&dense.steps), median(&planned.steps)),
            ("whole loop", dense.total, planned.total),
        ] {
            table.add_row([
                name.to_owned(),
                format!("{:.1} ms", milliseconds(before)),
                format!("{:.1} ms", milliseconds(after)),
                percent(1.0 - after.as_secs_f64() / before.as_secs_f64()),
            ]);
        }
        let cost = self.plan.cost(&Workload {
            tokens: TOKENS,
            text: 0,
            width: WIDTH,
            rows: self.rows,
        });
        for (name, before, after, saved) in [
            (
                "QK and PV products",
                cost.dense_matmul_macs,
                cost.matmul_macs,
                cost.matmul_saved(),
            ),
            (
                "with projections",
                cost.dense_module_macs,
                cost.module_macs,
                cost.module_saved(),
            ),
        ] {
            table.add_row([
                name.to_owned(),
                format!("{:.1} GMAC", before / 1e9),
                format!("{:.1} GMAC", after / 1e9),
                percent(saved),
            ]);
        }
        writeln!(f, "{table}")?;

        let peak = self.plan.liveness().peak_bytes(&CacheShape {
            rows: self.rows,
            tokens: TOKENS,
            width: WIDTH,
            element_bytes: BYTES,
        });
        let images = dense.images.chunks_exact(SIDE * SIDE);
        let pairs = images.zip(planned.images.chunks_exact(SIDE * SIDE));
        let count = pairs.len() as f64;
        let similarity = pairs.map(|(a, b)| ssim(a, b, SIDE, RANGE)).sum::<f64>() / count;
        writeln!(
            f,
            "planned against dense: PSNR {:.1} dB, SSIM {similarity:.3}",
            psnr(&dense.images, &planned.images, RANGE)
        )?;
        writeln!(
            f,
            "caches: at most {:.1} MiB at once (the plan says so before anything runs)",
            peak.bytes as f64 / f64::from(1 << 20)
        )?;
        write!(f, "op library counted:")?;
        for (name, value) in &self.counters {
            if value.as_f64().is_some_and(|v| v != 0.0) {
                write!(f, " {name} {value}")?;
            }
        }
        Ok(())
    }
}

fn median(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2
}

fn milliseconds(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_lies_between_the_middle_two() {
        let times = [7, 1, 100, 3].map(Duration::from_millis);
        assert_eq!(median(&times), Duration::from_millis(5));
        assert_eq!(median(&times[..3]), Duration::from_millis(7));
    }
}
