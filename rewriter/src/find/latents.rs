//! Which graph input is denoised.
//!
//! What looks like the result, exactly before roughly; then customary names; then the highest rank. Names break ties inside a class,
//! and what is still equally likely is an error, not a guess.

use super::inputs::InputsError;
use crate::onnx::{DimensionProto, Graph, GraphInput, elem_type};

/// The latents among the inputs that are `fed`, of which the timestep is none; `None` if there is no candidate.
///
/// # Errors
/// [`InputsError::ManyLatents`] where several are as likely.
pub fn find(
    graph: &Graph,
    fed: &[&GraphInput],
    timestep: &str,
) -> Result<Option<String>, InputsError> {
    let candidates: Vec<&GraphInput> = fed
        .iter()
        .copied()
        .filter(|i| i.name != timestep && is_float(i) && rank(i) >= 2)
        .collect();
    let alike: Vec<_> = candidates
        .iter()
        .copied()
        .map(|i| (likeness(graph, i), i))
        .collect();
    for (class, why) in [
        (Likeness::Same, "each has the shape and type of a result"),
        (Likeness::Shape, "each has the shape of a result"),
        (
            Likeness::Channels,
            "each has the shape of a result but for one size",
        ),
    ] {
        let class: Vec<_> = alike.iter().filter(|(l, _)| *l == class).collect();
        let class: Vec<_> = class.into_iter().map(|&(_, i)| i).collect();
        if !class.is_empty() {
            return one_of(&class, why).map(Some);
        }
    }
    let usual: Vec<_> = candidates
        .iter()
        .copied()
        .filter(|i| is_usual_name(&i.name))
        .collect();
    if !usual.is_empty() {
        return one_of(&usual, "each has a customary name").map(Some);
    }
    // An image or a video against a text sequence.
    let highest = candidates.iter().map(|i| rank(i)).max().unwrap_or(0);
    let last: Vec<_> = candidates
        .into_iter()
        .filter(|i| highest >= 3 && rank(i) == highest)
        .collect();
    match last.is_empty() {
        true => Ok(None),
        false => one_of(&last, "none has the shape of a result or a customary name").map(Some),
    }
}

/// The only one, or the only one that has a customary name.
fn one_of(candidates: &[&GraphInput], why: &'static str) -> Result<String, InputsError> {
    let usual: Vec<_> = candidates
        .iter()
        .filter(|i| is_usual_name(&i.name))
        .collect();
    match (candidates, usual.as_slice()) {
        ([only], _) => Ok(only.name.clone()),
        (_, [only]) => Ok(only.name.clone()),
        _ => Err(InputsError::ManyLatents {
            candidates: candidates
                .iter()
                .map(|i| format!("`{}`", i.name))
                .collect::<Vec<_>>()
                .join(", "),
            why,
        }),
    }
}

fn is_usual_name(name: &str) -> bool {
    [
        "hidden_states",
        "sample",
        "latents",
        "latent",
        "x",
        "img",
        "noise",
        "x_t",
        "noisy_latents",
        "noisy_latent",
        "noisy_sample",
        "latent_model_input",
    ]
    .contains(&name.to_ascii_lowercase().as_str())
}

fn is_float(input: &GraphInput) -> bool {
    elem_type::is_supported_float(input.elem_type) || input.elem_type == elem_type::DOUBLE
}

fn rank(input: &GraphInput) -> usize {
    input.dims.as_ref().map_or(0, Vec::len)
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Likeness {
    None,
    /// All sizes but one.
    Channels,
    Shape,
    /// Shape and type.
    Same,
}

/// How much `input` looks like one of the model's results.
fn likeness(graph: &Graph, input: &GraphInput) -> Likeness {
    let Some(dims) = &input.dims else {
        return Likeness::None;
    };
    let of = |output: &String| {
        let tensor = graph
            .value_info
            .get(output)
            .and_then(|t| t.tensor_type.as_ref());
        let Some((tensor, shape)) = tensor.and_then(|t| Some((t, t.shape.as_ref()?))) else {
            return Likeness::None;
        };
        if shape.dim.len() != dims.len() {
            return Likeness::None;
        }
        let same: Vec<bool> = dims.iter().zip(&shape.dim).map(is_same).collect();
        match same.iter().filter(|&&s| !s).count() {
            0 if tensor.elem_type == input.elem_type => Likeness::Same,
            0 => Likeness::Shape,
            // Of two axes the batch alone says nothing.
            1 if dims.len() >= 3 => Likeness::Channels,
            _ => Likeness::None,
        }
    };
    let all = graph.outputs.iter().map(of);
    all.max().unwrap_or(Likeness::None)
}

fn is_same((input, output): (&Result<i64, String>, &DimensionProto)) -> bool {
    match input {
        Ok(size) => output.dim_value == Some(*size),
        Err(name) => !name.is_empty() && output.dim_param.as_ref() == Some(name),
    }
}
