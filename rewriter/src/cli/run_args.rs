//! The flags of commands that run a model.

use super::args::{ChoiceArgs, FileArgs, InputsArgs};
use crate::run::feed::MakeScheduler;
use crate::run::prepare::Source;
use crate::run::scheduler::{BetaSchedule, Betas, Ddim, DpmSolver, EulerFlow, Iddpm, Scheduler};
use clap::{Args, ValueEnum};
use ditfastattn_plans::{Action, Cfg, Metric, Side, TextTokens};
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub struct SearchArgs {
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub method: MethodArgs,
    /// Where to write the plan
    #[arg(short, long, value_name = "PLAN")]
    pub output: PathBuf,
    /// Overwrite PLAN if it exists, and begin the journal anew unless --resume
    #[arg(long)]
    pub force: bool,
    /// The threshold δ: the last layer of a step may change the output by less than δ, earlier layers by their share of it
    #[arg(
        long,
        value_name = "δ",
        required_unless_present = "preset",
        conflicts_with = "preset"
    )]
    pub delta: Option<f64>,
    /// One of the paper's thresholds: 0.025, 0.05, 0.075, 0.1, 0.125, 0.15; the plan gets its name
    #[arg(long, value_enum, value_name = "D")]
    pub preset: Option<Preset>,
    /// How the output's change is measured: mrae (the paper's formula), authors (their code, with which their thresholds were tuned),
    /// cosine, mse
    #[arg(long, value_name = "METRIC", default_value = "mrae")]
    pub metric: Metric,
    /// What is tried, in this order; the first that passes is taken [default: all, the cheapest first for the model's size; the
    /// paper's order is ast,wa-rs+asc,wa-rs,asc]
    #[arg(long, value_name = "ACTION", value_delimiter = ',')]
    pub candidates: Vec<Action>,
    /// Where decisions are recorded as they are made [default: PLAN with .search.jsonl]
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// Go on with the journal of a search that was stopped or killed
    #[arg(long)]
    pub resume: bool,
    /// A finished or stopped search with another δ: what its losses decide is not run again
    #[arg(long, value_name = "JOURNAL", conflicts_with = "resume")]
    pub reuse: Option<PathBuf>,
    /// The plan's name [default: the preset's]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct StudyArgs {
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub method: MethodArgs,
    /// Folder for study.json and the pictures; made if it is not there
    #[arg(short, long, value_name = "FOLDER")]
    pub output: PathBuf,
    /// Overwrite what is there
    #[arg(long)]
    pub force: bool,
    /// Draw PNG instead of SVG
    #[arg(long)]
    pub png: bool,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// The plan to follow; the model is rewritten for it in memory
    #[arg(long, value_name = "PLAN", required_unless_present = "rewritten")]
    pub plan: Option<PathBuf>,
    /// A file that was rewritten from MODEL, with the plan in it
    #[arg(long, value_name = "FILE", conflicts_with = "plan")]
    pub rewritten: Option<PathBuf>,
    /// Random inputs: the size of a dimension that the model leaves open, by its name or as INPUT.AXIS
    #[arg(long = "size", value_name = "NAME=N", value_parser = size, conflicts_with_all = ["calib", "trajectory"])]
    pub sizes: Vec<(String, usize)>,
    /// How far apart what should be equal may be, as a part of the largest number [default: 1e-4; float16 0.01, bfloat16 0.05, quantised 0.1]
    #[arg(long, value_name = "X", value_parser = limit)]
    pub tolerance: Option<f64>,
    /// Fail if the plan moves the result further than this from the dense one, by --metric
    #[arg(long, value_name = "LOSS", value_parser = limit)]
    pub max_loss: Option<f64>,
    /// What --max-loss is measured by: mrae, authors, cosine, mse
    #[arg(long, value_name = "METRIC", default_value = "mrae")]
    pub metric: Metric,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
}

/// The paper's thresholds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    D1,
    D2,
    D3,
    D4,
    D5,
    D6,
}

impl Preset {
    pub fn delta(self) -> f64 {
        [0.025, 0.05, 0.075, 0.1, 0.125, 0.15][self as usize]
    }

    pub fn name(self) -> String {
        format!("D{}", self as usize + 1)
    }
}

/// What a plan says besides its steps.
#[derive(Debug, Args)]
pub struct MethodArgs {
    /// Half-width of the window as a fraction of the image tokens
    #[arg(long, value_name = "W", default_value_t = ditfastattn_plans::DEFAULT_WINDOW, value_parser = window)]
    pub window: f64,
    /// How the two predictions of guidance reach the model
    #[arg(long, value_enum, value_name = "HOW", default_value = "none")]
    pub cfg: CfgArg,
    /// Joint attention: how many tokens are text and on which side, as 333:end, where the graph does not show it
    #[arg(long, value_name = "N:SIDE", value_parser = text)]
    pub text: Option<TextTokens>,
}

/// A model, what it is fed, and what runs it.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The exported model
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Initial noise and conditioning, arrays named like the model's inputs, one row per sample (with guidance: the noise one row,
    /// everything else one or two); needs --scheduler and --steps
    #[arg(long, value_name = "NPZ", conflicts_with = "trajectory", requires_all = ["scheduler", "steps"])]
    pub calib: Option<PathBuf>,
    /// What a pipeline fed: per input an array of its own shape, or with a leading axis of steps (guidance in two runs: of runs, two per
    /// step, the conditional one first)
    #[arg(long, value_name = "NPZ")]
    pub trajectory: Option<PathBuf>,
    #[command(flatten)]
    pub scheduler: SchedulerArgs,
    /// ONNX Runtime: libonnxruntime.so or a folder with it [default: ORT_DYLIB_PATH, else the wheel that python3 imports]
    #[arg(long, value_name = "PATH")]
    pub onnxruntime: Option<PathBuf>,
    /// The op library [default: libditfastattn.so beside this program, else that of the wheel that python3 imports]
    #[arg(long, value_name = "PATH")]
    pub library: Option<PathBuf>,
    /// Threads of ONNX Runtime; 0: it chooses
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub inputs: InputsArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
}

#[derive(Debug, Args)]
pub struct SchedulerArgs {
    /// The scheduler that moves the latents on
    #[arg(long, value_enum, value_name = "NAME", requires = "calib")]
    pub scheduler: Option<SchedulerName>,
    /// Steps of the denoising
    #[arg(long, value_name = "N", requires = "calib", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub steps: Option<u16>,
    /// Strength of classifier-free guidance
    #[arg(long, value_name = "G", default_value_t = 4.0)]
    pub guidance: f32,
    /// How β grew in the model's training
    #[arg(long, value_enum, value_name = "HOW", default_value = "linear")]
    pub betas: BetasArg,
    /// First β of the model's training
    #[arg(long, value_name = "β", default_value_t = 1e-4)]
    pub beta_start: f64,
    /// Last β of the model's training
    #[arg(long, value_name = "β", default_value_t = 0.02)]
    pub beta_end: f64,
    /// euler-flow: shift of the timesteps
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub shift: f64,
    /// euler-flow: the model is fed σ times this (exports of Flux: 1)
    #[arg(long, value_name = "F", default_value_t = 1000.0)]
    pub timestep_scale: f64,
    /// iddpm, verify on random inputs: seed of the noise
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Samples that share a run, to bound memory; 0: all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub per_run: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SchedulerName {
    /// DDIM without noise, noise prediction
    Ddim,
    /// DPM-Solver++ of second order, noise prediction
    #[value(name = "dpm++2m")]
    Dpm,
    /// Improved DDPM, noise prediction, learnt variance
    Iddpm,
    /// Euler steps on a rectified flow, velocity prediction
    EulerFlow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BetasArg {
    Linear,
    ScaledLinear,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CfgArg {
    /// One batch, the conditional half first
    CondFirst,
    /// One batch, the unconditional half first
    UncondFirst,
    /// Two runs
    Separate,
    /// No guidance
    None,
}

impl From<CfgArg> for Cfg {
    fn from(arg: CfgArg) -> Self {
        match arg {
            CfgArg::CondFirst => Self::CondFirst,
            CfgArg::UncondFirst => Self::UncondFirst,
            CfgArg::Separate => Self::Separate,
            CfgArg::None => Self::None,
        }
    }
}

impl RunArgs {
    /// What was named as the model's inputs, and the file it is in.
    pub fn source<'a>(&'a self, make: &'a MakeScheduler<'a>) -> Option<(&'a Path, Source<'a>)> {
        if let Some(path) = &self.trajectory {
            return Some((path, Source::Trajectory(path)));
        }
        let path = self.calib.as_ref()?;
        let source = Source::Calibration {
            path,
            guidance: self.scheduler.guidance,
            per_run: self.scheduler.per_run,
            scheduler: make,
        };
        Some((path, source))
    }
}

impl SchedulerArgs {
    /// The scheduler of sample group `group`.
    pub fn make(&self, group: usize) -> Box<dyn Scheduler> {
        let steps = usize::from(self.steps.unwrap_or(1));
        let schedule = match self.betas {
            BetasArg::Linear => BetaSchedule::Linear,
            BetasArg::ScaledLinear => BetaSchedule::ScaledLinear,
        };
        let betas = Betas::new(schedule, self.beta_start, self.beta_end);
        match self.scheduler.unwrap_or(SchedulerName::Ddim) {
            SchedulerName::Ddim => Box::new(Ddim::new(&betas, steps)),
            SchedulerName::Dpm => Box::new(DpmSolver::new(&betas, steps)),
            SchedulerName::Iddpm => Box::new(Iddpm::new(
                &betas,
                steps,
                self.seed.wrapping_add(group as u64),
            )),
            SchedulerName::EulerFlow => {
                Box::new(EulerFlow::new(steps, self.shift, self.timestep_scale))
            }
        }
    }

    /// Everything that determines the trajectory, for the journal.
    pub fn describe(&self) -> String {
        format!("{self:?}")
    }
}

fn window(value: &str) -> Result<f64, String> {
    let number = value.parse().ok().filter(|w| *w > 0.0 && *w <= 1.0);
    number.ok_or_else(|| format!("expected a number above 0, at most 1, found `{value}`"))
}

fn limit(value: &str) -> Result<f64, String> {
    let number = value
        .parse::<f64>()
        .ok()
        .filter(|x| *x >= 0.0 && x.is_finite());
    number.ok_or_else(|| format!("expected a finite number from 0, found `{value}`"))
}

pub fn size(value: &str) -> Result<(String, usize), String> {
    let pair = value.rsplit_once('=');
    pair.and_then(|(name, n)| Some((name.to_owned(), n.parse().ok().filter(|&n| n > 0)?)))
        .ok_or_else(|| format!("expected a name and a size, such as tokens=256, found `{value}`"))
}

fn text(value: &str) -> Result<TextTokens, String> {
    let expected = || format!("expected a number and a side, such as 333:end, found `{value}`");
    let (tokens, side) = value.split_once(':').ok_or_else(expected)?;
    let side = match side {
        "start" => Side::Start,
        "end" => Side::End,
        _ => return Err(expected()),
    };
    let tokens = tokens.parse().map_err(|_| expected())?;
    Ok(TextTokens { tokens, side })
}
