//! The operators' domain and names, and the order of their inputs and outputs.

use std::ffi::CStr;

/// A name, for Rust and for ONNX Runtime's C interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name(&'static CStr);

impl Name {
    pub const fn as_cstr(self) -> &'static CStr {
        self.0
    }

    pub const fn as_str(self) -> &'static str {
        match self.0.to_str() {
            Ok(name) => name,
            Err(_) => panic!("names are ASCII"),
        }
    }
}

/// The operators' domain.
pub const DOMAIN: Name = Name(c"ai.ditfastattn");
/// The domain's opset.
pub const DOMAIN_VERSION: i64 = 1;

/// One per model: decides what every layer does.
pub const STEP: Name = Name(c"DiTFastAttnStep");
/// The rows that a layer computes.
pub const SELECT: Name = Name(c"DiTFastAttnSelect");
/// Attention: full, full with capture of R, window with R.
pub const ATTENTION: Name = Name(c"DiTFastAttn");
/// All rows again; keeps the output.
pub const SHARE: Name = Name(c"DiTFastAttnShare");
/// The kept output.
pub const REUSE: Name = Name(c"DiTFastAttnReuse");

/// Inputs of [`STEP`]; conditioning follows the latents. Outputs: the ticket, one bool per layer (served from the cache), one
/// for each of `dense_layers` (left to the host).
pub mod step {
    pub const TIMESTEP: usize = 0;
    pub const REQUEST: usize = 1;
    pub const START: usize = 2;
    pub const END: usize = 3;
    pub const LATENTS: usize = 4;
}

/// Inputs and outputs of [`ATTENTION`].
pub mod attention {
    pub const Q: usize = 0;
    pub const K: usize = 1;
    pub const V: usize = 2;
    pub const TICKET: usize = 3;
    pub const MASK: usize = 4;
    pub const TEXT: usize = 5;
    /// R, where the graph carries the state.
    pub const PAST: usize = 6;

    pub const OUT: usize = 0;
    /// R afterwards, where the graph carries the state.
    pub const PRESENT: usize = 1;
}

/// Inputs of [`SELECT`], [`SHARE`] and [`REUSE`].
pub mod around {
    pub const X: usize = 0;
    pub const TICKET: usize = 1;
    /// Of [`REUSE`](super::REUSE): the kept output, where the graph carries the state.
    pub const PAST: usize = 2;
}
