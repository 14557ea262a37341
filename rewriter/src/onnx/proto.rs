//! The ONNX messages the rewriter looks into, as `prost` structs of our own.
//!
//! Names and field numbers are those of ONNX IR 14. Sub-messages that are never looked into stay `Bytes`, so a
//! message that is decoded and encoded again keeps them exactly. A message with a field that its struct does not know
//! must not be re-encoded: see [`NodeProto::is_fully_known`].

use bytes::Bytes;

/// Element types of `TensorProto.DataType` that the rewriter names.
pub mod elem_type {
    pub const FLOAT: i32 = 1;
    pub const UINT8: i32 = 2;
    pub const INT32: i32 = 6;
    pub const INT64: i32 = 7;
    pub const BOOL: i32 = 9;
    pub const FLOAT16: i32 = 10;
    pub const DOUBLE: i32 = 11;
    pub const BFLOAT16: i32 = 16;

    /// The ONNX name, for messages.
    pub fn name(elem_type: i32) -> &'static str {
        match elem_type {
            FLOAT => "float32",
            INT32 => "int32",
            INT64 => "int64",
            BOOL => "bool",
            FLOAT16 => "float16",
            DOUBLE => "float64",
            BFLOAT16 => "bfloat16",
            0 => "unknown",
            _ => "another type",
        }
    }

    /// The types the attention ops are registered for.
    pub fn is_supported_float(elem_type: i32) -> bool {
        matches!(elem_type, FLOAT | FLOAT16 | BFLOAT16)
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct NodeProto {
    #[prost(string, repeated, tag = "1")]
    pub input: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub output: Vec<String>,
    #[prost(string, optional, tag = "3")]
    pub name: Option<String>,
    #[prost(string, optional, tag = "4")]
    pub op_type: Option<String>,
    #[prost(bytes = "bytes", repeated, tag = "5")]
    pub attribute: Vec<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "6")]
    pub doc_string: Option<Bytes>,
    #[prost(string, optional, tag = "7")]
    pub domain: Option<String>,
    #[prost(bytes = "bytes", optional, tag = "8")]
    pub overload: Option<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "9")]
    pub metadata_props: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "10")]
    pub device_configurations: Vec<Bytes>,
}

impl NodeProto {
    /// Whether `raw`, the message this node was decoded from, has only fields of this struct, so that encoding the
    /// node again loses nothing.
    pub fn is_fully_known(raw: &Bytes) -> bool {
        super::wire::split(raw)
            .is_ok_and(|fields| fields.iter().all(|f| (1..=10).contains(&f.number)))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum AttributeType {
    Undefined = 0,
    Float = 1,
    Int = 2,
    String = 3,
    Tensor = 4,
    Graph = 5,
    Floats = 6,
    Ints = 7,
    Strings = 8,
    Tensors = 9,
    Graphs = 10,
    SparseTensor = 11,
    SparseTensors = 12,
    TypeProto = 13,
    TypeProtos = 14,
}

/// `AttributeProto`; fields that no node we read or write uses are left out, so it is never re-encoded.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AttributeProto {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(float, optional, tag = "2")]
    pub f: Option<f32>,
    #[prost(int64, optional, tag = "3")]
    pub i: Option<i64>,
    #[prost(bytes = "bytes", optional, tag = "4")]
    pub s: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "5")]
    pub t: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "6")]
    pub g: Option<Bytes>,
    #[prost(float, repeated, packed = "false", tag = "7")]
    pub floats: Vec<f32>,
    #[prost(int64, repeated, packed = "false", tag = "8")]
    pub ints: Vec<i64>,
    #[prost(bytes = "bytes", repeated, tag = "11")]
    pub graphs: Vec<Bytes>,
    #[prost(enumeration = "AttributeType", tag = "20")]
    pub r#type: i32,
}

impl AttributeProto {
    pub fn int(name: &str, value: i64) -> Self {
        Self {
            name: name.into(),
            i: Some(value),
            r#type: AttributeType::Int as i32,
            ..Self::default()
        }
    }

    pub fn ints(name: &str, values: Vec<i64>) -> Self {
        Self {
            name: name.into(),
            ints: values,
            r#type: AttributeType::Ints as i32,
            ..Self::default()
        }
    }

    pub fn float(name: &str, value: f32) -> Self {
        Self {
            name: name.into(),
            f: Some(value),
            r#type: AttributeType::Float as i32,
            ..Self::default()
        }
    }

    pub fn string(name: &str, value: &str) -> Self {
        let s = Some(Bytes::copy_from_slice(value.as_bytes()));
        Self {
            name: name.into(),
            s,
            r#type: AttributeType::String as i32,
            ..Self::default()
        }
    }

    pub fn graph(name: &str, graph: Bytes) -> Self {
        Self {
            name: name.into(),
            g: Some(graph),
            r#type: AttributeType::Graph as i32,
            ..Self::default()
        }
    }

    pub fn tensor(name: &str, tensor: &TensorProto) -> Self {
        let t = Some(prost::Message::encode_to_vec(tensor).into());
        Self {
            name: name.into(),
            t,
            r#type: AttributeType::Tensor as i32,
            ..Self::default()
        }
    }
}

/// `TensorProto` without the fields the rewriter never reads; new tensors are written with it, old ones never.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TensorProto {
    #[prost(int64, repeated, packed = "false", tag = "1")]
    pub dims: Vec<i64>,
    #[prost(int32, tag = "2")]
    pub data_type: i32,
    #[prost(float, repeated, tag = "4")]
    pub float_data: Vec<f32>,
    #[prost(int32, repeated, tag = "5")]
    pub int32_data: Vec<i32>,
    #[prost(int64, repeated, tag = "7")]
    pub int64_data: Vec<i64>,
    #[prost(string, tag = "8")]
    pub name: String,
    #[prost(bytes = "bytes", optional, tag = "9")]
    pub raw_data: Option<Bytes>,
    #[prost(double, repeated, tag = "10")]
    pub double_data: Vec<f64>,
    #[prost(message, repeated, tag = "13")]
    pub external_data: Vec<StringStringEntryProto>,
    #[prost(int32, tag = "14")]
    pub data_location: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct StringStringEntryProto {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct OperatorSetIdProto {
    #[prost(string, tag = "1")]
    pub domain: String,
    #[prost(int64, tag = "2")]
    pub version: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ValueInfoProto {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(message, optional, tag = "2")]
    pub r#type: Option<TypeProto>,
}

impl ValueInfoProto {
    /// A tensor of these sizes, `None` for an open one; without `sizes` of any rank.
    pub fn tensor(name: &str, elem_type: i32, sizes: Option<Vec<Option<i64>>>) -> Self {
        let dimension = |dim_value| DimensionProto {
            dim_value,
            dim_param: None,
        };
        let shape = sizes.map(|sizes| TensorShapeProto {
            dim: sizes.into_iter().map(dimension).collect(),
        });
        let tensor_type = Some(TensorTypeProto { elem_type, shape });
        Self {
            name: name.into(),
            r#type: Some(TypeProto { tensor_type }),
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TypeProto {
    #[prost(message, optional, tag = "1")]
    pub tensor_type: Option<TensorTypeProto>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TensorTypeProto {
    #[prost(int32, tag = "1")]
    pub elem_type: i32,
    #[prost(message, optional, tag = "2")]
    pub shape: Option<TensorShapeProto>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TensorShapeProto {
    #[prost(message, repeated, tag = "1")]
    pub dim: Vec<DimensionProto>,
}

/// A dimension: a known size, a named one, or (neither) unknown.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DimensionProto {
    #[prost(int64, optional, tag = "1")]
    pub dim_value: Option<i64>,
    #[prost(string, optional, tag = "2")]
    pub dim_param: Option<String>,
}
