//! `dfa-rewrite import`: plans of other implementations.

use super::args::ImportArgs;
use super::rewrite::refuse_existing;
use super::{Failure, write};
use anyhow::{Context, anyhow};
use ditfastattn_plans::Plan;

pub fn run(args: &ImportArgs) -> Result<(), Failure> {
    refuse_existing(&args.output, args.force)?;
    let bytes = std::fs::read(&args.file)
        .with_context(|| format!("cannot read the plan {}", args.file.display()))?;
    let mut plan = Plan::import(bytes, args.window, args.cfg.into())
        .map_err(|e| anyhow!("the plan {} cannot be imported: {e}", args.file.display()))?;
    plan.name.clone_from(&args.name);
    write(&args.output, &[plan.to_json_pretty().into()])
}
