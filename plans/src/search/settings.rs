//! Everything that determines a search, and the order in which candidates are tried.

use crate::plan::half_width;
use crate::{Action, Cfg, Fingerprint, LayerWork, Metric, TextTokens};

/// The paper's order of candidates, the same for every model: AST, WA-RS+ASC, WA-RS, ASC.
///
/// At few tokens it is not ascending in cost: below 4096 tokens of width 1152, ASC costs less than
/// WA-RS (Table 2). [`candidates_by_cost`] knows the model.
pub const PAPER_ORDER: [Action; 4] = [Action::Ast, Action::WaRsAsc, Action::WaRs, Action::Asc];

/// Everything that determines a search: two searches with equal settings over the same model find
/// the same plan, byte for byte.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// What identifies the model, as a digest of its file. Compared on resume, never interpreted.
    pub model_hash: String,
    /// What identifies the calibration inputs (latents, conditioning, seeds, scheduler, guidance
    /// scale), as a digest. Compared on resume, never interpreted.
    pub inputs_hash: String,
    /// The model's sizes, which the plan will carry.
    pub model: Option<Fingerprint>,
    /// Diffusion steps T, from 1.
    pub steps: usize,
    /// The threshold δ of Algorithm 1, from 0.
    pub delta: f64,
    /// The loss.
    pub metric: Metric,
    /// Half-width of the band as a fraction of the image tokens, above 0, at most 1.
    pub window: f64,
    /// How guidance reaches the model.
    pub cfg: Cfg,
    /// The timesteps as the model is fed them, one per step.
    pub timesteps: Option<Vec<f64>>,
    /// Text tokens inside the sequence.
    pub text: Option<TextTokens>,
    /// For each layer the candidates in the order in which they are tried. A layer without
    /// candidates stays `full`. [`candidates_by_cost`] and [`candidates_in_order`] make such lists.
    pub candidates: Vec<Vec<Action>>,
}

/// No plan file holds more (see [`MAX_PLAN_BYTES`](crate::MAX_PLAN_BYTES)).
const MOST_CELLS: usize = crate::MAX_PLAN_BYTES;

/// Settings that no search can be run with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("search settings: {0}")]
pub struct InvalidSettings(String);

impl Settings {
    /// Layers, as many as there are lists of candidates.
    pub fn layers(&self) -> usize {
        self.candidates.len()
    }

    /// What the loss of a candidate of `layer` (from 0) has to be strictly below, `(i / |M|) · δ`
    /// with i from 1: the first layer has the least to spend, the last one all of δ (Algorithm 1).
    /// With δ = 0 every layer stays `full`.
    pub fn threshold(&self, layer: usize) -> f64 {
        self.delta * (layer + 1) as f64 / self.layers() as f64
    }

    /// Checks what [`LossTable::new`](crate::LossTable::new) will insist on.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, and what was expected.
    pub fn validate(&self) -> Result<(), InvalidSettings> {
        let wrong = |what: String| Err(InvalidSettings(what));
        if self.steps == 0 || self.candidates.is_empty() {
            let (steps, layers) = (self.steps, self.layers());
            return wrong(format!(
                "expected at least one step and one layer, found {steps} steps and {layers} layers"
            ));
        }
        if self.steps.saturating_mul(self.layers()) > MOST_CELLS {
            let (steps, layers) = (self.steps, self.layers());
            return wrong(format!(
                "expected at most {MOST_CELLS} layer-steps, found {steps} steps of {layers} layers"
            ));
        }
        if !(self.delta >= 0.0 && self.delta.is_finite()) {
            return wrong(format!(
                "delta must be a finite number from 0, found {}",
                self.delta
            ));
        }
        if !(self.window > 0.0 && self.window <= 1.0) {
            return wrong(format!(
                "window must be above 0 and at most 1, found {}",
                self.window
            ));
        }
        if let Some(timesteps) = &self.timesteps {
            if timesteps.len() != self.steps {
                let (found, steps) = (timesteps.len(), self.steps);
                return wrong(format!(
                    "expected one timestep per step ({steps}), found {found}"
                ));
            }
            if let Some(value) = timesteps.iter().find(|value| !value.is_finite()) {
                return wrong(format!("timesteps must be finite, found {value}"));
            }
        }
        for (layer, candidates) in self.candidates.iter().enumerate() {
            for (i, action) in candidates.iter().enumerate() {
                if *action == Action::Full {
                    return wrong(format!(
                        "layer {layer} has the candidate full, which is what remains when no candidate passes; remove it"
                    ));
                }
                if candidates[..i].contains(action) {
                    return wrong(format!(
                        "layer {layer} has the candidate {action} twice; keep one"
                    ));
                }
                if action.uses_halves() && self.cfg == Cfg::None {
                    return wrong(format!(
                        "layer {layer} has the candidate {action}, which needs the two halves of guidance, but cfg is none; set cfg or remove it"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// The candidates of every layer in ascending order of what they cost at module level for that
/// layer's sizes; at equal cost in the paper's order.
///
/// Left out are ASC candidates where `cfg` has no halves, and windowed ones where the band covers
/// every token pair: they would compute what their full counterparts do.
pub fn candidates_by_cost(layers: &[LayerWork], window: f64, cfg: Cfg) -> Vec<Vec<Action>> {
    let of = |layer: &LayerWork| {
        let (tokens, text) = (layer.work.tokens, layer.work.text);
        let half_width = half_width(window, tokens, text);
        let covered = layer.work.window_covers(half_width);
        let density = crate::band_density(tokens, text, half_width);
        let mut candidates = PAPER_ORDER.to_vec();
        candidates.retain(|action| !(covered && action.is_windowed()));
        candidates.retain(|action| !(cfg == Cfg::None && action.uses_halves()));
        let cost = |action: &Action| layer.module_share(*action, density);
        candidates.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
        candidates
    };
    layers.iter().map(of).collect()
}

/// The same `order` (such as [`PAPER_ORDER`]) for every layer, less the ASC candidates where `cfg`
/// has no halves.
pub fn candidates_in_order(order: &[Action], layers: usize, cfg: Cfg) -> Vec<Vec<Action>> {
    let mut order = order.to_vec();
    order.retain(|action| !(cfg == Cfg::None && action.uses_halves()));
    vec![order; layers]
}
