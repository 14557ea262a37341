//! Every flag, once: help, usage errors and completions come from here.

use super::run_args::{CfgArg, SearchArgs, StudyArgs, VerifyArgs, size};
use crate::find::{Choice, InputsRequest, Pattern};
use crate::lower::{RequestInputs, Schedule};
use crate::onnx::{Links, ModelFile, ReadError};
use crate::run::host::Provider;
use crate::sizes::Given;
use clap::builder::ArgPredicate;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};

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
    after_help = "Exit codes: 0 done; 1 it ran and the answer is no (nothing to rewrite, the plan does not fit, a check failed); 2 bad input, usage or I/O."
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
    /// Run a model and its rewritten form side by side: is it exact where all is full, does it follow its plan, are its text tokens
    /// right, how far does the plan move the result
    Verify(Box<VerifyArgs>),
    /// Find a plan: run a model on calibration inputs and choose, by the paper's greedy method, what each layer does at each step
    Search(Box<SearchArgs>),
    /// Measure how similar attention is between steps and between the halves of guidance, on calibration inputs
    Study(Box<StudyArgs>),
    /// Draw plans as layers × steps heat maps
    Plot(PlotArgs),
    /// Turn a plan of xDiT or of the authors into one of ours
    Import(ImportArgs),
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
    /// How the inputs dfa_request_id, dfa_start and dfa_end are declared [default: optional; with --emit-triton-config required]
    #[arg(
        long,
        value_enum,
        value_name = "HOW",
        default_value = "optional",
        default_value_if("emit_triton_config", ArgPredicate::IsPresent, "required"),
        hide_default_value = true
    )]
    pub request_inputs: RequestInputsArg,
    /// Write Triton's config.pbtxt as well, with the request inputs as sequence controls [default: beside OUT, or where OUT is
    /// NAME/VERSION/model.onnx of a model repository, in NAME]
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub emit_triton_config: Option<Option<PathBuf>>,
    /// Where the server finds the op library, for config.pbtxt [default: libditfastattn.so beside this program]
    #[arg(long, value_name = "PATH", requires = "emit_triton_config")]
    pub library: Option<PathBuf>,
    /// Where layers remember what later steps read
    #[arg(long, value_enum, value_name = "WHERE", default_value = "hidden")]
    pub state: StateArg,
    /// Which timesteps the plan serves
    #[arg(long, value_enum, value_name = "WHICH", default_value = "planned")]
    pub schedule: ScheduleArg,
    #[command(flatten)]
    pub dense: DenseArgs,
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub inputs: InputsArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    #[command(flatten)]
    pub sizes: SizesArgs,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
    /// Print nothing but errors
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
}

/// Who computes attention at steps that stay dense.
#[derive(Debug, Default, Args)]
pub struct DenseArgs {
    /// Who computes attention at steps that stay dense and leave nothing for later ones
    #[arg(
        long = "dense",
        value_enum,
        value_name = "WHO",
        default_value = "library"
    )]
    pub who: DenseArg,
    /// For --dense measure: ONNX Runtime, libonnxruntime.so or a folder with it [default: ORT_DYLIB_PATH, else the wheel that python3
    /// imports]
    #[arg(long, value_name = "PATH")]
    pub onnxruntime: Option<PathBuf>,
    /// For --dense measure: what will run the model
    #[arg(long, value_enum, value_name = "NAME", default_value = "cpu")]
    pub provider: ProviderArg,
    /// For --dense measure: threads of ONNX Runtime; 0: it chooses
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
    /// For --dense measure: the size of a dimension that the model leaves open, by its name or as INPUT.AXIS
    #[arg(long = "size", value_name = "NAME=N", value_parser = size)]
    pub open_sizes: Vec<(String, usize)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DenseArg {
    /// The op library
    #[default]
    Library,
    /// ONNX Runtime, with the attention that the model was exported with
    Host,
    /// Whichever is faster: a dense step is run in both forms, on random numbers
    Measure,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ProviderArg {
    #[default]
    Cpu,
    Cuda,
}

impl From<ProviderArg> for Provider {
    fn from(arg: ProviderArg) -> Self {
        match arg {
            ProviderArg::Cpu => Self::Cpu,
            ProviderArg::Cuda => Self::Cuda,
        }
    }
}

/// Sizes that the graph leaves open, for the accounting.
#[derive(Debug, Default, Args)]
pub struct SizesArgs {
    /// Tokens of a sequence, text included, for the accounting of layers where the graph does not fix them
    #[arg(long, value_name = "N")]
    pub tokens: Option<usize>,
    /// How many of them are text, for the accounting of layers where neither graph nor plan say so
    #[arg(long, value_name = "N")]
    pub text_tokens: Option<usize>,
    /// Batch rows of a step, for the accounting [default: the exported batch, else those of one image]
    #[arg(long, value_name = "N")]
    pub rows: Option<usize>,
    /// Part of a dense step's time that the attention modules take (measured), to predict the time of a step
    #[arg(long, value_name = "0…1", value_parser = share)]
    pub attention_share: Option<f64>,
}

/// A part of a whole.
fn share(value: &str) -> Result<f64, String> {
    let number = value.parse().ok().filter(|x| (0.0..=1.0).contains(x));
    number.ok_or_else(|| format!("expected a number from 0 to 1, found `{value}`"))
}

impl From<&SizesArgs> for Given {
    fn from(args: &SizesArgs) -> Self {
        Self {
            tokens: args.tokens,
            text: args.text_tokens,
            rows: args.rows,
            ..Self::default()
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RequestInputsArg {
    /// With a default value: clients that do not know them need not feed them
    Optional,
    /// Ordinary inputs, fed at every run
    Required,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StateArg {
    /// In the library, per request: the model's inputs and outputs stay what they are
    Hidden,
    /// In inputs past.* and outputs present.* of the model, with the step's number as the input dfa_step: no hidden memory
    Io,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ScheduleArg {
    /// Those in its list: at others, and for steps beyond its number, attention is full
    Planned,
    /// Any over the same range, in more steps or fewer: a value that is not in the list takes the row of the planned one before it,
    /// and a cache that is older than it would be under the plan is not used
    Any,
}

impl From<ScheduleArg> for Schedule {
    fn from(arg: ScheduleArg) -> Self {
        match arg {
            ScheduleArg::Planned => Self::Planned,
            ScheduleArg::Any => Self::Any,
        }
    }
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
pub struct FileArgs {
    /// Accept weights outside the file that are links out of the model's folder, or have other names (hard links)
    #[arg(long)]
    pub allow_linked_weights: bool,
}

impl FileArgs {
    /// Reads the model.
    pub fn open(&self, path: &Path) -> Result<ModelFile, ReadError> {
        let links = match self.allow_linked_weights {
            true => Links::Allowed,
            false => Links::Refused,
        };
        ModelFile::open_with(path, links)
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
    pub file: FileArgs,
    #[command(flatten)]
    pub inputs: InputsArgs,
    #[command(flatten)]
    pub choice: ChoiceArgs,
    #[command(flatten)]
    pub sizes: SizesArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
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

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// xDiT's JSON, or the authors' pickle (which is read, not run)
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Half-width of its window as a fraction of the image tokens: its width in tokens over their number
    #[arg(long, value_name = "W")]
    pub window: f64,
    /// How guidance reached its model
    #[arg(long, value_enum, value_name = "HOW")]
    pub cfg: CfgArg,
    /// Where to write the plan
    #[arg(short, long, value_name = "PLAN")]
    pub output: PathBuf,
    /// The plan's name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Overwrite PLAN if it exists
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
