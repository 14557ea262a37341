//! Running models: what search, studies and comparisons need of ONNX Runtime.
//!
//! | module | owns |
//! |---|---|
//! | `array` | numbers from `.npz` files |
//! | `host` | where ONNX Runtime and the op library are |
//! | `cut` | where a model is cut so that a run can begin at any layer |
//! | `engine` | the cut model: any action in any layer, from any layer on |
//! | `group` | the runs that make up one step, and what they hand to each other |
//! | `scheduler` | diffusion schedulers |
//! | `feed` | what the model is fed at each step: a recording, or a scheduler's own loop |
//! | `random` | inputs of the model's shapes, where nobody has real ones |
//! | `trials` | the search's view of all that (`Denoiser`) |
//! | `study` | how similar attention is between steps and halves |
//! | `whole` | a model in one session, as it is served |
//! | `text` | text tokens, found by running |
//! | `tokens` | text as found and as used: what to make of it |
//! | `distance` | how far two results are apart |
//! | `verify` | the rewritten model beside the original |
//! | `dense` | who is faster at a dense step, the op library or the host |
//! | `prepare` | from files to a model that is ready to run |
//!
//! Nothing here finds attention or changes a model.

pub mod array;
mod cut;
pub mod dense;
pub mod distance;
pub mod engine;
pub mod feed;
mod group;
pub mod host;
pub mod prepare;
mod random;
pub mod scheduler;
pub mod study;
pub mod text;
mod tokens;
pub mod trials;
pub mod verify;
mod whole;
