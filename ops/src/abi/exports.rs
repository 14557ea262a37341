//! The symbols of the shared library. There are three, and no others.

use std::ffi::c_char;

use ort_sys::{OrtApiBase, OrtSessionOptions, OrtStatusPtr};

use super::library::register;
use super::status::caught;

/// Adds the operators of the domain `ai.ditfastattn` to session options.
///
/// What `SessionOptions.register_custom_ops_library` and its kin look for. Registering twice is harmless.
///
/// # Safety
/// To be called by ONNX Runtime, with live session options and its `OrtApiBase`.
#[unsafe(no_mangle)]
pub unsafe extern "system" fn RegisterCustomOps(
    options: *mut OrtSessionOptions,
    base: *const OrtApiBase,
) -> OrtStatusPtr {
    // SAFETY: the caller's promise.
    unsafe { register(options, base, crate::ops::DOMAIN, crate::ops::all) }
}

/// Writes the counters of the whole process, as JSON, into `buffer`.
///
/// Returns the bytes that the text and its final NUL need. If that is more than `len`, nothing is written; a null
/// buffer asks for the size. The counters move on between two calls, so ask again if the second still does not fit.
///
/// # Safety
/// `buffer` is null or has `len` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ditfastattn_stats(buffer: *mut c_char, len: usize) -> usize {
    let text = caught(|| Ok(crate::ops::stats_json())).unwrap_or_default();
    let needed = text.len() + 1;
    if !buffer.is_null() && needed <= len {
        // SAFETY: the caller says that `len` bytes are writable, and `needed` is no more.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), buffer.cast(), text.len());
            buffer.add(text.len()).write(0);
        }
    }
    needed
}

/// Sets the counters to zero. Requests, what they cache and runs in flight stay, and stay counted.
#[unsafe(no_mangle)]
pub extern "C" fn ditfastattn_reset() {
    let _ = caught(|| {
        crate::ops::reset();
        Ok(())
    });
}
