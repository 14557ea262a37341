//! What a node says about itself when its kernel is made: name, attributes, counts.

use std::ffi::CString;

use ort_sys::{OrtKernelInfo, OrtLogger, OrtLoggingLevel};

use super::context::log;
use super::host::{Host, function};
use super::status::Error;

/// The node a kernel is made for. Lives only as long as the creation.
#[derive(Debug)]
pub struct Info<'a> {
    host: &'a Host,
    raw: *const OrtKernelInfo,
}

impl<'a> Info<'a> {
    /// # Safety
    /// `raw` is the info of a kernel creation that lasts for `'a`.
    pub(crate) unsafe fn new(host: &'a Host, raw: *const OrtKernelInfo) -> Self {
        Info { host, raw }
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
        let mut count = 0;
        // SAFETY: a live info.
        self.host.check(unsafe {
            function!(self.host, KernelInfo_GetInputCount)(self.raw, &mut count)
        })?;
        Ok(count)
    }

    /// How many outputs the node has.
    pub fn output_count(&self) -> Result<usize, Error> {
        let mut count = 0;
        // SAFETY: a live info.
        self.host.check(unsafe {
            function!(self.host, KernelInfo_GetOutputCount)(self.raw, &mut count)
        })?;
        Ok(count)
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
        let mut value = 0;
        // SAFETY: a live info, a NUL-terminated name, a place for the answer.
        let status = unsafe {
            function!(self.host, KernelInfoGetAttribute_int64)(self.raw, name.as_ptr(), &mut value)
        };
        self.host.check(status).ok().map(|()| value)
    }

    /// A float attribute; see [`Info::int`].
    pub fn float(&self, name: &str) -> Option<f32> {
        let name = CString::new(name).ok()?;
        let mut value = 0.0;
        // SAFETY: as in `int`.
        let status = unsafe {
            function!(self.host, KernelInfoGetAttribute_float)(self.raw, name.as_ptr(), &mut value)
        };
        self.host.check(status).ok().map(|()| value)
    }

    /// A string attribute; see [`Info::int`].
    pub fn string(&self, name: &str) -> Option<String> {
        let name = CString::new(name).ok()?;
        self.text(|out, size| {
            // SAFETY: as in `int`; `out` is null or has `*size` bytes.
            unsafe {
                function!(self.host, KernelInfoGetAttribute_string)(
                    self.raw,
                    name.as_ptr(),
                    out,
                    size,
                )
            }
        })
        .ok()
    }

    /// A list of integers; see [`Info::int`].
    pub fn ints(&self, name: &str) -> Option<Vec<i64>> {
        let name = CString::new(name).ok()?;
        let get = function!(self.host, KernelInfoGetAttributeArray_int64);
        let mut len = 0;
        // SAFETY: as in `int`; a null buffer asks for the length.
        let status = unsafe { get(self.raw, name.as_ptr(), std::ptr::null_mut(), &mut len) };
        self.host.check(status).ok()?;
        let mut values = vec![0; len];
        if len > 0 {
            // SAFETY: room for `len` numbers.
            let status = unsafe { get(self.raw, name.as_ptr(), values.as_mut_ptr(), &mut len) };
            self.host.check(status).ok()?;
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
        let mut size = 0;
        self.host.check(get(std::ptr::null_mut(), &mut size))?;
        let mut bytes = vec![0u8; size];
        self.host.check(get(bytes.as_mut_ptr().cast(), &mut size))?;
        bytes.truncate(size.saturating_sub(1));
        Ok(String::from_utf8_lossy(&bytes).into_owned())
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
