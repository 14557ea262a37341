//! Statuses of the host, made of errors, and the guard that keeps panics from crossing into it.

use std::any::Any;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ort_sys::OrtStatusPtr;

use super::error::{Code, Error};
use super::host::{Host, function};
use super::preallocated_status;

/// Makes a status for ONNX Runtime out of an error.
fn to_status(host: &Host, error: &Error) -> OrtStatusPtr {
    let text = format!("ditfastattn: {}", error.message.replace('\0', " "));
    let text = CString::new(text).unwrap_or_default();
    let create = function!(host, CreateStatus);
    // SAFETY: a valid code and a NUL-terminated string that the host copies.
    let make = || unsafe { create(error.code.into(), text.as_ptr()) };
    let status = make();
    if status.0.is_null() {
        return preallocated_status::status(host, make);
    }
    status
}

/// Runs `body`; errors and panics become a status of the host, success becomes null.
pub(crate) fn guard(host: &Host, body: impl FnOnce() -> Result<(), Error>) -> OrtStatusPtr {
    match caught(body) {
        Ok(()) => OrtStatusPtr(std::ptr::null_mut()),
        Err(error) => to_status(host, &error),
    }
}

/// Runs `body`; a panic becomes an error.
pub(crate) fn caught<R>(body: impl FnOnce() -> Result<R, Error>) -> Result<R, Error> {
    // Unwind safety: everything shared behind `body` is atomics and mutexes whose poison is ignored on purpose, and a
    // run in which something panicked is abandoned with its caches.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        Err(Error::new(
            Code::RuntimeException,
            format!("panic: {}", panic_text(payload.as_ref())),
        ))
    })
}

/// The message of a panic.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "unknown".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors_with_their_text() {
        let index = std::hint::black_box(3);
        let error = caught(|| Ok([1, 2][index])).expect_err("out of bounds");
        assert_eq!(error.code, Code::RuntimeException);
        assert!(error.message.contains("index out of bounds"), "{error}");
        let error = caught::<()>(|| panic!("row {index}"))
            .expect_err("a panic")
            .at("DiTFastAttn", "attention_0");
        assert_eq!(
            error.message,
            "DiTFastAttn node `attention_0`: panic: row 3"
        );
    }

    #[test]
    fn errors_pass_through() {
        let error = caught::<()>(|| Err(Error::graph("no"))).expect_err("an error");
        assert_eq!((error.code, &*error.message), (Code::InvalidGraph, "no"));
    }
}
