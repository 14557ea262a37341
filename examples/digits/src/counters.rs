//! What the op library counted: its C function `ditfastattn_stats`, a JSON object.
//!
//! The library is already in the process, ONNX Runtime loaded it; opening it again finds the same one.

use std::ffi::{CStr, c_char};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Map, Value};

/// Writes JSON and a NUL to `buffer` if `len` bytes suffice; returns the bytes they need.
type Stats = unsafe extern "C" fn(buffer: *mut c_char, len: usize) -> usize;

/// The counters by name.
pub fn read(library: &Path) -> Result<Map<String, Value>> {
    // SAFETY: initialisers ran when ONNX Runtime loaded the library; this only takes a reference.
    let library = unsafe { libloading::Library::new(library) }
        .with_context(|| format!("{}: cannot be opened", library.display()))?;
    // SAFETY: the type is the one that the library documents for this name.
    let stats = unsafe { library.get::<Stats>(b"ditfastattn_stats\0") }
        .context("the op library has no `ditfastattn_stats`: it is older than this example")?;
    // SAFETY: a null buffer asks for the size only.
    let mut needed = unsafe { stats(std::ptr::null_mut(), 0) };
    loop {
        let mut buffer = vec![0u8; needed];
        // SAFETY: the buffer has as many bytes as it is said to have.
        needed = unsafe { stats(buffer.as_mut_ptr().cast(), buffer.len()) };
        if needed <= buffer.len() {
            let text = CStr::from_bytes_until_nul(&buffer)?.to_bytes();
            return serde_json::from_slice(text)
                .context("the op library's counters are no JSON object");
        }
    }
}
