//! `dfa-rewrite plot`: plans as pictures.

use super::args::PlotArgs;
use super::rewrite::refuse_existing;
use super::{Failure, read_plan, write};
use ditfastattn_plans::HeatMap;

pub fn run(args: &PlotArgs) -> Result<(), Failure> {
    let plans = args
        .plans
        .iter()
        .map(|p| read_plan(p))
        .collect::<Result<Vec<_>, _>>()?;
    let map = HeatMap::side_by_side(&plans.iter().collect::<Vec<_>>());
    let picture = match args.output.extension().and_then(|e| e.to_str()) {
        Some("svg") => map.to_svg().into_bytes(),
        Some("png") => map.to_png()?,
        other => {
            return Err(Failure::Bad(anyhow::anyhow!(
                "cannot tell the picture's format from {} (extension {}): expected .svg or .png",
                args.output.display(),
                other.unwrap_or("missing")
            )));
        }
    };
    refuse_existing(&args.output, args.force)?;
    write(&args.output, &[picture.into()])
}
