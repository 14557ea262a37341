//! The `dfa-rewrite` command; everything is in the library.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(ditfastattn_rewriter::cli::run(std::env::args_os()))
}
