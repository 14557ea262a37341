//! The CUDA driver behind plain functions. It is loaded on first use; without one every call is [`CudaError::NoDriver`].
//!
//! Everything runs in the device's primary context, which is ONNX Runtime's and PyTorch's too. It is made current for each
//! group of calls and put back afterwards, so the thread's state stays its owner's.

use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

/// What the driver, or the way to a kernel, did not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error("CUDA: the driver's library (libcuda.so.1) cannot be loaded")]
    NoDriver,
    #[error("CUDA: {call} failed: {name}: {text}")]
    Call {
        call: &'static str,
        code: u32,
        name: String,
        text: String,
    },
    #[error(
        "CUDA: the stream is being captured into a graph, which these operators do not support: they decide anew at every \
         step; turn CUDA graphs off (enable_cuda_graph=0) for rewritten models"
    )]
    Capturing,
    #[error("CUDA: no code for the kernel {kernel} on compute capability {arch}: {why}")]
    NoCode {
        kernel: String,
        arch: u32,
        why: String,
    },
}

/// Whether the driver's library is there. Says nothing of devices.
pub fn is_available() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: loads a library by name and nothing else.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// Turns a result of the driver into one of ours.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let text = |get: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = std::ptr::null();
        // SAFETY: a place for a pointer to a static string; null if the driver does not know the code.
        unsafe {
            let _ = get(result, &mut text);
            if text.is_null() {
                String::new()
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        }
    };
    Err(CudaError::Call {
        call,
        code: result as u32,
        name: text(sys::cuGetErrorName),
        text: text(sys::cuGetErrorString),
    })
}

/// Calls a function of the driver: `driver!(cuInit(0))`. Unsafe, as the function is.
macro_rules! driver {
    ($name:ident ( $($argument:expr),* $(,)? )) => {
        $crate::cuda::driver::check(stringify!($name), cudarc::driver::sys::$name($($argument),*))
    };
}
pub(super) use driver;

/// A stream of ONNX Runtime's, which this crate does not own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(pub(super) sys::CUstream);

impl Stream {
    /// # Safety
    /// `raw` is null (the default stream) or a live stream (`cudaStream_t`, `CUstream`), and stays so while the value and
    /// copies of it are used.
    pub unsafe fn from_raw(raw: *mut c_void) -> Self {
        Stream(raw.cast())
    }

    /// # Errors
    /// [`CudaError::Capturing`] if work on the stream goes into a graph instead of being done.
    pub fn refuse_capture(self) -> Result<(), CudaError> {
        let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: a live stream, a place for the answer.
        unsafe { driver!(cuStreamIsCapturing(self.0, &mut status))? };
        if status == sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            Ok(())
        } else {
            Err(CudaError::Capturing)
        }
    }
}

/// A context that is current on this thread until the value is dropped.
#[derive(Debug)]
pub(super) struct Current(());

impl Current {
    pub fn new(context: sys::CUcontext) -> Result<Self, CudaError> {
        // SAFETY: contexts here are primary ones, retained for ever.
        unsafe { driver!(cuCtxPushCurrent_v2(context))? };
        Ok(Current(()))
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: pops what `new` pushed; a failure at the end of the process is nobody's concern.
        unsafe {
            let _ = sys::cuCtxPopCurrent_v2(&mut context);
        }
    }
}

/// A moment in a stream. Without timing, so it costs next to nothing.
#[derive(Debug)]
pub(super) struct Event(sys::CUevent);

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Needs a current context.
    pub fn new() -> Result<Self, CudaError> {
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: a place for the answer.
        unsafe { driver!(cuEventCreate(&mut event, flags))? };
        Ok(Event(event))
    }

    /// The moment is when everything on `stream` so far is done.
    pub fn record(&self, stream: Stream) -> Result<(), CudaError> {
        // SAFETY: a live event; the stream was promised to be live.
        unsafe { driver!(cuEventRecord(self.0, stream.0)) }
    }

    /// What comes next on `stream` waits for the moment. Done at once if nothing was recorded.
    pub fn delay(&self, stream: Stream) -> Result<(), CudaError> {
        // SAFETY: as above.
        unsafe { driver!(cuStreamWaitEvent(stream.0, self.0, 0)) }
    }

    /// Whether the moment has come.
    pub fn is_past(&self) -> bool {
        // SAFETY: a live event.
        unsafe { sys::cuEventQuery(self.0) == CUresult::CUDA_SUCCESS }
    }

    /// Waits for the moment.
    pub fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: a live event.
        unsafe { driver!(cuEventSynchronize(self.0)) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; the driver defers it until the moment has come.
        unsafe {
            let _ = sys::cuEventDestroy_v2(self.0);
        }
    }
}

/// The name of a kernel as the driver wants it.
pub(super) fn c_name(name: &str) -> CString {
    CString::new(name).unwrap_or_default()
}
