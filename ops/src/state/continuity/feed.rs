//! Tensors as they are fed to the model: what can be read of them without knowing ONNX Runtime.

use half::{bf16, f16};

/// A tensor that is fed to the model.
#[derive(Clone, Copy, Debug)]
pub struct Feed<'a> {
    pub dims: &'a [usize],
    /// Tells element types apart.
    pub element: u32,
    /// The memory; `None` if it cannot be read (strings).
    pub bytes: Option<&'a [u8]>,
    pub values: Values<'a>,
}

/// The elements of a tensor, where they are numbers that can be compared.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    I32(&'a [i32]),
    I64(&'a [i64]),
    Other,
}

impl Values<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Values::F32(v) => v.len(),
            Values::F64(v) => v.len(),
            Values::F16(v) => v.len(),
            Values::BF16(v) => v.len(),
            Values::I32(v) => v.len(),
            Values::I64(v) => v.len(),
            Values::Other => 0,
        }
    }

    pub(super) fn get(&self, index: usize) -> f64 {
        match self {
            Values::F32(v) => f64::from(v[index]),
            Values::F64(v) => v[index],
            Values::F16(v) => v[index].to_f64(),
            Values::BF16(v) => v[index].to_f64(),
            Values::I32(v) => f64::from(v[index]),
            Values::I64(v) => v[index] as f64,
            Values::Other => f64::NAN,
        }
    }
}
