//! Versions of the contract. ONNX Runtime ignores versions of custom operators, so the graph carries one, the lowest that has what
//! it uses; a library refuses those it does not know.

/// The first.
pub const FIRST: i64 = 1;
/// Added `dense_layers`.
pub const WITH_DENSE: i64 = 2;
/// Added `schedule` and `blind`.
pub const WITH_SCHEDULE: i64 = 3;
/// The newest.
pub const NEWEST: i64 = WITH_SCHEDULE;
