//! Draws handwritten digits twice from the same noise, dense and under a plan, and compares.
//!
//! Owns the command line and the report. The loop is in `model`, the scheduler is `dfa-rewrite`'s.

mod counters;
mod grid;
mod model;
mod quality;
mod report;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use ditfastattn_plans::{Cfg, HeatMap, Plan};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

use ditfastattn_rewriter::run::scheduler::{Betas, DpmSolver, Scheduler};
use model::{CLASSES, Model, SIDE};
use report::Report;

/// Draws handwritten digits with ONNX Runtime, dense and under a plan, from the same noise
#[derive(Parser)]
struct Args {
    /// The model as it was exported
    #[arg(long, default_value = "examples/digits/digits-dit.onnx")]
    dense: PathBuf,
    /// The same model after `dfa-rewrite`
    #[arg(long, default_value = "out/digits-dit.dfa.onnx")]
    rewritten: PathBuf,
    /// The plan it was rewritten with
    #[arg(long, default_value = "examples/digits/plan.json")]
    plan: PathBuf,
    /// The op library
    #[arg(long, default_value = "target/release/libditfastattn.so")]
    library: PathBuf,
    /// ONNX Runtime's shared library, as the Python wheel has it in `onnxruntime/capi`
    #[arg(long, env = "ORT_DYLIB_PATH")]
    onnxruntime: PathBuf,
    /// Folder for the pictures
    #[arg(long, default_value = "out")]
    out: PathBuf,
    /// Images of each digit
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    per_class: u16,
    /// Strength of classifier-free guidance
    #[arg(long, default_value_t = 4.0)]
    guidance: f32,
    /// Seed of the noise
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Threads of ONNX Runtime; 0: it chooses
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let plan = read_plan(&args.plan)?;
    let steps = plan.step_count();
    for (path, how) in [
        (&args.dense, "it is part of the repository"),
        (&args.rewritten, "`dfa-rewrite` makes it"),
        (&args.library, "`cargo build --release` makes it"),
        (
            &args.onnxruntime,
            "the `onnxruntime` wheel has it in `onnxruntime/capi`",
        ),
    ] {
        ensure!(path.is_file(), "{}: no such file; {how}", path.display());
    }
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("{}: cannot make the folder", args.out.display()))?;

    let environment = ort::init_from(&args.onnxruntime)
        .with_context(|| format!("{}: cannot be loaded", args.onnxruntime.display()))?
        .build()?;
    let labels: Vec<i64> = (0..args.per_class)
        .flat_map(|_| 0..CLASSES as i64)
        .collect();
    let noise = noise(labels.len() * SIDE * SIDE, args.seed);

    let terminal = std::io::stderr().is_terminal();
    let draw = |what: &str, path: &Path, library: Option<&Path>| -> Result<_> {
        let mut model = Model::open(&environment, path, library, args.threads)?;
        model.warm_up(
            &labels,
            DpmSolver::new(&Betas::default(), steps).timesteps()[0] as i64,
        )?;
        model.denoise(&noise, &labels, steps, args.guidance, |step| {
            if terminal {
                let end = if step == steps { "\n" } else { "" };
                eprint!("\r{what}: step {step} of {steps}{end}");
            }
        })
    };
    let dense = draw("dense  ", &args.dense, None)?;
    let planned = draw("planned", &args.rewritten, Some(&args.library))?;

    grid::write(&args.out.join("dense.png"), &dense.images, SIDE, CLASSES)?;
    grid::write(
        &args.out.join("planned.png"),
        &planned.images,
        SIDE,
        CLASSES,
    )?;
    let heat_map = args.out.join("plan.svg");
    std::fs::write(&heat_map, HeatMap::new(&plan).to_svg())
        .with_context(|| format!("{}: cannot write", heat_map.display()))?;

    let report = Report {
        plan: &plan,
        rows: 2 * labels.len(),
        dense: &dense,
        planned: &planned,
        counters: counters::read(&args.library)?,
    };
    println!("{report}");
    println!(
        "Pictures: {0}/dense.png, {0}/planned.png, {0}/plan.svg",
        args.out.display()
    );
    Ok(())
}

/// The plan, if this loop can run it.
fn read_plan(path: &Path) -> Result<Plan> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{}: cannot be read", path.display()))?;
    let plan = Plan::parse(&text).map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
    ensure!(
        plan.cfg == Cfg::CondFirst,
        "{}: `cfg` is `{}`, but this example feeds the conditional half first: `cond-first`",
        path.display(),
        plan.cfg.name()
    );
    let fed = DpmSolver::new(&Betas::default(), plan.step_count());
    if let Some(listed) = &plan.timesteps {
        let differs = listed
            .iter()
            .zip(fed.timesteps())
            .position(|(&l, &f)| l != f);
        if let Some(step) = differs {
            anyhow::bail!(
                "{}: `timesteps` has {} at step {step}, this example's sampler feeds {}; a plan belongs to one sampler",
                path.display(),
                listed[step],
                fed.timesteps()[step]
            );
        }
    }
    Ok(plan)
}

/// Standard normal noise, the same for the same seed everywhere.
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    StandardNormal
        .sample_iter(&mut generator)
        .take(len)
        .collect()
}
