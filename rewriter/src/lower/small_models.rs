//! What is refused, and what is written for small models.

use super::{Form, LowerError, Lowered, RequestInputs, lower};
use crate::find::{Choice, InputsRequest, Survey, survey};
use crate::onnx::{GraphEdit, ModelFile, elem_type, testing};
use ditfastattn_plans::{Action, Cfg, Fingerprint, Plan, Side, TextTokens};
use std::path::Path;

/// Two layers; `body` stands between them, from `h1` to `h2`.
fn text(head: &str, body: &str) -> String {
    format!(
        "opset 23
         {head}
         input t float [b]
         output out float [b, 64, 32]
         weight w [32, 32]
         weight f [1, 32]
         ints one [1]
         t1 = Unsqueeze(t, one)
         tf = Mul(t1, f)
         ts = Sin(tf)
         te = Unsqueeze(ts, one)
         h0 = Add(x, te)
         {}
         h1 = Add(h0, a1)
         {body}
         {}
         out = Add(x, a2)",
        layer("h0", 1),
        layer("h2", 2)
    )
}

fn layer(x: &str, name: usize) -> String {
    format!(
        "q{name} = MatMul({x}, w)
         k{name} = MatMul({x}, w)
         v{name} = MatMul({x}, w)
         o{name} = Attention(q{name}, k{name}, v{name}) q_num_heads=4 kv_num_heads=4
         a{name} = MatMul(o{name}, w)"
    )
}

const X: &str = "input x float [b, 64, 32]";
const SAME: &str = "h2 = Identity(h1)";

fn model(head: &str, body: &str) -> ModelFile {
    testing::model(&text(head, body))
}

fn surveyed(model: &ModelFile) -> Survey {
    let (request, choice) = (InputsRequest::default(), Choice::default());
    survey(&model.graph, &request, &choice).unwrap()
}

/// A plan for two layers whose second step is `action` in both.
fn plan(action: Action) -> Plan {
    Plan {
        cfg: Cfg::CondFirst,
        steps: vec![vec![Action::Full; 2], vec![action; 2]],
        ..Plan::all_full(2, 2)
    }
}

fn lowered(model: &ModelFile, plan: &Plan) -> Result<Lowered, LowerError> {
    lower(model, &surveyed(model), plan, RequestInputs::Optional)
}

fn refusal(model: &ModelFile, plan: &Plan) -> LowerError {
    match lowered(model, plan) {
        Ok(_) => panic!("it was rewritten"),
        Err(error) => error,
    }
}

fn written(model: &ModelFile, plan: &Plan) -> ModelFile {
    let bytes = lowered(model, plan).unwrap().pieces.concat();
    ModelFile::parse(Path::new("out.onnx"), bytes.into()).unwrap()
}

#[test]
fn a_rewritten_model_is_not_rewritten_again() {
    let once = written(&model(X, SAME), &plan(Action::Ast));
    assert!(matches!(
        refusal(&once, &plan(Action::Ast)),
        LowerError::AlreadyRewritten
    ));
}

#[test]
fn without_a_layer_there_is_nothing_to_rewrite_and_the_reasons_are_said() {
    let cross = text(&format!("{X}\n input prompt float [b, 8, 32]"), SAME);
    let cross = cross.replace("k1 = MatMul(h0", "k1 = MatMul(prompt");
    let cross = cross.replace("k2 = MatMul(h2", "k2 = MatMul(prompt");
    let error = refusal(&testing::model(&cross), &plan(Action::Ast));
    assert!(
        matches!(error, LowerError::NothingToRewrite { sites: 2, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("2 × cross-attention"), "{error}");
}

#[test]
fn a_plan_for_another_number_of_layers_does_not_fit() {
    let error = refusal(&model(X, SAME), &Plan::all_full(3, 2));
    assert!(
        matches!(
            error,
            LowerError::PlanDoesNotFit {
                key: "layers",
                plan: 3,
                model: 2
            }
        ),
        "{error}"
    );
}

#[test]
fn a_plan_for_other_heads_does_not_fit() {
    let expected = Fingerprint {
        heads: Some(16),
        ..Fingerprint::default()
    };
    let plan = Plan {
        model: Some(expected),
        ..plan(Action::Ast)
    };
    let error = refusal(&model(X, SAME), &plan);
    assert!(
        matches!(
            error,
            LowerError::PlanDoesNotFit {
                key: "heads",
                plan: 16,
                model: 4
            }
        ),
        "{error}"
    );
}

/// A prompt in front of the latents, of which the second layer has lost sight.
fn out_of_sight() -> ModelFile {
    let text = text(
        "input x float [b, 64, 32]
         input prompt float [b, 8, 32]
         input length int64 [b]",
        "h2 = ReverseSequence(h1, length) batch_axis=0 time_axis=1",
    );
    let text = text.replace(
        "h0 = Add(x, te)",
        "y = Add(x, te)\n h0 = Concat(prompt, y) axis=1",
    );
    testing::model(&text)
}

#[test]
fn text_out_of_sight_is_asked_for_with_layer_and_node() {
    let error = refusal(&out_of_sight(), &plan(Action::WaRs)).to_string();
    assert!(
        error.contains("layer 1 (node_o2)") && error.contains("`node_h2`"),
        "{error}"
    );
}

#[test]
fn text_out_of_sight_is_what_the_plan_says() {
    let tokens = TextTokens {
        tokens: 8,
        side: Side::Start,
    };
    let plan = Plan {
        text: Some(tokens),
        ..plan(Action::WaRs)
    };
    assert!(lowered(&out_of_sight(), &plan).is_ok());
}

/// Rows that are positions before they are images.
fn positions_outside() -> ModelFile {
    let text = text("input x float [b, 64, 32]", SAME);
    let text = text.replace(
        "h0 = Add(x, te)",
        "y = Add(x, te)
         h0 = Transpose(y) perm=[1, 0, 2]",
    );
    testing::model(&text.replace(
        "out = Add(x, a2)",
        "z = Transpose(a2) perm=[1, 0, 2]\n out = Add(x, z)",
    ))
}

#[test]
fn halves_are_refused_where_the_batch_is_not_outermost() {
    let error = refusal(&positions_outside(), &plan(Action::Asc));
    assert!(
        matches!(error, LowerError::NoHalves { layer: 0, .. }),
        "{error}"
    );
}

#[test]
fn without_halves_the_other_actions_work() {
    assert!(lowered(&positions_outside(), &plan(Action::WaRs)).is_ok());
}

#[test]
fn two_runs_per_step_need_no_halves() {
    let plan = Plan {
        cfg: Cfg::Separate,
        ..plan(Action::Asc)
    };
    assert!(lowered(&positions_outside(), &plan).is_ok());
}

#[test]
fn a_value_with_the_name_of_a_request_input_is_refused() {
    let model = model(X, "dfa_start = Identity(h1)\n h2 = Identity(dfa_start)");
    let error = refusal(&model, &plan(Action::Ast));
    assert!(
        matches!(&error, LowerError::NameTaken { name } if name == "dfa_start"),
        "{error}"
    );
}

#[test]
fn a_node_with_a_field_of_another_version_is_not_moved() {
    let before = model(X, SAME);
    let nodes = before.graph.nodes.iter();
    let nodes = nodes.map(|node| match node.label() {
        // Field 31, a number.
        "node_q1" => [&node.raw[..], &[0xf8, 0x01, 1]].concat().into(),
        _ => node.raw.clone(),
    });
    let edit = GraphEdit {
        nodes: Some(nodes.collect()),
        ..GraphEdit::default()
    };
    let bytes = before.serialize(&edit, None, &[]).concat();
    let model = ModelFile::parse(Path::new("model.onnx"), bytes.into()).unwrap();
    let error = refusal(&model, &plan(Action::Ast));
    assert!(
        matches!(&error, LowerError::UnknownFields { node } if node == "node_q1"),
        "{error}"
    );
}

#[test]
fn request_inputs_with_a_default_need_a_newer_ir() {
    let mut bytes = testing::bytes(&text(X, SAME));
    assert_eq!(bytes[..2], [8, 8], "the field of the IR version");
    bytes[1] = 3;
    let model = ModelFile::parse(Path::new("model.onnx"), bytes.into()).unwrap();
    let error = refusal(&model, &plan(Action::Ast));
    assert!(
        matches!(error, LowerError::IrTooOld { found: 3 }),
        "{error}"
    );
    let required = RequestInputs::Required;
    assert!(lower(&model, &surveyed(&model), &plan(Action::Ast), required).is_ok());
}

#[test]
fn a_layer_gets_the_module_form_where_it_can_be_isolated_and_else_the_core_form() {
    let shared = model(X, "h2 = Add(h1, q1)");
    let forms = lowered(&shared, &plan(Action::Ast)).unwrap().forms;
    assert_eq!(forms, [Form::Core, Form::Module]);
}

/// The type and the sizes that are written for `value`.
fn declared(model: &ModelFile, value: &str) -> (i32, Vec<Option<i64>>) {
    let declared = model.graph.value_info[value].tensor_type.as_ref().unwrap();
    let dims = &declared.shape.as_ref().unwrap().dim;
    (
        declared.elem_type,
        dims.iter().map(|d| d.dim_value).collect(),
    )
}

/// The first layer in core form, its heads on an axis of their own.
fn core_and_module() -> String {
    let heads = |x: &str| {
        format!(
            "{x}r = Reshape({x}, heads)
             {x}h = Transpose({x}r) perm=[0, 2, 1, 3]"
        )
    };
    let core = format!(
        "ints heads [0, 0, 4, 8]
         ints merged [0, 0, 32]
         {}\n{}\n{}
         oh = Attention(q1h, k1h, v1h)
         or = Transpose(oh) perm=[0, 2, 1, 3]
         o1 = Reshape(or, merged)",
        heads("q1"),
        heads("k1"),
        heads("v1")
    );
    let packed = "o1 = Attention(q1, k1, v1) q_num_heads=4 kv_num_heads=4";
    text(X, "h2 = Add(h1, q1)").replace(packed, &core)
}

#[test]
fn results_of_custom_ops_are_declared_with_type_and_known_sizes() {
    let out = written(&testing::model(&core_and_module()), &plan(Action::WaRs));
    let op = out
        .graph
        .nodes
        .iter()
        .find(|n| n.op() == "DiTFastAttn")
        .unwrap();
    let core = declared(&out, op.output(0));
    assert_eq!(
        core,
        (elem_type::FLOAT, vec![None, Some(64), Some(4), Some(8)])
    );
    let module = declared(&out, "a2");
    assert_eq!(module, (elem_type::FLOAT, vec![None, Some(64), Some(32)]));
}

#[test]
fn results_of_custom_ops_are_of_the_models_type() {
    let text = text(X, SAME).replace("float", "float16");
    // Weights of these models are float32.
    let text = text.replace(
        "weight w [32, 32]",
        "weight w32 [32, 32]\n w = Cast(w32) to=10",
    );
    let text = text.replace(
        "weight f [1, 32]",
        "weight f32 [1, 32]\n f = Cast(f32) to=10",
    );
    let out = written(&testing::model(&text), &plan(Action::WaRs));
    assert_eq!(declared(&out, "a1").0, elem_type::FLOAT16);
}
