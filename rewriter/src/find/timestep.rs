//! Which graph input is the timestep.
//!
//! By what the graph does with it: it reaches a sinusoidal embedding, or it is an integer that picks a row of a table. Names only
//! break ties and rule out what is embedded the same way.

use super::inputs::InputsError;
use super::source::is_weight;
use crate::onnx::{Graph, GraphInput, Node, elem_type};
use std::collections::HashSet;

/// A network has a few numbers of steps between its inputs and a sine; a longer way is another network.
const MAX_VALUES: usize = 4096;

/// The timestep among the inputs that are `fed`; `None` if there is none.
///
/// # Errors
/// [`InputsError::ManyTimesteps`] where several are as likely.
pub fn find(graph: &Graph, fed: &[&GraphInput]) -> Result<Option<String>, InputsError> {
    let numbers: Vec<&GraphInput> = fed
        .iter()
        .copied()
        .filter(|i| is_number(i) && !is_other_name(&i.name))
        .collect();
    let a_number_per_row = |i: &&GraphInput| is_per_row(i);
    let embedded = |i: &&GraphInput| reaches_sinusoid(graph, &i.name);
    // A number per row (or one for all), or whatever is called a timestep: also one per token.
    let first: Vec<_> = numbers
        .iter()
        .copied()
        .filter(|i| is_per_row(i) || is_timestep_name(&i.name))
        .filter(embedded)
        .collect();
    if !first.is_empty() {
        return one_of(&first).map(Some);
    }
    // Without a sine on its way, and in any other shape, something else may be the timestep: then nothing is guessed.
    let indices: Vec<_> = numbers
        .iter()
        .copied()
        .filter(a_number_per_row)
        .filter(|i| is_integer(i) && !is_label_name(&i.name) && indexes_table(graph, &i.name))
        .collect();
    let shaped: Vec<_> = numbers
        .iter()
        .copied()
        .filter(|i| !is_per_row(i) && !is_integer(i) && !is_position_name(&i.name))
        .filter(embedded)
        .collect();
    for candidates in [indices, shaped] {
        let named = candidates.iter().any(|i| is_timestep_name(&i.name));
        let mut rivals = candidates.clone();
        if !named && !candidates.is_empty() {
            let others = numbers.iter().copied().filter(a_number_per_row);
            rivals.extend(others.filter(|i| {
                !is_label_name(&i.name) && !candidates.iter().any(|c| c.name == i.name)
            }));
        }
        if !rivals.is_empty() {
            return one_of(&rivals).map(Some);
        }
    }
    Ok(None)
}

/// The only one, or the only one that has a usual name.
fn one_of(candidates: &[&GraphInput]) -> Result<String, InputsError> {
    let usual: Vec<_> = candidates
        .iter()
        .filter(|i| is_timestep_name(&i.name))
        .collect();
    match (candidates, usual.as_slice()) {
        ([only], _) => Ok(only.name.clone()),
        (_, [only]) => Ok(only.name.clone()),
        _ => Err(InputsError::ManyTimesteps {
            candidates: candidates
                .iter()
                .map(|i| format!("`{}`", i.name))
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}

fn is_timestep_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    [
        "t",
        "time",
        "sigma",
        "t_step",
        "step",
        "step_index",
        "sigmas",
    ]
    .contains(&lower.as_str())
        || ["timestep", "time_step"].iter().any(|w| lower.contains(w))
}

/// What is embedded like a timestep and is none.
fn is_other_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    ["guidance", "_ids", "resolution", "aspect", "size", "fps"]
        .iter()
        .any(|w| lower.contains(w))
}

/// What picks a row of a table like a timestep and is none.
fn is_label_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let parts = [
        "class", "label", "speaker", "lang", "length", "duration", "frames", "height", "width",
    ];
    lower == "y" || parts.iter().any(|w| lower.contains(w))
}

/// What rotary embeddings are made of.
fn is_position_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    ["pos", "coord", "rope", "rotary", "freq", "grid"]
        .iter()
        .any(|w| lower.contains(w))
}

fn is_integer(input: &GraphInput) -> bool {
    matches!(input.elem_type, elem_type::INT64 | elem_type::INT32)
}

fn is_number(input: &GraphInput) -> bool {
    elem_type::is_supported_float(input.elem_type)
        || input.elem_type == elem_type::DOUBLE
        || is_integer(input)
}

/// Whether it has at most one number per row: `[]`, `[B]`, `[B, 1, 1]`. Of unknown rank it may.
fn is_per_row(input: &GraphInput) -> bool {
    let dims = input.dims.as_deref().unwrap_or_default();
    dims.iter().skip(1).all(|d| *d == Ok(1))
}

/// Whether `input` gets to a Sin or Cos without passing through a weight.
fn reaches_sinusoid(graph: &Graph, input: &str) -> bool {
    let mut pending = vec![input];
    let mut seen: HashSet<&str> = HashSet::new();
    while let Some(value) = pending.pop() {
        for &index in graph.consumers(value) {
            let node = &graph.nodes[index];
            match node.op() {
                "Sin" | "Cos" => return true,
                "Shape" | "Gemm" | "Conv" | "LayerNormalization" => {}
                // An outer product with a constant frequency table is still a sinusoidal embedding; a learnt projection has
                // a wide weight. Telling them apart is not needed: the way on leads to Sin or Cos or it does not.
                _ => {
                    for output in &node.proto.output {
                        if !output.is_empty() && seen.insert(output) && seen.len() < MAX_VALUES {
                            let stop = matches!(node.op(), "MatMul" | "FusedMatMul")
                                && !has_vector_operand(graph, node);
                            if !stop {
                                pending.push(output);
                            }
                        }
                    }
                }
            }
        }
    }
    false
}

fn has_vector_operand(graph: &Graph, node: &Node) -> bool {
    node.proto
        .input
        .iter()
        .filter_map(|i| graph.constant(i))
        .any(|c| c.dims.iter().filter(|&&d| d != 1).count() <= 1)
}

/// Whether `input` picks out of a table that nothing fed changes: through integer arithmetic and layout only.
pub fn indexes_table(graph: &Graph, input: &str) -> bool {
    let mut pending = vec![input];
    let mut seen: HashSet<&str> = HashSet::new();
    while let Some(value) = pending.pop() {
        for &index in graph.consumers(value) {
            let node = &graph.nodes[index];
            if !node.domain().is_empty() {
                continue;
            }
            match node.op() {
                // Where a cut begins, not only where it ends, as a length would say.
                "Gather" | "GatherElements" | "GatherND" | "Slice"
                    if node.input(1) == Some(value)
                        && node.input(0).is_some_and(|data| is_table(graph, data)) =>
                {
                    return true;
                }
                "Cast" | "Identity" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten"
                | "Expand" | "Tile" | "Concat" | "Clip" | "Min" | "Max" | "Add" | "Sub" | "Mul"
                | "Div" | "Neg" | "Mod" | "Where" | "Floor" | "Round"
                    if node.input(0) == Some(value) || node.input(1) == Some(value) =>
                {
                    let output = node.output(0);
                    if !output.is_empty() && seen.insert(output) && seen.len() < MAX_VALUES {
                        pending.push(output);
                    }
                }
                _ => {}
            }
        }
    }
    false
}

fn is_table(graph: &Graph, value: &str) -> bool {
    is_weight(graph, value)
        || graph.producer(value).is_some_and(|(node, _)| {
            node.is("Range") && node.proto.input.iter().all(|i| is_weight(graph, i))
        })
}
