//! Which request a run belongs to, which step it is, and what every layer does now.
//!
//! Knows plans, timesteps and caches; knows neither ONNX Runtime nor attention. A cached tensor is any `T` that can be
//! cloned cheaply (an `Arc`), so that the whole state machine is tested with symbols instead of numbers.
//!
//! | module | owns |
//! |---|---|
//! | `compiled_plan` | a plan and what it keeps alive |
//! | `schedule` | which place in the plan a timestep means |
//! | `directive` | what one layer is told to do in one run |
//! | `layer_decision` | what that is, given the plan and what is cached |
//! | `caches` | the cached tensors of one layer and when they die |
//! | `continuity` | whether an anonymous run continues the generation that was seen last |
//! | `request` | one generation between its runs |
//! | `call` | what a run is called with |
//! | `run` | one run from its step op to its last layer |
//! | `session` | the requests of one session, and how runs of theirs begin |
//! | `run_decision` | how a run that begins relates to its request |
//! | `anonymous` | the same for a run without a request id |
//! | `completion` | how runs end |
//! | `eviction` | what a session forgets |
//! | `cached` | what the state machine asks of a tensor |
//! | `error` | why an op cannot go on |
//! | `notice` | what is worth a line in the log |
//! | `process` | what sessions share: tickets, the memory budget, counters |
#![forbid(unsafe_code)]

mod anonymous;
mod budget;
mod cached;
mod caches;
mod call;
mod compiled_plan;
mod completion;
mod continuity;
mod counters;
mod directive;
mod error;
mod eviction;
mod layer_decision;
mod notice;
mod process;
mod request;
mod run;
mod run_decision;
mod schedule;
mod session;
#[cfg(test)]
mod tests;

pub use budget::Lease;
pub use cached::Cached;
pub use caches::Residual;
pub use call::{Call, FeedShapes};
pub use compiled_plan::CompiledPlan;
pub use continuity::{Feed, InputDigest, LatentSample, RunSignature, Values};
pub use counters::Counters;
pub use directive::{Directive, Rows, Work};
pub use error::StateError;
pub use notice::Notice;
pub use process::{Limits, Process};
pub use run::Run;
pub use schedule::SchedulePolicy;
pub use session::Session;
