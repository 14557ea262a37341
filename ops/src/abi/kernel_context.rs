//! One call of a kernel: its inputs, its outputs, the host's threads, the host's log.

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ditfastattn_kernels::Parallel;
use ort_sys::{OrtKernelContext, OrtLogger, OrtLoggingLevel, OrtValue};

use super::allocator;
use super::error::Error;
use super::host::{Host, UNWRITTEN, function, no_reply_error, require_reply};
use super::tensor::{DeviceTensor, Tensor, TensorMut};

/// The context of one `Compute` call. Lives only as long as the call.
#[derive(Debug)]
pub struct KernelContext<'a> {
    host: &'a Host,
    raw: *mut OrtKernelContext,
}

impl<'a> KernelContext<'a> {
    /// # Safety
    /// `raw` is the context of a `Compute` call that lasts for `'a`.
    pub(crate) unsafe fn new(host: &'a Host, raw: *mut OrtKernelContext) -> Self {
        KernelContext { host, raw }
    }

    /// How many inputs the node has, omitted trailing ones not counted.
    pub fn input_count(&self) -> Result<usize, Error> {
        let mut count = UNWRITTEN;
        // SAFETY: the context is live for `'a`.
        self.host.check(unsafe {
            function!(self.host, KernelContext_GetInputCount)(self.raw, &mut count)
        })?;
        require_reply(count, "the number of inputs")
    }

    /// How many outputs the node has.
    pub fn output_count(&self) -> Result<usize, Error> {
        let mut count = UNWRITTEN;
        // SAFETY: the context is live for `'a`.
        self.host.check(unsafe {
            function!(self.host, KernelContext_GetOutputCount)(self.raw, &mut count)
        })?;
        require_reply(count, "the number of outputs")
    }

    /// Input `index`, an error if it is missing.
    pub fn input(&self, index: usize) -> Result<Tensor<'a>, Error> {
        self.optional_input(index)?
            .ok_or_else(|| Error::graph(format!("input {index} is missing")))
    }

    /// Input `index`, `None` if it was left out.
    pub fn optional_input(&self, index: usize) -> Result<Option<Tensor<'a>>, Error> {
        let Some(value) = self.input_value(index)? else {
            return Ok(None);
        };
        // SAFETY: inputs outlive the call and are not written during it: we declare no in-place outputs. Kernels ask this way
        // for inputs in host memory only: all of the CPU provider's, and those whose port says so.
        unsafe { Tensor::new(self.host, value) }.map(Some)
    }

    /// Input `index` in the provider's memory, an error if it is missing.
    pub fn device_input(&self, index: usize) -> Result<DeviceTensor<'a>, Error> {
        self.optional_device_input(index)?
            .ok_or_else(|| Error::graph(format!("input {index} is missing")))
    }

    /// Input `index` in the provider's memory, `None` if it was left out.
    pub fn optional_device_input(&self, index: usize) -> Result<Option<DeviceTensor<'a>>, Error> {
        let Some(value) = self.input_value(index)? else {
            return Ok(None);
        };
        // SAFETY: inputs outlive the call.
        unsafe { DeviceTensor::new(self.host, value) }.map(Some)
    }

    fn input_value(&self, index: usize) -> Result<Option<*const OrtValue>, Error> {
        if index >= self.input_count()? {
            return Ok(None);
        }
        let mut value: *const OrtValue = std::ptr::null();
        // SAFETY: the context is live for `'a`.
        self.host.check(unsafe {
            function!(self.host, KernelContext_GetInput)(self.raw, index, &mut value)
        })?;
        Ok((!value.is_null()).then_some(value))
    }

    /// Allocates output `index`. Each output may be asked for once; a second time is an error of ours.
    pub fn output(&self, index: usize, dims: &[usize]) -> Result<TensorMut<'a>, Error> {
        let value = self.output_value(index, dims)?;
        // SAFETY: just allocated by the host for this call. No other slice of it exists: kernels ask once per output,
        // as the doc comment demands.
        unsafe { TensorMut::new(self.host, value) }
    }

    /// As [`KernelContext::output`], in the provider's memory.
    pub fn device_output(&self, index: usize, dims: &[usize]) -> Result<DeviceTensor<'a>, Error> {
        let value = self.output_value(index, dims)?;
        // SAFETY: just allocated by the host for this call.
        unsafe { DeviceTensor::new(self.host, value) }
    }

    fn output_value(&self, index: usize, dims: &[usize]) -> Result<*mut OrtValue, Error> {
        let dims: Vec<i64> = dims.iter().map(|&dim| dim as i64).collect();
        let mut value: *mut OrtValue = std::ptr::null_mut();
        // SAFETY: the context is live for `'a`; `dims` has `dims.len()` numbers.
        self.host.check(unsafe {
            function!(self.host, KernelContext_GetOutput)(
                self.raw,
                index,
                dims.as_ptr(),
                dims.len(),
                &mut value,
            )
        })?;
        if value.is_null() {
            return Err(no_reply_error(&format!("memory for output {index}")));
        }
        Ok(value)
    }

    /// The stream that the host wants this kernel's work on; null for the CPU provider and for the default stream.
    pub fn stream(&self) -> Result<*mut c_void, Error> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: the context is live for `'a`.
        self.host.check(unsafe {
            function!(self.host, KernelContext_GetGPUComputeStream)(self.raw, &mut stream)
        })?;
        Ok(stream)
    }

    /// Writes a line to the session's log. Failing to log is no reason to fail a run, so errors are dropped.
    pub fn warn(&self, text: &str) {
        let mut logger: *const OrtLogger = std::ptr::null();
        // SAFETY: the context is live for `'a`.
        let found = self
            .host
            .check(unsafe { function!(self.host, KernelContext_GetLogger)(self.raw, &mut logger) });
        if found.is_ok() && !logger.is_null() {
            // SAFETY: the logger belongs to the running session.
            unsafe {
                log(
                    self.host,
                    logger,
                    OrtLoggingLevel::ORT_LOGGING_LEVEL_WARNING,
                    text,
                )
            };
        }
    }
}

/// Writes a line to a log of the host.
///
/// # Safety
/// `logger` is a live logger of `host`.
pub(crate) unsafe fn log(
    host: &Host,
    logger: *const OrtLogger,
    level: OrtLoggingLevel,
    text: &str,
) {
    let text = std::ffi::CString::new(format!("ditfastattn: {}", text.replace('\0', " ")))
        .unwrap_or_default();
    // SAFETY: NUL-terminated strings; the caller vouches for the logger. `os_char` is `char` on Unix; on Windows the
    // file name is UTF-16, of which this is an empty string.
    let status = unsafe {
        function!(host, Logger_LogMessage)(
            logger,
            level,
            text.as_ptr(),
            [0 as ort_sys::os_char; 1].as_ptr(),
            0,
            c"".as_ptr(),
        )
    };
    drop(host.check(status));
}

/// What the threads of one [`Parallel::run`] share.
struct Tasks<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn std::any::Any + Send>>>,
    /// Tasks that have been called, whatever became of them.
    called: AtomicUsize,
}

/// The body that ONNX Runtime's threads call.
///
/// # Safety
/// `data` points to a [`Tasks`] that outlives the call.
unsafe extern "C" fn run_task(data: *mut c_void, index: usize) {
    // SAFETY: the caller's promise; shared by threads, hence only `&`.
    let tasks = unsafe { &*data.cast_const().cast::<Tasks<'_>>() };
    // A panic must not unwind into ONNX Runtime's C++ frames: keep it for the thread that started the loop.
    tasks.called.fetch_add(1, Ordering::Relaxed);
    let work = || {
        // Tasks of many threads take more than one operator does.
        if allocator::is_short() {
            resume_unwind(Box::new("no memory for the tasks of the thread pool"));
        }
        (tasks.task)(index);
    };
    if let Err(payload) = catch_unwind(AssertUnwindSafe(work)) {
        let mut first = tasks
            .panic
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        first.get_or_insert(payload);
    }
}

impl Parallel for KernelContext<'_> {
    /// Runs on the session's intra-op pool, which respects `intra_op_num_threads` and affinity.
    ///
    /// # Panics
    /// If a task panics, once all have run; and if the host refuses to run tasks. Both become a status.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if tasks <= 1 {
            (0..tasks).for_each(task);
            return;
        }
        let shared = Tasks {
            task,
            panic: Mutex::new(None),
            called: AtomicUsize::new(0),
        };
        // SAFETY: the call returns when all tasks have run, so `shared` outlives them; `run_task` takes it as shared
        // and never unwinds.
        let status = unsafe {
            function!(self.host, KernelContext_ParallelFor)(
                self.raw,
                run_task,
                tasks,
                0,
                std::ptr::from_ref(&shared).cast_mut().cast(),
            )
        };
        if let Some(payload) = shared
            .panic
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
        {
            resume_unwind(payload);
        }
        let all = match shared.called.into_inner() == tasks {
            true => Ok(()),
            false => Err(no_reply_error("threads for all tasks")),
        };
        if let Err(error) = self.host.check(status).and(all) {
            panic!("the thread pool of ONNX Runtime refused to run: {error}");
        }
    }
}
