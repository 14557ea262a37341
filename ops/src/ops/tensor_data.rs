//! The numbers of tensors: the types that layers compute in, and memory for them in the host or on a CUDA device.

use bytemuck::Zeroable;
use ditfastattn_kernels::cuda::Buffer;
use ditfastattn_kernels::{DType, Element};
use half::{bf16, f16};

use crate::abi::error::Error;
use crate::abi::tensor::{Scalar, Tensor};

use super::aligned::Aligned;

/// The numbers of a tensor, or memory for them.
#[derive(Debug)]
pub(super) enum Data {
    F32(Aligned<f32>),
    F16(Aligned<f16>),
    BF16(Aligned<bf16>),
    /// In a CUDA device's memory.
    Device(DType, Buffer),
    /// Zeros, of which nobody wants to read any.
    Zero,
}

impl Data {
    /// Bytes of the host's memory.
    pub fn bytes(&self) -> u64 {
        let bytes = match self {
            Data::F32(values) => size_of_val(&values[..]),
            Data::F16(values) => size_of_val(&values[..]),
            Data::BF16(values) => size_of_val(&values[..]),
            Data::Device(..) | Data::Zero => 0,
        };
        bytes as u64
    }
}

/// An element type of cached tensors and of the tensors that layers compute.
pub(super) trait Real: Scalar + Element + Zeroable {
    fn wrap(values: Aligned<Self>) -> Data;
    fn unwrap(data: &Data) -> Option<&[Self]>;
    fn into_inner(data: Data) -> Option<Aligned<Self>>;
    fn is_finite(self) -> bool;
}

macro_rules! real {
    ($($ty:ident $variant:ident),*) => { $(
        impl Real for $ty {
            fn wrap(values: Aligned<Self>) -> Data {
                Data::$variant(values)
            }
            fn unwrap(data: &Data) -> Option<&[Self]> {
                match data {
                    Data::$variant(values) => Some(values),
                    _ => None,
                }
            }
            fn into_inner(data: Data) -> Option<Aligned<Self>> {
                match data {
                    Data::$variant(values) => Some(values),
                    _ => None,
                }
            }
            fn is_finite(self) -> bool {
                $ty::is_finite(self)
            }
        }
    )* };
}
real!(f32 F32, f16 F16, bf16 BF16);

/// The elements of a tensor as the type the operator was registered for.
pub(super) fn values<'a, T: Real>(tensor: &Tensor<'a>, what: &str) -> Result<&'a [T], Error> {
    tensor.as_slice::<T>().ok_or_else(|| {
        Error::invalid(format!(
            "{what} is of type {}, expected {}",
            tensor.element(),
            T::ELEMENT
        ))
    })
}
