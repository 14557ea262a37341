//! Errors that cross into ONNX Runtime, and the guard that keeps panics from crossing.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use ort_sys::{OrtErrorCode, OrtStatusPtr};

use super::host::Host;

/// What kind of failure ONNX Runtime should report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Fail,
    InvalidArgument,
    InvalidGraph,
    NotImplemented,
    RuntimeException,
}

impl From<Code> for OrtErrorCode {
    fn from(code: Code) -> Self {
        match code {
            Code::Fail => OrtErrorCode::ORT_FAIL,
            Code::InvalidArgument => OrtErrorCode::ORT_INVALID_ARGUMENT,
            Code::InvalidGraph => OrtErrorCode::ORT_INVALID_GRAPH,
            Code::NotImplemented => OrtErrorCode::ORT_NOT_IMPLEMENTED,
            Code::RuntimeException => OrtErrorCode::ORT_RUNTIME_EXCEPTION,
        }
    }
}

/// An error on its way to becoming an `OrtStatus`.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub code: Code,
    pub message: String,
}

impl Error {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Error {
            code,
            message: message.into(),
        }
    }

    /// A value that does not fit: shapes, types, feeds.
    pub fn invalid(message: impl Into<String>) -> Self {
        Error::new(Code::InvalidArgument, message)
    }

    /// A graph that was not made by our rewriter, or by another version of it.
    pub fn graph(message: impl Into<String>) -> Self {
        Error::new(Code::InvalidGraph, message)
    }

    /// Says which node failed.
    pub fn at(mut self, op: &str, node: &str) -> Self {
        self.message = format!("{op} node `{node}`: {}", self.message);
        self
    }
}

/// Runs `body`; errors and panics become a status of the host, success becomes null.
pub(crate) fn guard(host: &Host, body: impl FnOnce() -> Result<(), Error>) -> OrtStatusPtr {
    match caught(body) {
        Ok(()) => OrtStatusPtr(std::ptr::null_mut()),
        Err(error) => host.status(&error),
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
