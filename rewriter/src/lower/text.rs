//! How many of a layer's tokens are text, and how the op learns it.

use super::LowerError;
use crate::find::{Layer, Piece, Survey, Text};
use crate::onnx::Graph;
use ditfastattn_plans::{Plan, Side};
use std::collections::BTreeSet;

/// What the op is told about text.
#[derive(Clone, Debug, PartialEq)]
pub enum TextTokens {
    /// The layer has image tokens only, though others of the model have text: the plan's text is not meant for it.
    Never,
    /// What the plan says, if it says anything.
    ByPlan,
    /// Known when the model is rewritten.
    Fixed { tokens: i64, at_start: bool },
    /// The sum of the sizes of these axes.
    Measured {
        axes: Vec<(String, usize)>,
        at_start: bool,
    },
}

impl TextTokens {
    /// The same without a plan at hand when the model runs: the plan's word, where it has one, is fixed now.
    pub fn settled(self, plan: &Plan) -> Self {
        match (self, plan.text) {
            (Self::Never, _) => Self::Never,
            (_, Some(text)) => Self::Fixed {
                tokens: text.tokens as i64,
                at_start: text.side == Side::Start,
            },
            (told, None) => told,
        }
    }
}

/// Text of all layers of a model.
pub struct Texts<'a> {
    graph: &'a Graph,
    survey: &'a Survey,
    any: bool,
    /// Nodes that leave the main graph, by layer.
    moved: Vec<BTreeSet<usize>>,
}

impl<'a> Texts<'a> {
    pub fn new(graph: &'a Graph, survey: &'a Survey) -> Self {
        let moved = survey.layers().map(|l| match &l.module {
            Ok(m) => m.inside.difference(&m.duplicated).copied().collect(),
            Err(_) => BTreeSet::new(),
        });
        Self {
            graph,
            survey,
            any: survey.has_text(),
            moved: moved.collect(),
        }
    }

    /// How `layer` learns of its text tokens under `plan`.
    ///
    /// # Errors
    /// [`LowerError::TextUnknown`] where the graph does not show them and the plan does not say.
    pub fn of(&self, layer: &Layer, plan: &Plan) -> Result<TextTokens, LowerError> {
        let unknown = |why: String| {
            if plan.text.is_some() {
                return Ok(TextTokens::ByPlan);
            }
            Err(LowerError::TextUnknown {
                layer: layer.index,
                node: self.survey.label(layer),
                why,
            })
        };
        match &layer.text {
            Text::None if layer.joint => unknown(
                "joint attention of two streams, and the graph does not show which of them is text"
                    .into(),
            ),
            Text::Lost { node, why } => unknown(format!(
                "whether its sequence holds text tokens is not known: their trail ends at `{node}` ({why})"
            )),
            Text::None if self.any => Ok(TextTokens::Never),
            Text::None => Ok(TextTokens::ByPlan),
            Text::Scattered => unknown("text tokens on both sides of the image tokens".into()),
            Text::Known { pieces, at_start } => {
                let at_start = *at_start;
                if let Some(tokens) = layer.text.known() {
                    return Ok(TextTokens::Fixed { tokens, at_start });
                }
                match pieces.iter().map(|p| self.measure(layer, p)).collect() {
                    Some(axes) => Ok(TextTokens::Measured { axes, at_start }),
                    None => {
                        unknown("the number of its text tokens is hidden in another layer".into())
                    }
                }
            }
        }
    }

    /// A value that the layer's op can see and the axis of it that is as long as `piece`.
    fn measure(&self, layer: &Layer, piece: &Piece) -> Option<(String, usize)> {
        let visible = match self.graph.producer_index(&piece.measured.0) {
            Some((node, _)) => self
                .moved
                .iter()
                .enumerate()
                .all(|(l, moved)| l == layer.index || !moved.contains(&node)),
            None => true,
        };
        if visible {
            return Some(piece.measured.clone());
        }
        self.graph.inputs.iter().find_map(|input| {
            let shape = self.survey.facts.shape(&input.name)?;
            let axis = shape.iter().position(|d| *d == piece.tokens)?;
            Some((input.name.clone(), axis))
        })
    }
}
