//! Finding attention by dataflow. Read-only: says what every softmax and attention operator is, and why.
//!
//! The order of things: `inputs` names the timestep, the latents (`timestep`, `latents`) and the conditioning; `anchor` recognises
//! softmax(q·kᵀ)·v in any dialect; `source` follows q, k and v back to their projections and so tells self- from
//! cross-attention; `streams` tells text tokens from image tokens; `module` tries to isolate the whole attention module,
//! with `batch` to prove that halves of it are halves of the batch, `sink` for where it ends and `target` for shapes that
//! have the batch in them. `linear`, `online` and `subgraph` name attention that is left alone. A new exporter dialect is a new way of finding, never a change in lowering. Every non-match
//! carries a reason and the nodes it is about.

mod anchor;
mod batch;
mod choice;
mod inputs;
mod latents;
mod linear;
mod module;
mod online;
mod operand;
mod order;
mod pair;
mod sink;
mod source;
mod streams;
mod subgraph;
mod survey;
mod target;
#[cfg(test)]
mod tests;
mod timestep;
mod watched;

pub use anchor::{Core, Mask, Term};
pub use choice::{Choice, Pattern};
pub use inputs::{Inputs, InputsError, InputsRequest};
pub use module::{Module, dead_without, sweep_dead};
pub use operand::{Operand, Prep};
pub(crate) use source::Dependence;
pub use streams::{Piece, Text};
pub use survey::{Kind, Layer, Site, Survey, survey};
pub use target::Target;
pub(crate) use timestep::indexes_table;
pub use watched::Watched;

/// Why something does not match, with the names of the nodes it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    pub text: String,
    pub nodes: Vec<String>,
}

impl Reason {
    pub(crate) fn new(
        text: impl Into<String>,
        nodes: impl IntoIterator<Item = impl Into<String>>,
    ) -> Self {
        Self {
            text: text.into(),
            nodes: nodes.into_iter().map(Into::into).collect(),
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)?;
        if !self.nodes.is_empty() {
            write!(f, " (at {})", self.nodes.join(", "))?;
        }
        Ok(())
    }
}
