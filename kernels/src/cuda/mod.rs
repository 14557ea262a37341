//! The same attention on CUDA devices: which kernel, which parameters, and the driver that runs them.
//!
//! The kernels are CUDA C++ in `kernels/cuda`. Nothing here needs CUDA to be installed: the driver is loaded when it is
//! first asked for.

mod choose;
mod params;
mod variant;

pub use choose::{Launch, Limits, Refusal, choose};
pub use params::{AttentionParams, CopyParams, EvidenceParams, MaskOperand, Operand, Params};
pub use variant::{DIMS, Job, SIMPLE_DIMS, Variant};
