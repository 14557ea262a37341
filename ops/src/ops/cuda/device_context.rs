//! The device and the stream of one call, and what is done there with whole tensors.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::Arc;

use ditfastattn_kernels::DType;
use ditfastattn_kernels::cuda::{self, Device, Stream};

use crate::abi::error::Error;
use crate::abi::kernel_context::KernelContext;
use crate::state::{Directive, Rows, Run};

use super::super::cache_entry::{CachedTensor, allocate_on_device};

/// A device and ONNX Runtime's stream on it.
#[derive(Clone, Copy)]
pub(super) struct DeviceContext {
    pub device: &'static Device,
    pub stream: Stream,
}

/// A contiguous tensor, or a part of one, in the device's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceSlice {
    pub address: *mut u8,
    pub dtype: DType,
    /// Elements.
    pub len: usize,
}

impl DeviceSlice {
    /// The part from element `start` on, `len` elements long.
    ///
    /// # Panics
    /// If it is not inside.
    pub fn part(self, start: usize, len: usize) -> DeviceSlice {
        assert!(start <= self.len && len <= self.len - start);
        DeviceSlice {
            address: self.address.wrapping_add(start * self.dtype.size()),
            len,
            ..self
        }
    }

    pub fn bytes(self) -> usize {
        self.len * self.dtype.size()
    }

    /// Both halves, that of the conditional rows first.
    pub fn halves(self, conditional_first: bool) -> [DeviceSlice; 2] {
        let half = self.len / 2;
        let (first, second) = (self.part(0, half), self.part(half, half));
        if conditional_first {
            [first, second]
        } else {
            [second, first]
        }
    }
}

impl DeviceContext {
    /// # Errors
    /// If the stream is being captured into a graph, or its device cannot be used.
    pub fn of(context: &KernelContext<'_>) -> Result<DeviceContext, Error> {
        // SAFETY: ONNX Runtime's stream lives longer than the call.
        let stream = unsafe { Stream::from_raw(context.stream()?) };
        let device = Device::of(stream)?;
        stream.refuse_capture()?;
        Ok(DeviceContext { device, stream })
    }

    /// `to` becomes a copy of `from`, once the stream gets there.
    ///
    /// # Safety
    /// Both are live in ONNX Runtime's or a buffer's memory until then, ordered against other uses, and do not overlap.
    pub unsafe fn copy(&self, from: DeviceSlice, to: DeviceSlice) -> Result<(), Error> {
        if from.len != to.len || from.dtype != to.dtype {
            return Err(Error::invalid(format!(
                "a copy of {} elements of {:?} to {} of {:?}",
                from.len, from.dtype, to.len, to.dtype
            )));
        }
        // SAFETY: the caller's promise; the sizes are equal.
        Ok(unsafe {
            cuda::copy(
                self.stream,
                from.address.cast(),
                to.address.cast(),
                from.bytes(),
            )
        }?)
    }

    /// Copies what a layer computed to `to`, and keeps a copy of it if the directive asks for one and it can be had; all in one
    /// pass over `computed`, which has shape `dims`.
    ///
    /// # Safety
    /// As [`DeviceContext::copy`]; there are at most two targets, each as long as `computed`.
    pub unsafe fn spread(
        &self,
        run: Option<&Arc<Run<CachedTensor>>>,
        directive: Directive,
        computed: DeviceSlice,
        to: &[DeviceSlice],
        dims: &[usize],
    ) -> Result<Option<CachedTensor>, Error> {
        let entry = run
            .filter(|_| directive.keep)
            .and_then(|run| allocate_on_device(run, self.device, self.stream, computed.bytes()));
        let mut targets: [*mut c_void; 3] = [null_mut(); 3];
        for (target, slice) in targets[1..].iter_mut().zip(to) {
            assert_eq!(slice.len, computed.len);
            *target = slice.address.cast();
        }
        let Some(entry) = entry else {
            for slice in to {
                // SAFETY: the caller's promise.
                unsafe { self.copy(computed, *slice)? };
            }
            return Ok(None);
        };
        let flag = entry.buffer.non_finite();
        entry.buffer.on(self.stream, |address| {
            targets[0] = address;
            // SAFETY: the caller's promise; the buffer is as long as `computed`, and its uses are ordered.
            unsafe {
                self.device.spread(
                    self.stream,
                    computed.dtype,
                    computed.address.cast(),
                    targets,
                    computed.len,
                    Some(flag),
                )
            }
        })?;
        Ok(Some(entry.store(computed.dtype, dims, directive.rows)))
    }

    /// Writes a kept output to all rows; `None` if it is not here or of another type.
    ///
    /// # Safety
    /// `to` is live until the stream has come past, ordered against other uses, and has as many elements as all rows of the
    /// kept output.
    pub unsafe fn read_cached(
        &self,
        kept: &CachedTensor,
        to: DeviceSlice,
    ) -> Result<Option<()>, Error> {
        let Some(buffer) = kept.on_device(to.dtype) else {
            return Ok(None);
        };
        buffer.on(self.stream, |address| {
            let from = DeviceSlice {
                address: address.cast(),
                dtype: to.dtype,
                len: buffer.bytes() / to.dtype.size(),
            };
            let targets: &[DeviceSlice] = match kept.rows() {
                Rows::All => &[to],
                Rows::Half => &to.halves(true),
            };
            for target in targets {
                // SAFETY: the caller's promise; the buffer's uses are ordered.
                unsafe { self.copy(from, *target)? };
            }
            Ok::<(), Error>(())
        })?;
        Ok(Some(()))
    }
}
