//! Which graph input is the timestep, which are the latents, and which are conditioning.

use super::{latents, timestep};
use crate::onnx::Graph;

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
        "no timestep input found: no graph input reaches a sinusoidal embedding (Sin/Cos), and none is an integer that picks a row of a table; name it with --timestep-input, one of {inputs}"
    )]
    NoTimestep { inputs: String },
    #[error("several inputs could be the timestep: {candidates}; name it with --timestep-input")]
    ManyTimesteps { candidates: String },
    #[error(
        "no latents input found: expected a floating-point input of rank 3 or more, or one with the shape of a result, among {inputs}; name it with --latents-input"
    )]
    NoLatents { inputs: String },
    #[error(
        "several inputs could be the latents: {candidates} ({why}); name the one that is denoised with --latents-input"
    )]
    ManyLatents {
        candidates: String,
        why: &'static str,
    },
    #[error(
        "the model's attention is out of reach: {reason}; export the denoiser without it, so that its attention is in the main graph"
    )]
    InSubgraph { reason: String },
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
        None => timestep::find(graph, &fed)?
            .ok_or_else(|| InputsError::NoTimestep { inputs: names() })?,
    };
    let latents = match &request.latents {
        Some(name) => named(name, "--latents-input")?,
        None => latents::find(graph, &fed, &timestep)?
            .ok_or_else(|| InputsError::NoLatents { inputs: names() })?,
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
