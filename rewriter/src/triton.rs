//! Triton's model configuration (`config.pbtxt`) for a rewritten model under its ONNX Runtime backend.
//!
//! The backend compares sizes with what ONNX Runtime says, outputs exactly: what the rewritten file declares.

use crate::lower::known_type;
use crate::onnx::{Graph, elem_type};
use crate::shapes::Facts;
use std::fmt::Write;

/// Idle limit of a sequence. Triton's default of one second is shorter than a step of a large model.
const IDLE_MICROSECONDS: u64 = 60_000_000;
/// Generations that one instance interleaves. Without it an instance serves one from start to end, and the others wait.
const CANDIDATE_SEQUENCES: u32 = 64;

/// Why no configuration can be written.
#[derive(Debug, thiserror::Error)]
pub enum TritonError {
    #[error(
        "the model's {place} `{name}` has no declared shape, and Triton's configuration needs its rank; run onnx.shape_inference on the model, or export it with one"
    )]
    NoShape { place: &'static str, name: String },
    #[error(
        "the model's {place} `{name}` has the ONNX element type {elem_type}, for which Triton has none; expected floats, integers, booleans or strings"
    )]
    NoType {
        place: &'static str,
        name: String,
        elem_type: i32,
    },
}

/// The configuration of the rewritten `graph` (given as it was before, with what is known about its values), written to a
/// file called `file_name`, on a server that finds the op library at `library`.
///
/// # Errors
/// See [`TritonError`].
pub fn config(
    graph: &Graph,
    facts: &Facts,
    file_name: &str,
    library: &str,
) -> Result<String, TritonError> {
    let mut text = String::new();
    let _ = write!(
        text,
        r#"backend: "onnxruntime"
default_model_filename: {}
# Both halves of guidance are the rows of one request, so Triton must not batch requests.
max_batch_size: 0
model_operations {{ op_library_filename: {} }}
sequence_batching {{
  # From one step of a generation to its next; longer than the slowest step.
  max_sequence_idle_microseconds: {IDLE_MICROSECONDS}
  # Generations in progress per instance; further ones wait.
  oldest {{ max_candidate_sequences: {CANDIDATE_SEQUENCES} }}
  control_input [
    {{ name: "dfa_start" control [ {{ kind: CONTROL_SEQUENCE_START bool_false_true: [ false, true ] }} ] }},
    {{ name: "dfa_end" control [ {{ kind: CONTROL_SEQUENCE_END bool_false_true: [ false, true ] }} ] }},
    {{ name: "dfa_request_id" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 }} ] }}
  ]
}}
"#,
        quoted(file_name),
        quoted(library)
    );
    let inputs = graph.inputs.iter();
    // The backend counts what must be fed; an initializer that may be overridden is none of it.
    let fed = inputs.filter(|i| !i.has_default && !graph.initializers.contains_key(&i.name));
    let fed = fed.map(|i| {
        let dims = i.dims.as_ref();
        let dims = dims.map(|d| d.iter().map(|d| d.as_ref().ok().copied()).collect());
        tensor("input", &i.name, i.elem_type, dims)
    });
    list(&mut text, "input", &fed.collect::<Result<Vec<_>, _>>()?);
    let outputs = graph.outputs.iter().map(|name| {
        let declared = known_type(graph, facts, name).tensor_type;
        let declared = declared.unwrap_or_default();
        let dims = declared.shape;
        let dims = dims.map(|s| s.dim.into_iter().map(|d| d.dim_value).collect());
        tensor("output", name, declared.elem_type, dims)
    });
    list(
        &mut text,
        "output",
        &outputs.collect::<Result<Vec<_>, _>>()?,
    );
    Ok(text)
}

fn list(text: &mut String, place: &str, tensors: &[String]) {
    let _ = writeln!(text, "{place} [\n{}\n]", tensors.join(",\n"));
}

/// One entry of `input` or `output`; sizes that are open are −1, and a scalar is written as one element.
fn tensor(
    place: &'static str,
    name: &str,
    elem_type: i32,
    dims: Option<Vec<Option<i64>>>,
) -> Result<String, TritonError> {
    let data_type = data_type(elem_type).ok_or_else(|| TritonError::NoType {
        place,
        name: name.into(),
        elem_type,
    })?;
    let mut dims = dims.ok_or_else(|| TritonError::NoShape {
        place,
        name: name.into(),
    })?;
    if dims.is_empty() {
        dims.push(Some(1));
    }
    let dims = dims.iter().map(|d| d.unwrap_or(-1).to_string());
    let dims = dims.collect::<Vec<_>>().join(", ");
    let name = quoted(name);
    Ok(format!(
        "  {{ name: {name} data_type: {data_type} dims: [ {dims} ] }}"
    ))
}

/// Triton's name of an ONNX element type.
fn data_type(elem_type: i32) -> Option<&'static str> {
    Some(match elem_type {
        elem_type::FLOAT => "TYPE_FP32",
        2 => "TYPE_UINT8",
        3 => "TYPE_INT8",
        4 => "TYPE_UINT16",
        5 => "TYPE_INT16",
        elem_type::INT32 => "TYPE_INT32",
        elem_type::INT64 => "TYPE_INT64",
        8 => "TYPE_STRING",
        elem_type::BOOL => "TYPE_BOOL",
        elem_type::FLOAT16 => "TYPE_FP16",
        elem_type::DOUBLE => "TYPE_FP64",
        12 => "TYPE_UINT32",
        13 => "TYPE_UINT64",
        elem_type::BFLOAT16 => "TYPE_BF16",
        _ => return None,
    })
}

/// A string of protobuf's text format.
fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_ascii_control() => {
                let _ = write!(quoted, "\\{:03o}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_quotes() {
        assert_eq!(quoted("a\"b\\c\nd é"), r#""a\"b\\c\012d é""#);
    }

    #[test]
    fn open_sizes_and_scalars() {
        let open = tensor("input", "x", elem_type::FLOAT16, Some(vec![None, Some(4)]));
        assert_eq!(
            open.unwrap(),
            r#"  { name: "x" data_type: TYPE_FP16 dims: [ -1, 4 ] }"#
        );
        let scalar = tensor("input", "t", elem_type::INT64, Some(vec![]));
        assert!(scalar.unwrap().contains("dims: [ 1 ]"));
    }

    #[test]
    fn what_triton_cannot_hold_is_named() {
        let error = tensor("output", "y", elem_type::FLOAT, None).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("output `y` has no declared shape")
        );
        let error = tensor("input", "z", 14, Some(vec![])).unwrap_err();
        assert!(error.to_string().contains("element type 14"));
    }
}
