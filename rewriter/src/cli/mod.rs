//! The `dfa-rewrite` command: arguments, exit codes, and what goes to stdout and stderr.
//!
//! Results go to stdout, everything else to stderr. Exit 0: done. Exit 1: it ran and the answer is no (nothing to rewrite, the
//! plan does not fit). Exit 2: bad input, usage or I/O. Nothing is written unless the exit code is 0.

mod args;
mod import;
mod inspect;
mod load;
mod plot;
mod rewrite;
mod run_args;
mod search;
mod study;

use crate::find::InputsError;
use crate::onnx::write_atomically;
pub use args::Cli;
use args::Command;
use bytes::Bytes;
use clap::{CommandFactory, Parser};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why the command did not succeed, by exit code.
#[derive(Debug)]
enum Failure {
    /// Exit 1.
    No(anyhow::Error),
    /// Exit 2.
    Bad(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Bad(error.into())
    }
}

/// Set by Ctrl-C; looked at while writing and searching.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Writes a result file, or removes what it had begun when Ctrl-C comes.
fn write(path: &Path, pieces: &[Bytes]) -> Result<(), Failure> {
    watch_interrupts();
    Ok(write_atomically(path, pieces, &|| {
        INTERRUPTED.load(Ordering::Relaxed)
    })?)
}

/// From now on Ctrl-C sets [`INTERRUPTED`].
fn watch_interrupts() {
    // Without a handler, or with the one of an earlier call, all is well: Ctrl-C ends the program, at worst less tidily.
    let _ = ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed));
}

/// Inputs that cannot be told apart are an answer; a name that does not exist is a mistake.
fn inputs_failure(error: InputsError) -> Failure {
    match error {
        InputsError::NoSuchInput { .. } | InputsError::NoSuchLayer { .. } => {
            Failure::Bad(error.into())
        }
        _ => Failure::No(error.into()),
    }
}

/// Runs the command line `arguments` (the program's name first) and returns the exit code.
pub fn run(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { 2 } else { 0 };
        }
    };
    let result = match cli.command {
        None => rewrite::run(&cli.rewrite),
        Some(Command::Inspect(args)) => inspect::run(&args),
        Some(Command::Study(args)) => study::run(&args),
        Some(Command::Plot(args)) => plot::run(&args),
        Some(Command::Import(args)) => import::run(&args),
        Some(Command::Search(args)) => search::run(&args),
        Some(Command::Schema) => {
            let schema =
                serde_json::to_string_pretty(&ditfastattn_plans::json_schema()).map(|s| s + "\n");
            schema.map_err(Failure::from).and_then(|s| print(&s))
        }
        Some(Command::Completions { shell }) => {
            let mut out = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "dfa-rewrite", &mut out);
            print(&String::from_utf8_lossy(&out))
        }
    };
    match result {
        Ok(()) => 0,
        Err(Failure::No(error)) => complain(&error, 1),
        Err(Failure::Bad(error)) => complain(&error, 2),
    }
}

fn complain(error: &anyhow::Error, code: u8) -> u8 {
    let _ = writeln!(std::io::stderr(), "dfa-rewrite: {error:#}");
    code
}

/// Prints a result. A reader that went away (`| head`) is no failure.
fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout()
        .write_all(text.as_bytes())
        .and_then(|()| std::io::stdout().flush())
    {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::Bad(
            anyhow::Error::new(error).context("cannot write to stdout"),
        )),
        _ => Ok(()),
    }
}

fn read_plan(path: &Path) -> Result<ditfastattn_plans::Plan, Failure> {
    let bytes = std::fs::read(path).map_err(|e| {
        anyhow::Error::new(e).context(format!("cannot read the plan {}", path.display()))
    })?;
    Ok(ditfastattn_plans::Plan::parse_bytes(&bytes)
        .map_err(|e| anyhow::anyhow!("the plan {} is not valid: {e}", path.display()))?)
}
