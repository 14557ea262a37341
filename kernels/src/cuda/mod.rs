//! The same attention on CUDA devices: which kernel, which parameters, and the driver that runs them.
//!
//! The kernels are CUDA C++ in `kernels/cuda`. Nothing here needs CUDA to be installed: the driver is loaded when it is
//! first asked for.

mod buffer;
mod choose;
mod device;
mod driver;
mod flags;
mod image;
mod nvrtc;
mod params;
mod run;
mod sources;
mod variant;

pub use buffer::Buffer;
pub use choose::{Launch, Limits, Refusal, choose};
pub use device::{Device, copy};
pub use driver::{CudaError, Stream, is_available};
pub use image::MANIFEST;
pub use params::{AttentionParams, CopyParams, MaskOperand, Operand, Params};
pub use run::Failure;
pub use sources::{SOURCES, source_hash};
pub use variant::{AttentionMode, DIMS, SIMPLE_DIMS, Variant, translation_units};

/// Compiles a kernel for one compute capability with NVIDIA's run-time compiler; for tests.
#[doc(hidden)]
pub fn compile_at_run_time(variant: &Variant, arch: u32) -> Result<Vec<u8>, String> {
    nvrtc::compile(variant, arch)
}
