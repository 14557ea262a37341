//! The sizes of every layer, as the plan's accounting wants them.
//!
//! Owns where they come from: the graph, the plan, and what the user says of what is only known when the model runs. Computes
//! no costs: that is `ditfastattn_plans`.

use crate::find::{Layer, Survey, Text};
use crate::onnx::elem_type;
use crate::shapes::{BATCH, Dim};
use ditfastattn_plans::{CacheShape, Cfg, LayerWork, Plan, Workload};

/// What the user says about sizes that the graph leaves open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Tokens of a sequence, text included, in layers where the graph does not fix them.
    pub tokens: Option<usize>,
    /// The same layer by layer, where they were measured.
    pub tokens_by_layer: Vec<usize>,
    /// How many of them are text, in layers with text that neither the plan nor the graph fixes.
    pub text: Option<usize>,
    /// Batch rows of a whole step; else the exported batch, else those of one image.
    pub rows: Option<usize>,
}

/// A size that is not known, by the layer that lacks it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unknown {
    pub layer: usize,
    pub what: &'static str,
}

/// The sizes of all layers for one step of `plan`.
///
/// # Errors
/// The first size that is neither in the graph nor given.
pub fn layers(survey: &Survey, plan: &Plan, given: &Given) -> Result<Vec<LayerWork>, Unknown> {
    // CFG in one batch, or as two runs of one row each; without CFG one row. An exported batch is what it is.
    // Rows that the graph doubles are folded into its layers' rows.
    let doubled = !survey.facts.pairs().is_empty();
    let per_image = match plan.cfg == Cfg::None || doubled {
        true => 1,
        false => 2,
    };
    let exported = survey.facts.static_batch;
    let exported = exported.and_then(|b| usize::try_from(b).ok());
    let rows = given.rows.or(exported).unwrap_or(per_image);
    let any_text = survey.has_text();
    survey
        .layers()
        .map(|layer| {
            let unknown = |what| Unknown {
                layer: layer.index,
                what,
            };
            let tokens = layer.core.tokens.as_ref().and_then(known);
            // A layer without windows leaves nothing to measure.
            let measured = given.tokens_by_layer.get(layer.index).copied();
            let measured = measured.filter(|&n| n > 0);
            let tokens = measured
                .or(tokens)
                .or(given.tokens)
                .ok_or(unknown("tokens"))?;
            let width = width(layer).ok_or(unknown("heads and head size"))?;
            let text = text(layer, any_text, plan, given).ok_or(unknown("text tokens"))?;
            let work = Workload {
                tokens,
                text: text.min(tokens),
                width,
                rows: rows * folded(survey, layer),
            };
            // Q and output projections, and K and V ones of as many heads as there are.
            let kv_share = match (layer.core.kv_heads, layer.core.heads) {
                (Some(kv), Some(heads)) if heads > 0 => kv as f64 / heads as f64,
                _ => 1.0,
            };
            Ok(LayerWork {
                work,
                projection_per_token: 2.0 * (1.0 + kv_share) * (width * width) as f64,
                shares_projections: layer.module.is_ok(),
            })
        })
        .collect()
}

/// The cached tensors of these layers.
pub fn caches(survey: &Survey, works: &[LayerWork]) -> Vec<CacheShape> {
    let element_bytes = |layer: &Layer| match layer.core.elem_type {
        elem_type::FLOAT16 | elem_type::BFLOAT16 => 2,
        _ => 4,
    };
    let shape = |(layer, work): (&Layer, &LayerWork)| CacheShape {
        rows: work.work.rows,
        tokens: work.work.tokens,
        width: work.work.width,
        element_bytes: element_bytes(layer),
    };
    survey.layers().zip(works).map(shape).collect()
}

fn known(dim: &Dim) -> Option<usize> {
    usize::try_from(dim.known()?).ok()
}

fn width(layer: &Layer) -> Option<usize> {
    let (heads, dim) = (layer.core.heads?, layer.core.head_dim?);
    usize::try_from(heads.checked_mul(dim)?).ok()
}

fn text(layer: &Layer, any_text: bool, plan: &Plan, given: &Given) -> Option<usize> {
    match (&layer.text, plan.text) {
        // Another layer's sequence has text, this one's has not.
        (Text::None, _) if any_text && !layer.joint => Some(0),
        (_, Some(text)) => Some(text.tokens),
        (text @ Text::Known { .. }, None) => {
            let known = text.known().and_then(|n| usize::try_from(n).ok());
            known.or(given.text)
        }
        (Text::None, None) if !layer.joint => Some(0),
        (_, None) => given.text,
    }
}

/// Sequences for each row of the batch: frames or positions that the model has folded into it.
fn folded(survey: &Survey, layer: &Layer) -> usize {
    let rows = layer.core.q.size(&survey.facts, 'B');
    rows.and_then(|rows| known(&rows.over(&Dim::from(BATCH))?))
        .unwrap_or(1)
}
