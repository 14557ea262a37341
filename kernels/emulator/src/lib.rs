//! Runs the CUDA kernels on a CPU, for tests on machines without a GPU.
//!
//! The kernels' own sources are compiled as plain C++ with the emulator in `kernels/cuda/emulator`: into a program under
//! AddressSanitizer and UndefinedBehaviorSanitizer ([`Process`]), and into a `libcuda.so.1` that stands in for the driver
//! ([`Sources::driver`]). Needs a C++ compiler: `$CXX`, or `c++`.

mod build;
mod process;

pub use build::{Sources, image_folder};
pub use process::{Buffer, Process};
