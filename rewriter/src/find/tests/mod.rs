//! What is found in small models: one behaviour per test. Texts are read by [`crate::onnx::testing`].

mod module;
mod order;
mod sink;
mod source;
mod streams;

use super::{Choice, InputsRequest, Kind, Layer, Survey, survey};
use crate::onnx::ModelFile;
use crate::onnx::testing::model;

/// Latents `x`, in width 32, and what they become under the timestep, `h`; four heads of eight.
pub const HEAD: &str = "opset 23
    input x float [b, 64, 32]
    input t float [b]
    output out float [b, 64, 32]
    weight w [32, 32]
    weight f [1, 32]
    ints one [1]
    ints heads [0, 0, 4, 8]
    ints merged [0, 0, 32]
    t1 = Unsqueeze(t, one)
    tf = Mul(t1, f)
    ts = Sin(tf)
    te = Unsqueeze(ts, one)
    h = Add(x, te)";

/// Attention of `x` with its projections; `a{name}` is its result.
pub fn layer(x: &str, name: &str) -> String {
    format!(
        "q{name} = MatMul({x}, w)
         k{name} = MatMul({x}, w)
         v{name} = MatMul({x}, w)
         {}",
        attention(name)
    )
}

/// Attention of `q{name}`, `k{name}`, `v{name}` and its output projection.
pub fn attention(name: &str) -> String {
    format!(
        "o{name} = Attention(q{name}, k{name}, v{name}) q_num_heads=4 kv_num_heads=4
         a{name} = MatMul(o{name}, w)"
    )
}

/// What is found in `HEAD` with `body`.
pub fn found(body: &str) -> (ModelFile, Survey) {
    in_text(&format!("{HEAD}\n{body}"))
}

pub fn in_text(text: &str) -> (ModelFile, Survey) {
    let model = model(text);
    let survey = survey(&model.graph, &InputsRequest::default(), &Choice::default()).unwrap();
    (model, survey)
}

/// The layer around the node that makes `value`.
pub fn layer_of<'s>(survey: &'s Survey, value: &str) -> &'s Layer {
    match kind_of(survey, value) {
        Kind::Layer(layer) => layer,
        other => panic!("`{value}` is no layer's: {other:?}"),
    }
}

pub fn kind_of<'s>(survey: &'s Survey, value: &str) -> &'s Kind {
    let node = format!("node_{value}");
    let site = survey.sites.iter().find(|s| s.node == node);
    &site
        .unwrap_or_else(|| panic!("no site at `{node}`: {survey:?}"))
        .kind
}
