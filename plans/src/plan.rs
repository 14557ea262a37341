//! The plan as a value, with the few questions that everybody asks of it.
//!
//! Reading and checking are in `parse`, writing in `write`; nothing here decides what is valid.

use schemars::JsonSchema;
use serde::Serialize;

use crate::{Action, PlanError};

/// Half-width of the band as a fraction of the image tokens unless a plan says otherwise: the
/// paper's 1/8.
pub const DEFAULT_WINDOW: f64 = 0.125;

/// How the two predictions of classifier-free guidance reach the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Cfg {
    /// One batch, `[conditional, unconditional]` (DiT).
    CondFirst,
    /// One batch, `[unconditional, conditional]` (PixArt, SD3).
    UncondFirst,
    /// Two runs with the same timestep, conditional first (Flux true-CFG, Wan).
    Separate,
    /// No guidance, or guidance that is a model input: no halves to share.
    #[default]
    None,
}

impl Cfg {
    /// Every value, in the order of the documentation.
    pub const ALL: [Cfg; 4] = [Cfg::CondFirst, Cfg::UncondFirst, Cfg::Separate, Cfg::None];

    /// The name in plan files.
    pub const fn name(self) -> &'static str {
        match self {
            Cfg::CondFirst => "cond-first",
            Cfg::UncondFirst => "uncond-first",
            Cfg::Separate => "separate",
            Cfg::None => "none",
        }
    }
}

/// Where the text tokens of a joint sequence are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Before the image tokens (Flux).
    Start,
    /// After the image tokens (SD3).
    End,
}

impl Side {
    /// The name in plan files.
    pub const fn name(self) -> &'static str {
        match self {
            Side::Start => "start",
            Side::End => "end",
        }
    }
}

/// The tokens of a joint sequence that are no image tokens: they see all and are seen by all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextTokens {
    /// How many.
    #[schemars(range(max = 4294967295u32))]
    pub tokens: usize,
    /// At which end of the sequence.
    pub side: Side,
}

/// What the plan was made for. Absent numbers are not compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// Self-attention layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "usize", range(min = 1, max = 4294967295u32))]
    pub layers: Option<usize>,
    /// Attention heads of a layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "usize", range(min = 1, max = 4294967295u32))]
    pub heads: Option<usize>,
    /// Channels of a head.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "usize", range(min = 1, max = 4294967295u32))]
    pub head_dim: Option<usize>,
    /// Tokens of a sequence, text included.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "usize", range(min = 1, max = 4294967295u32))]
    pub tokens: Option<usize>,
}

impl Fingerprint {
    /// The first number on which both sides speak and disagree: its key in the plan file, the
    /// value of `self`, the value of `found`.
    pub fn mismatch(&self, found: &Fingerprint) -> Option<(&'static str, usize, usize)> {
        [
            ("layers", self.layers, found.layers),
            ("heads", self.heads, found.heads),
            ("head_dim", self.head_dim, found.head_dim),
            ("tokens", self.tokens, found.tokens),
        ]
        .into_iter()
        .find_map(|(key, expected, found)| match (expected, found) {
            (Some(expected), Some(found)) if expected != found => Some((key, expected, found)),
            _ => None,
        })
    }
}

/// What every attention layer does at every step.
///
/// A plan from [`Plan::parse`] is valid. The fields are open so that a search can build one;
/// [`Plan::validate`] applies the file's rules to the result.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// What people call it, as the paper's "D3".
    pub name: Option<String>,
    /// The threshold δ that the search was given (Algorithm 1). Informative.
    pub delta: Option<f64>,
    /// Half-width of the band as a fraction of the image tokens, `0 < window ≤ 1`.
    pub window: f64,
    /// How guidance reaches the model.
    pub cfg: Cfg,
    /// The timesteps as the model is fed them, one per step; absent: steps are counted.
    pub timesteps: Option<Vec<f64>>,
    /// Text tokens inside the sequence; absent: none, or what the graph shows.
    pub text: Option<TextTokens>,
    /// What the plan was made for; absent: not compared.
    pub model: Option<Fingerprint>,
    /// One row per step, in it one action per layer.
    pub steps: Vec<Vec<Action>>,
}

impl Plan {
    /// A plan that changes nothing: `steps` rows of `layers` full actions, everything else default.
    pub fn all_full(layers: usize, steps: usize) -> Plan {
        Plan {
            name: None,
            delta: None,
            window: DEFAULT_WINDOW,
            cfg: Cfg::None,
            timesteps: None,
            text: None,
            model: None,
            steps: vec![vec![Action::Full; layers]; steps],
        }
    }

    /// Attention layers, as many as a row has actions.
    pub fn layers(&self) -> usize {
        self.steps.first().map_or(0, Vec::len)
    }

    /// This plan with every layer full at every step.
    pub fn with_all_full(&self) -> Plan {
        let Plan { steps, .. } = Plan::all_full(self.layers(), self.step_count());
        Plan {
            steps,
            ..self.clone()
        }
    }

    /// Diffusion steps.
    pub fn step_count(&self) -> usize {
        self.steps.len()
    }

    /// What `layer` does at `step`; [`Action::Full`] outside the plan, which is always right.
    pub fn action(&self, step: usize, layer: usize) -> Action {
        let row = self.steps.get(step);
        row.and_then(|row| row.get(layer))
            .copied()
            .unwrap_or(Action::Full)
    }

    /// Half-width of the band in tokens: `max(1, floor(window · (tokens − text)))`.
    ///
    /// `tokens` is the whole sequence, `text` its text tokens. Token i sees j iff |i − j| ≤ the
    /// half-width, or one of them is a text token.
    pub fn half_width(&self, tokens: usize, text: usize) -> usize {
        half_width(self.window, tokens, text)
    }

    /// Whether the plan can serve other schedules than its own: it has timesteps, and they go one way.
    ///
    /// # Errors
    /// Why not.
    pub fn one_way(&self) -> Result<(), String> {
        let Some(list) = &self.timesteps else {
            return Err(
                "the plan has no `timesteps`, so nothing says which row a timestep is nearest to"
                    .into(),
            );
        };
        let falls = match (list.first(), list.last()) {
            (Some(first), Some(last)) if first != last => last < first,
            _ => return Err("the plan's `timesteps` do not move".into()),
        };
        match list
            .windows(2)
            .find(|w| w[0] != w[1] && (w[1] < w[0]) != falls)
        {
            Some(w) => Err(format!(
                "the plan's `timesteps` do not go one way: {} comes before {}",
                w[0], w[1]
            )),
            None => Ok(()),
        }
    }

    /// Applies the rules of the file to a plan that was built in memory.
    ///
    /// # Errors
    ///
    /// The refusal, with a position in [`Plan::to_json_pretty`].
    pub fn validate(&self) -> Result<(), PlanError> {
        Plan::parse(&self.to_json_pretty()).map(drop)
    }
}

/// [`Plan::half_width`] of a window that is in no plan yet.
pub(crate) fn half_width(window: f64, tokens: usize, text: usize) -> usize {
    let image = tokens.saturating_sub(text);
    // A float that does not fit saturates, and NaN becomes 0, by the rules of `as`.
    ((window * image as f64).floor() as usize).max(1)
}
