//! Whether a run without a request id continues the generation that was seen last, and which one if not that.
//!
//! Anonymous clients share one slot, which has the caches. A run is served from it only if everything that can be seen
//! speaks for the same generation: the same conditioning byte for byte, latents that continue the last ones, and no other
//! unfinished generation that they might continue instead. In doubt the answer is no: that costs speed, and a wrong yes
//! would mix two images. Generations that are not in the slot are remembered as pending, to be told from it.
//!
//! What goes on and what is taken up again, and why that is safe:
//!
//! * **A foreign run leaves the slot alone.** One whose conditioning or latents are not the slot's is computed densely and
//!   becomes a pending one. The slot is where it was, and serves only the run that is due there, by its place in the plan: a
//!   generation that went on under another guise has another place by then. Where places are uncertain (no list of
//!   timesteps) the slot survives only what differs in both.
//! * **A run that may be the slot's or another's contests it.** The caches are dropped.
//! * **Computing in full is always safe**, so what [`Origin`] says decides about speed only: a run that clearly continues a
//!   known generation is computed in full and captures anew what later steps read; the slot is that generation's from then
//!   on, with nothing in it but what this run made. If it was taken for another's, that other one's next run comes at a
//!   place that the slot has passed, and is not served. A pending generation takes the slot only when the slot's own
//!   generation has not come by since that one did.
//! * **A timestep that is evaluated twice** (Heun) leaves the slot at the same place, so the argument above does not hold:
//!   of two clients that are a hair apart one could take the other's place. It is taken for the slot's own generation only
//!   if that began at the plan's first step, no other known generation is anywhere near, and the latents have moved far
//!   less than in a step.
//! * **A run at the step of another generation's last one** may be that one sent again, or a twin's: it is an obstacle to
//!   serving and never an origin. Finished generations are remembered for that too. A pending one is forgotten when something
//!   continues it only where nothing else is near; otherwise it stays, and is no obstacle to what came from it.
//! * **Generations that were fed the same bytes since they began are one**: their caches are equal. Whether they were is
//!   known by a digest of everything that each run was fed.
//!
//! The state is a session's, so nothing here needs to tell sessions apart: initializers that session options override, other
//! weights and other models are other sessions. Inputs that cannot be read (strings) equal nothing, themselves included.
//!
//! | module | owns |
//! |---|---|
//! | `feed` | tensors as they are fed |
//! | `digest` | whether two are the same, byte for byte |
//! | `latents` | how far apart latents are |
//! | `run_signature` | what one run shows |
//! | `schedule_inputs` | inputs that move with the steps |
//! | `pending` | where one unfinished generation stands |
//! | `tracker` | what is remembered: the generation in the slot, and those that are pending |
//! | `matching` | which of them a run may be of |

mod digest;
mod feed;
mod latents;
mod matching;
mod pending;
mod run_signature;
mod schedule_inputs;
#[cfg(test)]
mod tests;
mod tracker;

pub use self::feed::{Feed, Values};
pub use self::latents::LatentSample;
pub(super) use self::pending::Origin;
pub use self::run_signature::{InputDigest, RunSignature};
pub(super) use self::tracker::ContinuityTracker;
