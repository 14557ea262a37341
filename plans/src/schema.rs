//! The JSON Schema of plan files: what an editor can check while a plan is typed.
//!
//! The types here are read by schemars and never instantiated. A schema cannot compare lengths or
//! find repeated keys, so `parse` has the last word; what `parse` accepts, the schema accepts.
#![allow(dead_code, reason = "read by schemars, never built")]

use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, json_schema};

use crate::parse::{FORMAT, VERSION};
use crate::{Action, Cfg, DEFAULT_WINDOW, Fingerprint, TextTokens};

/// What every self-attention layer of a diffusion transformer computes at every step.
#[derive(JsonSchema)]
#[schemars(title = "DiTFastAttn plan", deny_unknown_fields, transform = halves_need_cfg)]
struct Document {
    /// Says that this is a plan.
    #[schemars(extend("const" = FORMAT))]
    format: String,
    /// Version of the format.
    #[schemars(extend("const" = VERSION))]
    version: u32,
    /// What people call the plan.
    #[schemars(with = "String", skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// The threshold that the search was given. Informative.
    #[schemars(with = "f64", range(min = 0), skip_serializing_if = "Option::is_none")]
    delta: Option<f64>,
    /// Half-width of the band as a fraction of the image tokens.
    #[schemars(default = "default_window", range(max = 1), extend("exclusiveMinimum" = 0))]
    #[schemars(skip_serializing_if = "never")]
    window: f64,
    /// How the two predictions of classifier-free guidance reach the model.
    #[schemars(default, skip_serializing_if = "never")]
    cfg: Cfg,
    /// The timesteps as the model is fed them, one per step. Absent: steps are counted.
    #[schemars(
        with = "Vec<f64>",
        length(min = 1),
        skip_serializing_if = "Option::is_none"
    )]
    timesteps: Option<Vec<f64>>,
    /// Text tokens inside the sequence (joint attention).
    #[schemars(with = "TextTokens", skip_serializing_if = "Option::is_none")]
    text: Option<TextTokens>,
    /// What the plan was made for.
    #[schemars(with = "Fingerprint", skip_serializing_if = "Option::is_none")]
    model: Option<Fingerprint>,
    /// One row per step, in it one action per layer. The first row has nothing to reuse.
    #[schemars(schema_with = "steps")]
    steps: Vec<Vec<Action>>,
}

/// Has the default shown in the schema, which omits the defaults that are skipped.
fn never<T>(_: &T) -> bool {
    false
}

fn default_window() -> f64 {
    DEFAULT_WINDOW
}

fn steps(generator: &mut SchemaGenerator) -> Schema {
    let action = generator.subschema_for::<Action>();
    json_schema!({
        "type": "array",
        "minItems": 1,
        "prefixItems": [{"type": "array", "minItems": 1, "items": {"enum": ["full", "asc"]}}],
        "items": {"type": "array", "minItems": 1, "items": action},
    })
}

/// Without `cfg` (or with `none`) there are no halves for `asc` to share.
fn halves_need_cfg(schema: &mut Schema) {
    let whole: Vec<&str> = Action::ALL
        .into_iter()
        .filter(|a| !a.uses_halves())
        .map(Action::name)
        .collect();
    schema.insert(
        "if".to_owned(),
        serde_json::json!({"properties": {"cfg": {"const": "none"}}}),
    );
    schema.insert(
        "then".to_owned(),
        serde_json::json!({"properties": {"steps": {"items": {"items": {"enum": whole}}, "prefixItems": [{"items": {"const": "full"}}]}}}),
    );
}

/// The JSON Schema (draft 2020-12) of plan files, as committed in `plan.schema.json`.
pub fn json_schema() -> serde_json::Value {
    let settings = SchemaSettings::draft2020_12().for_serialize();
    settings
        .into_generator()
        .into_root_schema_for::<Document>()
        .to_value()
}
