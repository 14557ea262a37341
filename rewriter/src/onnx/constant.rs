//! Small constants (scales, axes, reshape targets) read out of initializers and `Constant` nodes.
//!
//! Weights are never read: anything above [`MAX_ELEMENTS`] or stored outside the file is left alone.

use super::proto::{TensorProto, elem_type};
use super::wire;
use bytes::Bytes;
use prost::Message;

/// Shape arithmetic, scales and axes have a handful of elements; weights and tables have more and are never needed.
const MAX_ELEMENTS: i64 = 64;

/// No small constant takes more; a longer field of numbers is a weight, and is not decoded.
const MAX_BYTES: usize = 1024;

/// The fields of `TensorProto` that hold its numbers.
const NUMBERS: [u32; 7] = [4, 5, 6, 7, 9, 10, 11];

/// Element values, widened: integers and booleans to `i64`, floating point to `f64`.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    Ints(Vec<i64>),
    Floats(Vec<f64>),
}

/// A constant tensor: always its type and shape; its values only if it is small and inside the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Constant {
    pub elem_type: i32,
    pub dims: Vec<i64>,
    pub data: Option<Data>,
}

impl Constant {
    /// Reads a serialized `TensorProto` without touching its data if that is large or external.
    pub fn read(tensor: &Bytes) -> Option<(String, Self)> {
        let small = wire::split(tensor)
            .ok()?
            .into_iter()
            .filter(|f| !NUMBERS.contains(&f.number) || f.raw.len() <= MAX_BYTES)
            .flat_map(|f| f.raw)
            .collect::<Bytes>();
        let tensor = TensorProto::decode(small).ok()?;
        let elements = tensor
            .dims
            .iter()
            .try_fold(1i64, |n, &d| n.checked_mul(d).filter(|&n| n >= 0))?;
        let data = (tensor.data_location == 0 && elements <= MAX_ELEMENTS)
            .then(|| values(&tensor, usize::try_from(elements).ok()?))
            .flatten();
        Some((
            tensor.name.clone(),
            Self {
                elem_type: tensor.data_type,
                dims: tensor.dims,
                data,
            },
        ))
    }
}

fn values(tensor: &TensorProto, elements: usize) -> Option<Data> {
    let raw = tensor.raw_data.as_deref();
    let ints = |v: Vec<i64>| (v.len() == elements).then_some(Data::Ints(v));
    let floats = |v: Vec<f64>| (v.len() == elements).then_some(Data::Floats(v));
    fn chunks<const N: usize, T>(raw: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
        raw.chunks_exact(N)
            .map(|c| f(c.try_into().expect("chunks_exact gives N bytes")))
            .collect()
    }
    match tensor.data_type {
        elem_type::INT64 => ints(raw.map_or_else(
            || tensor.int64_data.clone(),
            |r| chunks(r, i64::from_le_bytes),
        )),
        elem_type::INT32 => ints(raw.map_or_else(
            || tensor.int32_data.iter().map(|&v| i64::from(v)).collect(),
            |r| chunks(r, |b| i64::from(i32::from_le_bytes(b))),
        )),
        elem_type::BOOL => ints(raw.map_or_else(
            || tensor.int32_data.iter().map(|&v| i64::from(v)).collect(),
            |r| r.iter().map(|&b| i64::from(b)).collect(),
        )),
        elem_type::FLOAT => floats(raw.map_or_else(
            || tensor.float_data.iter().map(|&v| f64::from(v)).collect(),
            |r| chunks(r, |b| f64::from(f32::from_le_bytes(b))),
        )),
        elem_type::DOUBLE => floats(raw.map_or_else(
            || tensor.double_data.clone(),
            |r| chunks(r, f64::from_le_bytes),
        )),
        elem_type::FLOAT16 | elem_type::BFLOAT16 => {
            let bits: Vec<u16> = raw.map_or_else(
                || {
                    tensor
                        .int32_data
                        .iter()
                        .map(|&v| (v & 0xffff) as u16)
                        .collect()
                },
                |r| chunks(r, u16::from_le_bytes),
            );
            let widen = |b: u16| {
                if tensor.data_type == elem_type::FLOAT16 {
                    half::f16::from_bits(b).to_f64()
                } else {
                    half::bf16::from_bits(b).to_f64()
                }
            };
            floats(bits.into_iter().map(widen).collect())
        }
        _ => None,
    }
}
