//! Calls on a device: attention and checked copies.

use std::ffi::c_void;
use std::ptr::null_mut;

use crate::api::Attention;
use crate::tensor::DType;

use super::choose::{Launch, Limits, Refusal, choose};
use super::device::Device;
use super::driver::{CudaError, Stream};
use super::params::CopyParams;
use super::variant::Variant;

/// Why a call was not made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error(transparent)]
    Refusal(#[from] Refusal),
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

impl Device {
    /// [`attention`](crate::attention) on this device, in the order of `stream`. `non_finite` as in [`choose`].
    ///
    /// # Errors
    /// If the call makes no sense, or cannot be launched.
    ///
    /// # Safety
    /// The tensors are in this device's memory; what [`Input::from_raw`](crate::Input::from_raw) and its like demand holds
    /// for the device from now until the stream has come past the call. `non_finite` is writable for it as long.
    pub unsafe fn attention(
        &self,
        stream: Stream,
        a: &Attention<'_>,
        non_finite: *mut u32,
    ) -> Result<(), Failure> {
        let Some(launch) = choose(a, &self.limits, non_finite)? else {
            return Ok(());
        };
        // SAFETY: the caller's promise; `choose` has made the parameters for this kernel.
        let first = unsafe { self.run(stream, &launch) };
        let Err(CudaError::NoCode { .. }) = first else {
            return Ok(first?);
        };
        // A head dimension that nothing was compiled for, and no compiler: the plain cores can do it.
        let plain = Limits {
            tensor_cores: false,
            ..self.limits
        };
        match choose(a, &plain, non_finite)? {
            Some(other) if other.variant != launch.variant => {
                // SAFETY: as above.
                Ok(unsafe { self.run(stream, &other) }?)
            }
            _ => Ok(first?),
        }
    }

    /// # Safety
    /// As [`Device::attention`].
    unsafe fn run(&self, stream: Stream, launch: &Launch) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.launch(stream, &launch.variant, launch.blocks, &launch.params) }
    }

    /// Copies `count` elements to each of `to` that is not null, in one pass; sets `non_finite`, if it is not null, should
    /// one of them not be finite.
    ///
    /// # Errors
    /// If it cannot be launched.
    ///
    /// # Safety
    /// All places have `count` elements of this device's memory and do not overlap; they are live until the stream has come
    /// past the copy, and ordered against other uses.
    pub unsafe fn spread(
        &self,
        stream: Stream,
        dtype: DType,
        from: *const c_void,
        to: [*mut c_void; 3],
        count: usize,
        non_finite: Option<*mut u32>,
    ) -> Result<(), CudaError> {
        if count == 0 {
            return Ok(());
        }
        let params = CopyParams {
            from,
            to,
            count: count as u64,
            non_finite: non_finite.unwrap_or(null_mut()),
        };
        let blocks = self.blocks_for((count * dtype.size()).div_ceil(16) as u64);
        // SAFETY: the caller's promise.
        unsafe { self.launch(stream, &Variant::Copy { dtype }, blocks, &params) }
    }
}
