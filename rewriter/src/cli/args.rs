//! Every flag, once: help, usage errors and completions come from here.

use crate::find::{Choice, InputsRequest, Pattern};
use crate::lower::RequestInputs;
use clap::{Args, Parser, Subcommand, ValueEnum};
use ditfastattn_plans::{Action, Cfg, Metric};
use std::path::PathBuf;

/// Rewrites an exported ONNX diffusion transformer so that its self-attention follows a DiTFastAttn plan.
///
/// The rewritten model needs libditfastattn.so: register it as a custom-op library in whatever serves the model.
#[derive(Debug, Parser)]
#[command(
    name = "dfa-rewrite",
    version,
    max_term_width = 100,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Exit codes: 0 done; 1 it ran and the answer is no (nothing to rewrite, the plan does not fit); 2 bad input, usage or I/O."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub rewrite: RewriteArgs,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List every attention of a model: what it is, which form it would get, or why it does not match
    Inspect(InspectArgs),
    /// Search a plan for a model: Algorithm 1 of the paper, on calibration inputs
    Search(Box<SearchArgs>),
    /// Draw plans as layers × steps heat maps
    Plot(PlotArgs),
    /// Print the JSON Schema of plan files
    Schema,
    /// Print shell completions
    Completions {
        /// The shell to complete for
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub struct RewriteArgs {
    /// The exported model
    #[arg(value_name = "MODEL", required = true)]
    pub model: Option<PathBuf>,
    /// The plan: which layer does what at which step (JSON)
    #[arg(long, value_name = "PLAN", required = true)]
    pub plan: Option<PathBuf>,
    /// Where to write the rewritten model [default: MODEL with .dfa.onnx, beside it]
    #[arg(short, long, value_name = "OUT")]
    pub output: Option<PathBuf>,
    /// Overwrite OUT if it exists
    #[arg(long)]
    pub force: bool,
    /// Do everything but write the file
    #[arg(long)]
    pub dry_run: bool,
    /// How the inputs dfa_request_id, dfa_start and dfa_end are declared
    #[arg(long, value_enum, value_name = "HOW", default_value = "optional")]
    pub request_inputs: RequestInputsArg,
    /// Where layers remember what later steps read
    #[arg(long, value_enum, value_name = "WHERE", default_value = "hidden")]
    pub state: StateArg,
    #[command(flatten)]
    pub inputs: InputsArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RequestInputsArg {
    /// With a default value: clients that do not know them need not feed them
    Optional,
    /// Ordinary inputs, fed at every run (Triton's sequence batcher)
    Required,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StateArg {
    /// In the library, per request: the model's inputs and outputs stay what they are
    Hidden,
    /// In inputs past.* and outputs present.* of the model, with the step's number as the input dfa_step: no hidden memory
    Io,
}

impl From<RequestInputsArg> for RequestInputs {
    fn from(arg: RequestInputsArg) -> Self {
        match arg {
            RequestInputsArg::Optional => Self::Optional,
            RequestInputsArg::Required => Self::Required,
        }
    }
}

#[derive(Debug, Default, Args)]
pub struct InputsArgs {
    /// The model's timestep input, where it cannot be told from the graph
    #[arg(long, value_name = "NAME")]
    pub timestep_input: Option<String>,
    /// The model's latents input, where it cannot be told from the graph
    #[arg(long, value_name = "NAME")]
    pub latents_input: Option<String>,
}

#[derive(Debug, Default, Args)]
pub struct ChoiceArgs {
    /// Rewrite only these layers: indices as `inspect` shows them, ranges (4-9), node names (* = anything)
    #[arg(long, value_name = "LAYER", value_delimiter = ',')]
    pub only: Vec<Pattern>,
    /// Leave these layers as they are; the plan has no columns for them
    #[arg(long, value_name = "LAYER", value_delimiter = ',')]
    pub skip: Vec<Pattern>,
}

impl From<&ChoiceArgs> for Choice {
    fn from(args: &ChoiceArgs) -> Self {
        Self {
            only: args.only.clone(),
            skip: args.skip.clone(),
        }
    }
}

impl From<&InputsArgs> for InputsRequest {
    fn from(args: &InputsArgs) -> Self {
        Self {
            timestep: args.timestep_input.clone(),
            latents: args.latents_input.clone(),
        }
    }
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The exported model
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// Say also what this plan would do
    #[arg(long, value_name = "PLAN")]
    pub plan: Option<PathBuf>,
    #[command(flatten)]
    pub inputs: InputsArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct SearchArgs {
    /// The exported model
    #[arg(value_name = "MODEL")]
    pub model: PathBuf,
    /// The plan to write
    #[arg(short, long, value_name = "PLAN")]
    pub output: PathBuf,
    /// The threshold δ: how much the model's output may change, from 0
    #[arg(
        long,
        value_name = "DELTA",
        required_unless_present = "preset",
        conflicts_with = "preset"
    )]
    pub delta: Option<f64>,
    /// δ of the paper's configurations: d1 (0.025) to d6 (0.15)
    #[arg(long, value_name = "D")]
    pub preset: Option<String>,
    /// The loss: mrae (the paper's), authors (their code's), cosine, mse
    #[arg(long, value_name = "METRIC", default_value = "mrae")]
    pub metric: Metric,
    /// Actions to try, in this order [default: by ascending cost for the model's token count]
    #[arg(long, value_name = "ACTION", value_delimiter = ',')]
    pub candidates: Vec<Action>,
    /// Half-width of the band as a fraction of the image tokens
    #[arg(long, value_name = "FRACTION", default_value_t = 0.125)]
    pub window: f64,
    /// How the two halves of guidance reach the model
    #[arg(long, value_enum, value_name = "HOW", default_value = "none")]
    pub cfg: CfgArg,
    /// What a pipeline fed, per input an array of its shape or with one leading axis of steps (npz)
    #[arg(long, value_name = "NPZ", conflicts_with_all = ["calib", "scheduler"])]
    pub trajectory: Option<PathBuf>,
    /// Initial noise, a row per sample, and conditioning, named like the model's inputs (npz)
    #[arg(long, value_name = "NPZ", requires = "scheduler")]
    pub calib: Option<PathBuf>,
    /// The scheduler that moves the latents of --calib on
    #[arg(long, value_enum, value_name = "NAME", requires = "steps")]
    pub scheduler: Option<SchedulerArg>,
    /// Steps of the scheduler
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Guidance scale
    #[arg(long, value_name = "G", default_value_t = 4.0)]
    pub guidance: f32,
    /// euler-flow: shift of the noise levels
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub shift: f64,
    /// euler-flow: what a noise level of 1 is fed as (1000: SD3; 1: Flux)
    #[arg(long, value_name = "T", default_value_t = 1000.0)]
    pub timestep_scale: f64,
    /// Where decisions are recorded as they are made [default: PLAN with .search.jsonl]
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// Continue the search of the journal
    #[arg(long)]
    pub resume: bool,
    /// Overwrite PLAN if it exists, and begin the journal anew unless --resume
    #[arg(long)]
    pub force: bool,
    /// libonnxruntime.so, or a folder with it [default: $ORT_DYLIB_PATH, else python3's onnxruntime]
    #[arg(long, value_name = "PATH")]
    pub onnxruntime: Option<PathBuf>,
    /// libditfastattn.so [default: beside this program]
    #[arg(long, value_name = "PATH")]
    pub library: Option<PathBuf>,
    /// Threads (0: all cores)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    #[command(flatten)]
    pub inputs: InputsArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum CfgArg {
    /// One batch, conditional half first
    CondFirst,
    /// One batch, unconditional half first
    UncondFirst,
    /// Two runs per step
    Separate,
    /// No guidance, or inside the model
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

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum SchedulerArg {
    /// DDIM, η = 0
    Ddim,
    /// DPM-Solver++ 2M
    #[value(name = "dpm++2m")]
    Dpm,
    /// Improved DDPM, with learnt variances
    Iddpm,
    /// Euler steps of a rectified flow
    EulerFlow,
}

#[derive(Debug, Args)]
pub struct PlotArgs {
    /// The plans to draw, side by side
    #[arg(value_name = "PLAN", required = true)]
    pub plans: Vec<PathBuf>,
    /// The picture: .svg or .png
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,
    /// Overwrite OUT if it exists
    #[arg(long)]
    pub force: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flag_table_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_rewrite_needs_a_model_and_a_plan() {
        assert!(Cli::try_parse_from(["dfa-rewrite", "model.onnx"]).is_err());
        let cli = Cli::try_parse_from(["dfa-rewrite", "model.onnx", "--plan", "d3.json"]).unwrap();
        assert!(cli.command.is_none());
        assert_eq!(cli.rewrite.plan.unwrap(), PathBuf::from("d3.json"));
    }

    #[test]
    fn subcommands_do_not_need_the_rewrite_arguments() {
        let cli = Cli::try_parse_from(["dfa-rewrite", "inspect", "model.onnx", "--json"]).unwrap();
        assert!(matches!(
            cli.command,
            Some(Command::Inspect(InspectArgs { json: true, .. }))
        ));
    }
}
