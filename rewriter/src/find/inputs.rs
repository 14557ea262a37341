//! Which graph input is the timestep, which are the latents, and which are conditioning.

use crate::onnx::{Graph, elem_type};
use std::collections::HashSet;

/// The graph inputs that the step op watches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inputs {
    pub timestep: String,
    pub latents: String,
    /// Every other input without a default, in file order.
    pub conditioning: Vec<String>,
}

/// What the user named explicitly.
#[derive(Clone, Debug, Default)]
pub struct InputsRequest {
    pub timestep: Option<String>,
    pub latents: Option<String>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InputsError {
    #[error("the model has no input called `{name}` ({option}); its inputs are {inputs}")]
    NoSuchInput {
        name: String,
        option: &'static str,
        inputs: String,
    },
    #[error(
        "no timestep input found: no graph input reaches a sinusoidal embedding (Sin/Cos); name it with --timestep-input, one of {inputs}"
    )]
    NoTimestep { inputs: String },
    #[error("several inputs could be the timestep: {candidates}; name it with --timestep-input")]
    ManyTimesteps { candidates: String },
    #[error(
        "no latents input found: expected a floating-point input of rank 3 or more among {inputs}; name it with --latents-input"
    )]
    NoLatents { inputs: String },
    #[error(
        "{option} {pattern}: no such layer; the model has {layers} self-attention layer(s), indices from 0; `dfa-rewrite inspect` lists them with their names"
    )]
    NoSuchLayer {
        option: &'static str,
        pattern: String,
        layers: usize,
    },
}

/// Finds the inputs by structure first and by customary names only to break ties.
///
/// # Errors
/// Names that are not inputs, and roles that cannot be decided.
pub fn find(graph: &Graph, request: &InputsRequest) -> Result<Inputs, InputsError> {
    let fed: Vec<_> = graph.inputs.iter().filter(|i| !i.has_default).collect();
    let names = || {
        let list: Vec<_> = fed.iter().map(|i| format!("`{}`", i.name)).collect();
        if list.is_empty() {
            "none".into()
        } else {
            list.join(", ")
        }
    };
    let named = |name: &String, option| {
        if graph.inputs.iter().any(|i| i.name == *name) {
            Ok(name.clone())
        } else {
            Err(InputsError::NoSuchInput {
                name: name.clone(),
                option,
                inputs: names(),
            })
        }
    };
    let timestep = match &request.timestep {
        Some(name) => named(name, "--timestep-input")?,
        None => {
            let candidates: Vec<_> = fed
                .iter()
                .filter(|i| could_be_timestep(i) && reaches_sinusoid(graph, &i.name))
                .map(|i| &i.name)
                .collect();
            match candidates.as_slice() {
                [] => return Err(InputsError::NoTimestep { inputs: names() }),
                [only] => (*only).clone(),
                many => {
                    let usual: Vec<_> = many.iter().filter(|n| is_timestep_name(n)).collect();
                    match usual.as_slice() {
                        [only] => (**only).clone(),
                        _ => {
                            let candidates = many
                                .iter()
                                .map(|n| format!("`{n}`"))
                                .collect::<Vec<_>>()
                                .join(", ");
                            return Err(InputsError::ManyTimesteps { candidates });
                        }
                    }
                }
            }
        }
    };
    let latents = match &request.latents {
        Some(name) => named(name, "--latents-input")?,
        None => {
            let rank = |i: &&&crate::onnx::GraphInput| i.dims.as_ref().map_or(0, Vec::len);
            let candidates: Vec<_> = fed
                .iter()
                .filter(|i| {
                    i.name != timestep
                        && (elem_type::is_supported_float(i.elem_type)
                            || i.elem_type == elem_type::DOUBLE)
                })
                .filter(|i| rank(i) >= 3)
                .collect();
            // What is denoised looks like what comes out; then customary names; then the highest rank (an image or a
            // video against a text sequence), then file order.
            let usual = |name: &str| {
                [
                    "hidden_states",
                    "sample",
                    "latents",
                    "latent",
                    "x",
                    "img",
                    "noisy_latents",
                ]
                .contains(&name)
            };
            let alike: Vec<_> = candidates
                .iter()
                .filter(|i| looks_like_output(graph, i))
                .collect();
            let best = match alike.as_slice() {
                [only] => Some(*only),
                _ => candidates
                    .iter()
                    .find(|i| usual(&i.name))
                    .or_else(|| candidates.iter().rev().max_by_key(|i| rank(i))),
            };
            best.ok_or_else(|| InputsError::NoLatents { inputs: names() })?
                .name
                .clone()
        }
    };
    let conditioning = fed
        .iter()
        .map(|i| i.name.clone())
        .filter(|n| *n != timestep && *n != latents)
        .collect();
    Ok(Inputs {
        timestep,
        latents,
        conditioning,
    })
}

/// Whether `input` has the shape of one of the model's results, the number of channels aside.
fn looks_like_output(graph: &Graph, input: &crate::onnx::GraphInput) -> bool {
    let Some(dims) = &input.dims else {
        return false;
    };
    graph.outputs.iter().any(|output| {
        let shape = graph
            .value_info
            .get(output)
            .and_then(|t| t.tensor_type.as_ref()?.shape.as_ref());
        shape.is_some_and(|shape| {
            let same = |(a, b): (&Result<i64, String>, &crate::onnx::DimensionProto)| match a {
                Ok(size) => b.dim_value == Some(*size),
                Err(name) => !name.is_empty() && b.dim_param.as_ref() == Some(name),
            };
            let differ = dims.iter().zip(&shape.dim).filter(|&p| !same(p)).count();
            shape.dim.len() == dims.len() && differ <= 1
        })
    })
}

fn is_timestep_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    [
        "t",
        "time",
        "timestep",
        "timesteps",
        "sigma",
        "t_step",
        "step",
    ]
    .contains(&lower.as_str())
        || lower.contains("timestep")
}

/// A timestep is a number per row (or one for all, or one per token); a few other inputs are embedded the same way.
fn could_be_timestep(input: &crate::onnx::GraphInput) -> bool {
    let numeric = elem_type::is_supported_float(input.elem_type)
        || matches!(
            input.elem_type,
            elem_type::DOUBLE | elem_type::INT64 | elem_type::INT32
        );
    let rank = input.dims.as_ref().map_or(1, Vec::len);
    let lower = input.name.to_ascii_lowercase();
    let other = ["guidance", "_ids", "resolution", "aspect", "size", "fps"]
        .iter()
        .any(|w| lower.contains(w));
    numeric && (rank <= 1 || (rank == 2 && is_timestep_name(&input.name))) && !other
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
                        if !output.is_empty() && seen.insert(output) && seen.len() < 4096 {
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

fn has_vector_operand(graph: &Graph, node: &crate::onnx::Node) -> bool {
    node.proto
        .input
        .iter()
        .filter_map(|i| graph.constant(i))
        .any(|c| c.dims.iter().filter(|&&d| d != 1).count() <= 1)
}
