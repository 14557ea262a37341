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
//! | `notice` | what is worth a line in the log |
//! | `process` | what sessions share: tickets, the memory budget, counters |
#![forbid(unsafe_code)]

mod anonymous;
mod budget;
mod caches;
mod call;
mod compiled_plan;
mod completion;
mod continuity;
mod counters;
mod directive;
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
pub use caches::Residual;
pub use call::{Call, FeedShapes};
pub use compiled_plan::CompiledPlan;
pub use continuity::{Feed, InputDigest, LatentSample, RunSignature, Values};
pub use counters::Counters;
pub use directive::{Directive, Rows, Work};
pub use notice::Notice;
pub use process::{Limits, Process};
pub use run::Run;
pub use schedule::SchedulePolicy;
pub use session::Session;

/// A cached tensor: a cheap handle, such as an `Arc`.
pub trait Cached: Clone + Send + Sync + 'static {
    /// Whether it may be served. Asked when a run begins; a tensor that is written in the background may only then be known
    /// to hold NaN or infinity.
    fn is_sound(&self) -> bool {
        true
    }
}

/// An empty list with room for `len`, or an error that names it. For lists that grow with the model or with traffic.
fn list<T>(what: &'static str, len: usize) -> Result<Vec<T>, StateError> {
    let mut list = Vec::new();
    list.try_reserve_exact(len)
        .map_err(|_| StateError::no_memory::<T>(what, len))?;
    Ok(list)
}

impl StateError {
    fn no_memory<T>(what: &'static str, len: usize) -> Self {
        let bytes = len.saturating_mul(size_of::<T>());
        StateError::NoMemory { what, bytes }
    }
}

/// Why an op cannot go on. It becomes an error of the run, never a wrong tensor.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    #[error(
        "the ticket [{0}, {1}] belongs to no run in flight; expected the ticket output of this model's \
         DiTFastAttnStep, computed in the same run"
    )]
    UnknownTicket(i64, i64),
    #[error("layer {layer} is not in the plan, which has {layers} layers")]
    NoSuchLayer { layer: usize, layers: usize },
    #[error(
        "no memory for {what} ({bytes} bytes); give the process more memory, run fewer requests at once, \
         or lower DITFASTATTN_CACHE_BYTES"
    )]
    NoMemory { what: &'static str, bytes: usize },
}
