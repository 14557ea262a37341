//! What a node says about itself when its kernel is made: name, attributes, counts.

use std::cell::OnceCell;
use std::ffi::CString;

use ort_sys::{OrtKernelInfo, OrtLogger, OrtLoggingLevel};

use super::error::{Code, Error};
use super::host::{Host, UNWRITTEN, function, no_reply_error, require_reply};
use super::kernel_context::log;

/// What the host says of its own memory.
const BAD_ALLOC: &str = "bad_alloc";

/// What no attribute is, to see whether the host wrote one.
const NO_INT: i64 = i64::MIN + 0x5eed;
const NO_FLOAT: f32 = f32::MIN;

/// The node a kernel is made for. Lives only as long as the creation.
#[derive(Debug)]
pub struct KernelInfo<'a> {
    host: &'a Host,
    raw: *const OrtKernelInfo,
    /// Why the host may not have require_reply, once: what was taken for left out may be there.
    unreliable: OnceCell<Error>,
}

impl<'a> KernelInfo<'a> {
    /// # Safety
    /// `raw` is the info of a kernel creation that lasts for `'a`.
    pub(crate) unsafe fn new(host: &'a Host, raw: *const OrtKernelInfo) -> Self {
        KernelInfo {
            host,
            raw,
            unreliable: OnceCell::new(),
        }
    }

    /// Whether what was read can be relied on. To be asked when all was.
    pub(crate) fn settle(&self) -> Result<(), Error> {
        self.unreliable.get().cloned().map_or(Ok(()), Err)
    }

    fn mark_unreliable(&self, error: Error) {
        // The first says it all.
        let _ = self.unreliable.set(error);
    }

    /// Whether there is an answer. An error means that there is no such attribute, unless it is about memory.
    fn found<T>(&self, answer: Result<T, Error>) -> Option<T> {
        answer
            .map_err(|error| {
                if error.message.contains(BAD_ALLOC) {
                    self.mark_unreliable(error);
                }
            })
            .ok()
    }

    /// `value`, unless the host has left it as it was.
    fn written<T: PartialEq>(&self, value: T, before: T) -> Option<T> {
        if value == before {
            self.mark_unreliable(no_reply_error("an attribute"));
            return None;
        }
        Some(value)
    }

    /// The node's name, empty if it has none or the host does not say.
    pub fn node_name(&self) -> String {
        self.text(|out, size| {
            // SAFETY: a live info; `out` is null or has `*size` bytes.
            unsafe { function!(self.host, KernelInfo_GetNodeName)(self.raw, out, size) }
        })
        .unwrap_or_default()
    }

    /// How many inputs the node has; skipped ones in the middle count.
    pub fn input_count(&self) -> Result<usize, Error> {
        let mut count = UNWRITTEN;
        // SAFETY: a live info.
        self.host.check(unsafe {
            function!(self.host, KernelInfo_GetInputCount)(self.raw, &mut count)
        })?;
        require_reply(count, "the number of inputs")
    }

    /// How many outputs the node has.
    pub fn output_count(&self) -> Result<usize, Error> {
        let mut count = UNWRITTEN;
        // SAFETY: a live info.
        self.host.check(unsafe {
            function!(self.host, KernelInfo_GetOutputCount)(self.raw, &mut count)
        })?;
        require_reply(count, "the number of outputs")
    }

    /// Whether input `index` is there and not skipped.
    pub fn has_input(&self, index: usize) -> Result<bool, Error> {
        if index >= self.input_count()? {
            return Ok(false);
        }
        let name = self.text(|out, size| {
            // SAFETY: a live info; `out` is null or has `*size` bytes.
            unsafe { function!(self.host, KernelInfo_GetInputName)(self.raw, index, out, size) }
        })?;
        Ok(!name.is_empty())
    }

    /// An integer attribute; `None` if the node does not have it. (The host does not tell "absent" from "of another
    /// type", so neither can we.)
    pub fn int(&self, name: &str) -> Option<i64> {
        let name = CString::new(name).ok()?;
        let mut value = NO_INT;
        // SAFETY: a live info, a NUL-terminated name, a place for the answer.
        let status = unsafe {
            function!(self.host, KernelInfoGetAttribute_int64)(self.raw, name.as_ptr(), &mut value)
        };
        self.found(self.host.check(status))?;
        self.written(value, NO_INT)
    }

    /// A float attribute; see [`KernelInfo::int`].
    pub fn float(&self, name: &str) -> Option<f32> {
        let name = CString::new(name).ok()?;
        let mut value = NO_FLOAT;
        // SAFETY: as in `int`.
        let status = unsafe {
            function!(self.host, KernelInfoGetAttribute_float)(self.raw, name.as_ptr(), &mut value)
        };
        self.found(self.host.check(status))?;
        self.written(value, NO_FLOAT)
    }

    /// A string attribute; see [`KernelInfo::int`].
    pub fn string(&self, name: &str) -> Option<String> {
        let name = CString::new(name).ok()?;
        let text = self.text(|out, size| {
            // SAFETY: as in `int`; `out` is null or has `*size` bytes.
            unsafe {
                function!(self.host, KernelInfoGetAttribute_string)(
                    self.raw,
                    name.as_ptr(),
                    out,
                    size,
                )
            }
        });
        self.found(text)
    }

    /// A list of integers; see [`KernelInfo::int`].
    pub fn ints(&self, name: &str) -> Option<Vec<i64>> {
        let name = CString::new(name).ok()?;
        let get = function!(self.host, KernelInfoGetAttributeArray_int64);
        let mut len = UNWRITTEN;
        // SAFETY: as in `int`; a null buffer asks for the length.
        let status = unsafe { get(self.raw, name.as_ptr(), std::ptr::null_mut(), &mut len) };
        self.found(self.host.check(status))?;
        let mut values = vec![NO_INT; self.written(len, UNWRITTEN)?];
        if len > 0 {
            // SAFETY: room for `len` numbers.
            let status = unsafe { get(self.raw, name.as_ptr(), values.as_mut_ptr(), &mut len) };
            self.found(self.host.check(status))?;
            self.written(values[0], NO_INT)?;
        }
        Some(values)
    }

    /// The session's log.
    pub fn logger(&self) -> Option<Logger> {
        let mut raw: *const OrtLogger = std::ptr::null();
        // SAFETY: a live info.
        let status = unsafe { function!(self.host, KernelInfo_GetLogger)(self.raw, &mut raw) };
        self.host.check(status).ok()?;
        (!raw.is_null()).then_some(Logger {
            host: *self.host,
            raw,
        })
    }

    /// Reads a string that the host copies out in two calls: its length, then its bytes with a final NUL.
    fn text(
        &self,
        get: impl Fn(*mut std::ffi::c_char, *mut usize) -> ort_sys::OrtStatusPtr,
    ) -> Result<String, Error> {
        let mut size = UNWRITTEN;
        self.host.check(get(std::ptr::null_mut(), &mut size))?;
        if self.written(size, UNWRITTEN).is_none() {
            return Err(no_reply_error("a text"));
        }
        let mut bytes = Vec::new();
        // A plan may be long.
        bytes.try_reserve_exact(size).map_err(|_| {
            let error = Error::new(
                Code::Fail,
                format!("no memory for an attribute of {size} bytes"),
            );
            self.mark_unreliable(error.clone());
            error
        })?;
        bytes.resize(size, 0u8);
        if size == 0 {
            return Ok(String::new());
        }
        bytes[size - 1] = 1;
        self.host.check(get(bytes.as_mut_ptr().cast(), &mut size))?;
        // The NUL at the end comes last.
        if self.written(bytes[bytes.len() - 1], 1).is_none() {
            return Err(no_reply_error("a text"));
        }
        bytes.truncate(size.saturating_sub(1));
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }
}

/// The log of a session, kept by a kernel.
#[derive(Debug)]
pub struct Logger {
    host: Host,
    raw: *const OrtLogger,
}

// SAFETY: ONNX Runtime's loggers are thread-safe; the pointer is only passed back to the host.
unsafe impl Send for Logger {}
// SAFETY: as above.
unsafe impl Sync for Logger {}

impl Logger {
    /// Writes a line at the level "info".
    ///
    /// Kernels own their logger and live inside the session that owns the log: ONNX Runtime destroys kernels first.
    pub fn info(&self, text: &str) {
        // SAFETY: the session, and with it the log, outlives its kernels.
        unsafe {
            log(
                &self.host,
                self.raw,
                OrtLoggingLevel::ORT_LOGGING_LEVEL_INFO,
                text,
            )
        };
    }
}
