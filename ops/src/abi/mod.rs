//! A thin, safe layer over ONNX Runtime's C interface for custom operators.
//!
//! All that is unsafe about that interface is here, and so is the allocator. The layer knows nothing of diffusion, and of
//! the kernels only what a thread pool is to them. Operators implement [`op::Kernel`], get their node as
//! [`kernel_info::KernelInfo`] and each call as [`kernel_context::KernelContext`], and return errors or panic as they like;
//! nothing unwinds into the host.
#![allow(unsafe_code)]

pub(crate) mod allocator;
pub mod error;
pub mod exports;
pub mod host;
pub mod kernel_context;
pub mod kernel_info;
pub mod library;
pub mod op;
mod preallocated_status;
pub mod status;
pub mod tensor;
