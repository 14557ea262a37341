//! Everything that depends on the instruction set or the machine: detection, dispatch, tuning, intrinsics.
//!
//! | file | owns |
//! |---|---|
//! | `names` | the instruction sets by name |
//! | `dispatch` | which of them the machine has; running code with one |
//! | `select` | which one calls use; the variables that force another |
//! | `tuning` | what there is to tune, and the measurements |
//! | `kernels` | the table of matrix kernels: tile shape, packing, precision |
//! | `tile_shape`, `precision`, `exp2`, `vector` | what all instruction sets share |
//! | `backend` | what an architecture must and may provide |
//! | `x86`, `aarch64`, `portable` | the architectures: intrinsics and rows of the tuning table |
//!
//! A new instruction set is a name, an arm of [`Backend::run`], a row of a tuning table, and a file below its architecture
//! with whatever it overrides. Nothing else in the crate names an instruction set.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod backend;
mod dispatch;
mod exp2;
mod kernels;
mod names;
mod native;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod portable;
mod precision;
mod select;
mod tile_shape;
mod tuning;
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use backend::{Backend, RegisterEpilogue};
pub(crate) use exp2::COEFFICIENTS as EXP2_COEFFICIENTS;
pub use kernels::{MatrixKernel, kernels};
pub use names::Isa;
pub(crate) use native::Native;
pub(crate) use precision::{DotArithmetic, Float32};
pub(crate) use select::tuning;
pub(crate) use tile_shape::{MAX_NR, MR, MR_SINGLE, block_m};
pub(crate) use tuning::{MAX_TASKS, TaskPacking, Tuning};
pub(crate) use vector::{load, mul_add, store};
