//! ONNX files in and out, byte for byte.
//!
//! Owns the wire format: reading a `ModelProto` without copying weights, looking into the few messages the
//! rewriter understands, and writing the file back so that every message it did not touch keeps its exact bytes,
//! unknown fields included. Calls of model-local functions are replaced by what they call when a file is read. Knows nothing
//! about attention.

mod constant;
mod external;
mod file;
mod functions;
mod graph;
mod part;
mod proto;
#[cfg(test)]
pub mod testing;
mod walk;
mod wire;

pub use constant::{Constant, Data};
pub use external::Links;
pub use file::{ModelFile, ReadError, WriteError, write_atomically};
pub use graph::{Graph, GraphEdit, GraphInput, Node, in_order};
pub use proto::{
    AttributeProto, AttributeType, DimensionProto, NodeProto, TensorProto, TensorShapeProto,
    TensorTypeProto, TypeProto, ValueInfoProto, elem_type,
};
