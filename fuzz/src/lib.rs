//! What must hold for any bytes that are given as a plan or as a model; a check panics where it does not.
//!
//! One set of checks for all who look for a counterexample: `fuzz_targets/` by coverage, `tests/replay.rs` among what was kept,
//! `plans/tests/format.rs` and `rewriter/tests/mutations.rs` by chance.
#![forbid(unsafe_code)]

pub mod damage;
pub mod model;
pub mod plan;
