//! DiTFastAttn for ONNX Runtime: the operators of the domain `ai.ditfastattn` as a custom-operator library.
//!
//! Three layers, each knowing only the ones above it in this list:
//!
//! * [`state`] decides: which request and step a run is, what each layer does, what is kept. Safe Rust, no ONNX Runtime.
//! * [`abi`] talks to ONNX Runtime from 1.17 on. It is unsafe inside, safe to call, and knows no diffusion.
//! * [`ops`] are the five operators, made of the other two and of `ditfastattn-kernels`.
//!
//! Unsafe code is in [`abi`] (the C interface and the allocator) and in `ops::cuda` (addresses in device memory), nowhere
//! else.
#![deny(unsafe_code)]

pub mod abi;
pub mod ops;
pub mod state;
