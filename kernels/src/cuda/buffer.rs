//! Device memory for cached tensors, correct whichever streams write and read it.
//!
//! All uses of one buffer are ordered by one event: a use waits for the use before it, then is recorded itself. Freeing is
//! a use too, on a stream of the device's own, so memory goes back when the last reader is done and nobody waits for that.

use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

use super::device::{Device, retire};
use super::driver::{CudaError, Current, Event, Stream, driver};
use super::flags::Word;

/// Memory on one device.
#[derive(Debug)]
pub struct Buffer {
    device: &'static Device,
    address: u64,
    bytes: usize,
    /// The last use so far. `None` only while it is dropped.
    last_use: Mutex<Option<Event>>,
    word: Word,
}

impl Buffer {
    /// Memory for `bytes` bytes, contents undefined; `None` if the device has none to spare or cannot allocate in stream
    /// order. A cache that is not there costs time only, so nobody wants to know why.
    pub fn allocate(device: &'static Device, stream: Stream, bytes: usize) -> Option<Buffer> {
        let pool = device.pool?;
        let _current = Current::new(device.context).ok()?;
        let event = Event::new().ok()?;
        let word = lock(&device.flags).take().ok()?;
        let mut address = 0;
        // SAFETY: a place for the answer, a live pool and stream.
        let allocated = unsafe {
            driver!(cuMemAllocFromPoolAsync(
                &mut address,
                bytes.max(1),
                pool,
                stream.0
            ))
        };
        let recorded = event.record(stream);
        if allocated.is_err() {
            lock(&device.flags).give_back(word, event);
            return None;
        }
        let buffer = Buffer {
            device,
            address,
            bytes,
            last_use: Mutex::new(Some(event)),
            word,
        };
        recorded.is_ok().then_some(buffer)
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The word that kernels set if what they write here is not finite.
    pub fn non_finite(&self) -> *mut u32 {
        self.word.address()
    }

    /// Whether what was written is finite. Waits for the writer, which is normally done: its run has ended.
    pub fn is_finite(&self) -> bool {
        let current = Current::new(self.device.context);
        let last_use = lock(&self.last_use);
        let done = last_use.as_ref().is_some_and(|event| event.wait().is_ok());
        current.is_ok() && done && !self.word.is_set()
    }

    /// Uses the memory on `stream`: what `enqueue` puts there comes after every earlier use, and before every later one.
    ///
    /// # Errors
    /// Those of `enqueue` and of the driver.
    pub fn on<R, E: From<CudaError>>(
        &self,
        stream: Stream,
        enqueue: impl FnOnce(*mut c_void) -> Result<R, E>,
    ) -> Result<R, E> {
        let _current = Current::new(self.device.context)?;
        let last_use = lock(&self.last_use);
        let event = last_use.as_ref().ok_or(CudaError::NoDriver)?;
        event.delay(stream)?;
        let result = enqueue(self.address as *mut c_void);
        // Even what failed may have enqueued something.
        event.record(stream)?;
        result
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let event = lock(&self.last_use).take();
        let (Ok(_current), Some(event)) = (Current::new(self.device.context), event) else {
            return;
        };
        // If the driver does not order the release, the memory is leaked rather than freed under a reader.
        if retire(self.device, &event).is_ok() {
            // SAFETY: allocated from the pool, freed once, after its last use in the order of the stream.
            unsafe {
                let _ = driver!(cuMemFreeAsync(self.address, self.device.reaper.0));
            }
        }
        lock(&self.device.flags).give_back(self.word, event);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
