//! What is known of the sizes of a model's outputs, beyond what the file declares.

use crate::onnx::{Graph, TypeProto};
use crate::shapes::Facts;
use std::collections::HashMap;

/// The type that the file declares for the output `name`, with the sizes that can be inferred where it leaves them open.
pub fn known_type(graph: &Graph, facts: &Facts, name: &str) -> TypeProto {
    let mut ty = graph.value_info.get(name).cloned().unwrap_or_default();
    let shape = ty.tensor_type.as_mut().and_then(|t| t.shape.as_mut());
    if let (Some(shape), Some(known)) = (shape, facts.shape(name))
        && shape.dim.len() == known.len()
    {
        for (dim, known) in shape.dim.iter_mut().zip(known) {
            if let (None, Some(size)) = (dim.dim_value, known.known()) {
                dim.dim_value = Some(size);
                dim.dim_param = None;
            }
        }
    }
    ty
}

/// [`known_type`] of all outputs, by name.
pub fn known_types(graph: &Graph, facts: &Facts) -> HashMap<String, TypeProto> {
    let outputs = graph.outputs.iter();
    outputs
        .map(|name| (name.clone(), known_type(graph, facts, name)))
        .collect()
}
