//! The operators on the CUDA execution provider.
//!
//! The same nodes, attributes, directives and state as on the CPU; what differs is where tensors are and that everything is
//! enqueued on ONNX Runtime's stream and nobody waits. Directives and the number of text tokens come in host memory, so no
//! decision needs the device.
//!
//! Cached tensors stay in device memory. One that turns out not to be finite is dropped when the next run begins, by which
//! time the device has said so (`Cached::is_sound`).
#![allow(unsafe_code)]

mod attention;
mod device_context;
mod reuse;
mod select;
mod share;

use ditfastattn_kernels::DType;
use ditfastattn_kernels::cuda::{CudaError, Failure};

use crate::abi::error::{Code, Error};
use crate::abi::tensor::ElementType;

/// An operator that runs on CUDA; it is made of the same attributes as on the CPU.
#[derive(Debug)]
pub(crate) struct OnCuda<K>(pub K);

/// Whether the CUDA operators stand in for those of the CPU provider: tests run them so, with a driver that emulates the
/// device, through an ONNX Runtime without CUDA.
pub(super) fn is_emulated() -> bool {
    std::env::var_os("DITFASTATTN_EMULATED_CUDA").is_some_and(|value| value == "1")
}

impl From<CudaError> for Error {
    fn from(error: CudaError) -> Self {
        let code = match error {
            CudaError::Capturing => Code::NotImplemented,
            _ => Code::RuntimeException,
        };
        Error::new(code, error.to_string())
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Cuda(error) => error.into(),
            Failure::Refusal(refusal) => Error::invalid(refusal.to_string()),
        }
    }
}

fn dtype_of(element: ElementType) -> Result<DType, Error> {
    match element {
        ElementType::F32 => Ok(DType::F32),
        ElementType::F16 => Ok(DType::F16),
        ElementType::BF16 => Ok(DType::BF16),
        other => Err(Error::invalid(format!(
            "the tensor is of type {other}, expected float, float16 or bfloat16"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capture_into_a_graph_has_a_status_of_its_own_that_says_what_to_do() {
        let error = Error::from(CudaError::Capturing);
        assert_eq!(error.code, Code::NotImplemented);
        assert!(error.message.contains("enable_cuda_graph=0"), "{error}");
        let other = Error::from(CudaError::NoDriver);
        assert_eq!(other.code, Code::RuntimeException);
    }
}
