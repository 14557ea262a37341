//! What the step op is shown besides the timestep and the latents: every input that can change the result.
//!
//! Inputs with a default count like all others: adapters (LoRA weights as inputs), scales and strengths are such inputs,
//! and two clients that differ in nothing else are two clients.

use super::Inputs;
use crate::onnx::{Graph, GraphInput, elem_type};

/// From this IR version on an initializer that is an input can be fed; before, it is a constant.
const OVERRIDABLE: i64 = 4;

/// A report speaks of defaults from this size on: reading them takes about 0.1 ms per MiB.
const WORTH_A_LINE: u64 = 64 << 20;

/// The inputs to be watched, in file order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    pub names: Vec<String>,
    /// Those of them that have a default.
    pub optional: Vec<String>,
    /// Bytes of the defaults, as far as sizes are known.
    pub optional_bytes: u64,
    /// Inputs that are no tensors, which an operator cannot be shown.
    pub hidden: Vec<String>,
}

impl Watched {
    pub fn new(graph: &Graph, inputs: &Inputs, ir_version: i64) -> Self {
        let mut watched = Self::default();
        let roles = [&inputs.timestep, &inputs.latents];
        let constant = |input: &GraphInput| input.has_default && ir_version < OVERRIDABLE;
        for input in &graph.inputs {
            if roles.contains(&&input.name) || constant(input) {
                continue;
            }
            if input.elem_type == 0 {
                watched.hidden.push(input.name.clone());
                continue;
            }
            watched.names.push(input.name.clone());
            if input.has_default {
                watched.optional.push(input.name.clone());
                let default = graph.initializers.get(&input.name);
                watched.optional_bytes += default.map_or(0, |d| {
                    let elements = d.dims.iter().map(|&d| d.max(0) as u64);
                    elements.fold(bytes_of(d.elem_type), u64::saturating_mul)
                });
            }
        }
        watched
    }

    /// What a report has to say about the cost, if it is worth a line.
    pub fn cost(&self) -> Option<String> {
        (self.optional_bytes >= WORTH_A_LINE).then(|| {
            format!(
                "{} inputs with a default ({} MiB) are read at every step of a run without dfa_request_id, to tell clients \
                 apart; if they are weights, export without keep_initializers_as_inputs",
                self.optional.len(),
                self.optional_bytes >> 20
            )
        })
    }
}

/// Bytes of an element; 4 where it is not known.
fn bytes_of(element: i32) -> u64 {
    match element {
        elem_type::DOUBLE | elem_type::INT64 => 8,
        elem_type::FLOAT16 | elem_type::BFLOAT16 => 2,
        elem_type::BOOL => 1,
        _ => 4,
    }
}
