//! Cached tensors, in the host's memory or a CUDA device's.

use std::sync::Arc;

use ditfastattn_kernels::DType;
use ditfastattn_kernels::cuda::{Buffer, Device, Stream};

use crate::abi::allocator;
use crate::state::{Cached, Lease, Rows, Run};

use super::aligned::Aligned;
use super::buffer_pool;
use super::tensor_data::{Data, Real};

/// A cached tensor: a cheap handle on immutable numbers.
pub type CachedTensor = Arc<CacheEntry>;

impl Cached for CachedTensor {
    fn is_sound(&self) -> bool {
        match &self.data {
            Data::Device(_, buffer) => buffer.is_finite(),
            // Looked at before they were stored.
            Data::F32(_) | Data::F16(_) | Data::BF16(_) | Data::Zero => true,
        }
    }
}

/// The numbers, their shape, and the part of the budget that they hold.
#[derive(Debug)]
pub struct CacheEntry {
    dims: Vec<usize>,
    /// `Half`: the rows of one half of guidance, which stand for those of the other half too.
    rows: Rows,
    data: Data,
    /// `None` only while it is dropped.
    lease: Option<Lease>,
}

impl CacheEntry {
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    pub fn rows(&self) -> Rows {
        self.rows
    }

    /// The numbers, if they are of type `T`.
    pub(super) fn values<T: Real>(&self) -> Option<&[T]> {
        T::unwrap(&self.data)
    }

    /// The numbers in device memory, if they are there and of type `dtype`.
    pub(super) fn on_device(&self, dtype: DType) -> Option<&Buffer> {
        match &self.data {
            Data::Device(stored, buffer) if *stored == dtype => Some(buffer),
            _ => None,
        }
    }
}

/// Memory for a tensor that a run wants to keep; `None` if the budget or the machine has none.
pub(super) fn allocate<T: Real>(
    run: &Run<CachedTensor>,
    len: usize,
) -> Option<UninitCacheEntry<T>> {
    let lease = run.reserve(len.checked_mul(size_of::<T>())?)?;
    if let Some(values) = buffer_pool::acquire(len) {
        return Some(UninitCacheEntry { values, lease });
    }
    // The tensor is only a cache: where the system has no memory for it, the layer goes without.
    let values = Aligned::new(len)?;
    if allocator::is_reserved(&values) {
        return None;
    }
    Some(UninitCacheEntry { values, lease })
}

/// Device memory for a tensor that a run wants to keep; `None` if the budget or the device has none.
pub(super) fn allocate_on_device(
    run: &Run<CachedTensor>,
    device: &'static Device,
    stream: Stream,
    bytes: usize,
) -> Option<UninitDeviceEntry> {
    let lease = run.reserve(bytes)?;
    let buffer = Buffer::allocate(device, stream, bytes)?;
    Some(UninitDeviceEntry { buffer, lease })
}

/// Device memory for a cached tensor that is still being written.
pub(super) struct UninitDeviceEntry {
    pub buffer: Buffer,
    lease: Lease,
}

impl UninitDeviceEntry {
    /// The tensor, whose writing has been enqueued.
    pub fn store(self, dtype: DType, dims: &[usize], rows: Rows) -> CachedTensor {
        debug_assert_eq!(
            self.buffer.bytes(),
            dims.iter().product::<usize>() * dtype.size()
        );
        Arc::new(CacheEntry {
            dims: dims.to_vec(),
            rows,
            data: Data::Device(dtype, self.buffer),
            lease: Some(self.lease),
        })
    }
}

impl Drop for CacheEntry {
    fn drop(&mut self) {
        let mut data = std::mem::replace(&mut self.data, Data::Zero);
        if matches!(data, Data::Device(..)) {
            // It goes back to the device's pool before its part of the budget does.
            data = Data::Zero;
        }
        buffer_pool::release(data, self.lease.take());
    }
}

/// Stands for a residual that is known to be zero, and takes no memory; `None` if the run may not keep anything.
pub(super) fn zero_entry(run: &Run<CachedTensor>, rows: Rows) -> Option<CachedTensor> {
    Some(Arc::new(CacheEntry {
        dims: Vec::new(),
        rows,
        data: Data::Zero,
        lease: Some(run.reserve(0)?),
    }))
}

/// Memory for a cached tensor that is still being written.
pub(super) struct UninitCacheEntry<T> {
    /// As long as the tensor; what is in it is left from earlier.
    pub values: Aligned<T>,
    lease: Lease,
}

impl<T: Real> UninitCacheEntry<T> {
    /// The finished tensor. The caller has written all of `values`, as many numbers as `dims` say.
    pub fn store(self, dims: &[usize], rows: Rows) -> CachedTensor {
        debug_assert_eq!(self.values.len(), dims.iter().product::<usize>());
        Arc::new(CacheEntry {
            dims: dims.to_vec(),
            rows,
            data: T::wrap(self.values),
            lease: Some(self.lease),
        })
    }
}
