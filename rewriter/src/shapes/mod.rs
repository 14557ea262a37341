//! What is known about every value before the model runs: element type, symbolic shape and, for shape arithmetic and
//! scales, the value itself.
//!
//! Exporters annotate few values (TorchScript: none), yet lowering must know which tensors carry the batch. Dimensions
//! are exact symbolic products (`2·batch·64`), so `Reshape` targets built from `Shape` arithmetic resolve. Whatever cannot be
//! resolved is unknown, never guessed.

mod axis;
mod dim;
mod infer;
mod rules;

pub use axis::{AxisFate, AxisOffset, axis_at, propagate_axis, propagate_axis_apart, trace_axis};
pub use dim::{Dim, Symbol, Symbols};
pub use infer::{BATCH, Fact, Facts, Value, infer, infer_paired};
pub use rules::{
    ANCHOR, COPY, Class, ELEMENT, LAYOUT, LINEAR, NORM, PICK, PRODUCT, PROJECTION, QUANTIZE,
    RANDOM, REPEAT, RESHAPE, SCALE, SIZE, SUM, TRANSPOSE, axis, has_row, is, why_lost, why_unknown,
};
