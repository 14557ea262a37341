//! Draws plan files side by side: `cargo run --example heat_map -- OUT.png PLAN…` (or `.svg`).

use std::error::Error;

use ditfastattn_plans::{HeatMap, Plan};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let out = args.next().ok_or("usage: heat_map OUT.png|OUT.svg PLAN…")?;
    let plans = args
        .map(|path| Ok(Plan::parse_bytes(&std::fs::read(path)?)?))
        .collect::<Result<Vec<_>, Box<dyn Error>>>()?;
    let map = HeatMap::side_by_side(&plans.iter().collect::<Vec<_>>());
    if out.ends_with(".svg") {
        std::fs::write(out, map.to_svg())?;
    } else {
        std::fs::write(out, map.to_png()?)?;
    }
    Ok(())
}
