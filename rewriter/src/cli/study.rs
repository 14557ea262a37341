//! `dfa-rewrite study`: the observations behind the method, made on a model.

use super::load::load;
use super::rewrite::refuse_existing;
use super::run_args::StudyArgs;
use super::{Failure, INTERRUPTED, write};
use crate::lower::check_windows;
use crate::run::study::{Study, study};
use anyhow::{Context, anyhow};
use bytes::Bytes;
use ditfastattn_plans::{Axis, LineChart, Series, ValueMap, Values};
use std::sync::atomic::Ordering;

pub fn run(args: &StudyArgs) -> Result<(), Failure> {
    let ending = if args.png { "png" } else { "svg" };
    let path = |name: &str, ending: &str| args.output.join(format!("{name}.{ending}"));
    std::fs::create_dir_all(&args.output)
        .with_context(|| format!("cannot make the folder {}", args.output.display()))?;
    for (name, ending) in [("study", "json"), ("similarity", ending), ("drift", ending)] {
        refuse_existing(&path(name, ending), args.force)?;
    }
    let mut loaded = load(&args.run, &args.method)?;
    // Half of what is measured is what windows leave out.
    for layer in loaded.survey.layers() {
        check_windows(&loaded.survey, layer).map_err(|e| Failure::No(e.into()))?;
    }
    super::watch_interrupts();
    let go_on = || !INTERRUPTED.load(Ordering::Relaxed);
    let study = study(&mut loaded.prepared, loaded.plan.cfg, &go_on)?
        .ok_or_else(|| Failure::No(anyhow!("stopped; nothing was written")))?;
    let json = serde_json::to_string_pretty(&study)? + "\n";
    let (map, chart) = (similarity(&study), drift(&study));
    let (map, chart): (Bytes, Bytes) = match args.png {
        true => (map.to_png()?.into(), chart.to_png()?.into()),
        false => (map.to_svg().into(), chart.to_svg().into()),
    };
    write(&path("study", "json"), &[json.into()])?;
    write(&path("similarity", ending), &[map])?;
    write(&path("drift", ending), &[chart])
}

/// Figure 4 of the paper: (a) between steps, (b) between the halves of guidance.
fn similarity(study: &Study) -> ValueMap {
    let mut panels = vec![Values {
        title: "to the step before".into(),
        values: study.step_similarity.clone(),
    }];
    if study.half_similarity.iter().any(|row| !row.is_empty()) {
        panels.push(Values {
            title: "between the halves of guidance".into(),
            values: study.half_similarity.clone(),
        });
    }
    ValueMap::new(
        &panels,
        &Axis::new("cosine similarity of attention outputs"),
    )
}

/// Figure 3a of the paper: means over the layers.
fn drift(study: &Study) -> LineChart {
    let series = |name: &str, rows: &[Vec<f64>]| Series {
        name: name.into(),
        points: rows
            .iter()
            .enumerate()
            .skip(1)
            .map(|(step, row)| {
                (
                    step as f64,
                    row.iter().sum::<f64>() / row.len().max(1) as f64,
                )
            })
            .collect(),
    };
    let lines = [
        series("window attention", &study.window_drift),
        series("residual", &study.residual_drift),
    ];
    LineChart::new(
        "Change from the step before, mean over layers",
        &Axis::new("step"),
        &Axis::log("mean squared error"),
        &lines,
    )
}
