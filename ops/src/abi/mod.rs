//! A thin, safe layer over ONNX Runtime's C interface for custom operators.
//!
//! Everything unsafe of this crate is here. The layer knows nothing of diffusion: kernels implement
//! [`op::Kernel`], get their node as [`info::Info`] and each call as [`context::Context`], and return errors or
//! panic as they like; nothing unwinds into the host.
#![allow(unsafe_code)]

pub mod context;
pub mod exports;
pub mod host;
pub mod info;
mod last_resort;
pub mod library;
pub(crate) mod memory;
pub mod op;
pub mod status;
pub mod tensor;
