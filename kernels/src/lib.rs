//! Attention kernels for DiTFastAttn on raw tensors: full, full with capture of the residual, and window attention.
//!
//! Knows nothing of ONNX, ONNX Runtime or plans.

mod api;
mod check;
mod cpu;
mod error;
pub mod oracle;
mod parallel;

pub use api::{Attention, Band, DType, Element, Input, Mode, Output, Shape, Strides};
#[doc(hidden)]
pub use cpu::Level;
pub use error::KernelError;
pub use parallel::{Parallel, Sequential, Threads};

/// Computes one attention call; see [`Mode`] for what is written where.
///
/// Empty tensors are fine: without keys the output is zero, without queries nothing happens. The result does not
/// depend on `pool`, bit for bit.
///
/// # Errors
/// [`KernelError`] if shapes, strides and band do not fit together; nothing is written then.
pub fn attention(a: &Attention<'_>, pool: &dyn Parallel) -> Result<(), KernelError> {
    check::check(a)?;
    cpu::attention(a, pool, cpu::Level::best());
    Ok(())
}

/// [`attention`] at a given instruction set, which must be [available](Level::available); for tests and benchmarks.
#[doc(hidden)]
pub fn attention_at(
    a: &Attention<'_>,
    pool: &dyn Parallel,
    level: Level,
) -> Result<(), KernelError> {
    check::check(a)?;
    cpu::attention(a, pool, level);
    Ok(())
}
