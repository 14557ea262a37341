//! Errors on their way into ONNX Runtime.

use ort_sys::OrtErrorCode;

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
