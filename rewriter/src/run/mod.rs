//! Running models: what search, studies and comparisons need of ONNX Runtime.
//!
//! | module | owns |
//! |---|---|
//! | `array` | numbers from `.npz` files |
//! | `host` | where ONNX Runtime and the op library are |
//! | `cut` | where a model is cut so that a run can begin at any layer |
//! | `engine` | the cut model: any action in any layer, from any layer on |
//! | `scheduler` | diffusion schedulers |
//! | `feed` | what the model is fed at each step: a recording, or a scheduler's own loop |
//! | `trials` | the search's view of all that (`Denoiser`) |
//! | `study` | how similar attention is between steps and halves |
//! | `prepare` | from files to a model that is ready to run |
//!
//! Nothing here finds attention or changes a model.

pub mod array;
mod cut;
pub mod engine;
pub mod feed;
pub mod host;
pub mod prepare;
pub mod scheduler;
pub mod study;
pub mod trials;
