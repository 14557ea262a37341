//! The module around an attention, and shapes in it that have the batch.

use super::{attention, found, in_text, layer, layer_of};
use crate::find::{Module, Reason, Target};
use std::collections::BTreeMap;

fn module(body: &str) -> Result<Module, Reason> {
    layer_of(&found(body).1, "oone").module.clone()
}

/// What Reshapes get in place of their shapes, by the names of their results.
fn targets(body: &str) -> BTreeMap<String, Target> {
    let (model, survey) = found(body);
    let module = layer_of(&survey, "oone").module.as_ref().unwrap();
    let retargeted = module.retargeted.iter();
    retargeted
        .map(|(&node, target)| (model.graph.nodes[node].output(0).to_owned(), target.clone()))
        .collect()
}

/// q through Reshapes to `there` and `back`, in a model of any batch.
fn reshaped(there: &str, back: &str) -> String {
    format!(
        "ints there [{there}]
         ints back [{back}]
         p = MatMul(h, w)
         split = Reshape(p, there)
         norm = Tanh(split)
         qone = Reshape(norm, back)
         kone = MatMul(h, w)
         vone = MatMul(h, w)
         {}
         out = Add(h, aone)",
        attention("one")
    )
}

#[test]
fn shapes_without_the_batch_stay_as_they_are() {
    assert_eq!(
        targets(&reshaped("0, 0, 4, 8", "0, 0, 32")),
        BTreeMap::new()
    );
}

#[test]
fn rows_that_were_traced_into_a_shape_are_repaired() {
    let targets = targets(&reshaped("2, 64, 4, 8", "2, 64, 32"));
    assert_eq!(targets["split"], Target::Constant(vec![-1, 64, 4, 8]));
    assert_eq!(targets["qone"], Target::Constant(vec![-1, 64, 32]));
}

#[test]
fn rows_that_were_traced_beside_a_size_to_infer_are_repaired() {
    let targets = targets(&reshaped("2, 64, -1, 2", "2, 64, 32"));
    assert_eq!(targets["split"], Target::Constant(vec![-1, 64, 16, 2]));
}

#[test]
fn rows_that_were_traced_where_nobody_can_tell_refuse_the_module() {
    let reason = module(&reshaped("2, 64, 4, -1", "2, 64, 32")).unwrap_err();
    assert_eq!(reason.nodes, ["node_split"], "{reason}");
}

#[test]
fn a_shape_made_from_the_batch_outside_is_written_without_it() {
    let body = format!(
        "ints rest [64, 4, 8]
         ints zero [0]
         ints back [0, 0, 32]
         shape = Shape(x)
         rows = Gather(shape, zero) axis=0
         there = Concat(rows, rest) axis=0
         p = MatMul(h, w)
         split = Reshape(p, there)
         norm = Tanh(split)
         qone = Reshape(norm, back)
         kone = MatMul(h, w)
         vone = MatMul(h, w)
         {}
         out = Add(h, aone)",
        attention("one")
    );
    assert_eq!(targets(&body)["split"], Target::Constant(vec![0, 64, 4, 8]));
}

/// q times a table with two rows, in a model whose batch is `rows`.
fn with_row_table(rows: &str) -> Result<Module, Reason> {
    let (_, survey) = in_text(&format!(
        "opset 23
         input x float [{rows}, 64, 32]
         input t float [{rows}]
         output out float [{rows}, 64, 32]
         weight w [32, 32]
         weight f [1, 32]
         weight table [2, 64, 32]
         ints one [1]
         t1 = Unsqueeze(t, one)
         tf = Mul(t1, f)
         ts = Sin(tf)
         te = Unsqueeze(ts, one)
         h = Add(x, te)
         p = MatMul(h, w)
         qone = Mul(p, table)
         kone = MatMul(h, w)
         vone = MatMul(h, w)
         {}
         out = Add(h, aone)",
        attention("one")
    ));
    layer_of(&survey, "oone").module.clone()
}

#[test]
fn a_table_with_a_row_for_each_row_of_a_fixed_batch_is_selected() {
    assert_eq!(with_row_table("2").unwrap().selected, ["table"]);
}

#[test]
fn a_table_of_two_rows_in_a_model_of_any_batch_refuses_the_module() {
    let reason = with_row_table("b").unwrap_err();
    assert!(!reason.nodes.is_empty(), "{reason}");
}

#[test]
fn a_rotary_table_of_each_row_is_selected() {
    let body = format!(
        "input angles float [b, 64, 32]
         p = MatMul(h, w)
         qone = Mul(p, angles)
         kone = MatMul(h, w)
         vone = MatMul(h, w)
         {}
         out = Add(h, aone)",
        attention("one")
    );
    assert_eq!(module(&body).unwrap().selected, ["angles"]);
}

#[test]
fn a_projection_that_is_used_outside_refuses_the_module_and_is_named() {
    let body = format!(
        "{}
         mlp = Add(h, qone)
         out = Add(mlp, aone)",
        layer("h", "one")
    );
    let reason = module(&body).unwrap_err();
    assert!(
        reason.text.contains("`qone`") && reason.text.contains("node_mlp"),
        "{reason}"
    );
}

#[test]
fn sizes_that_are_used_outside_too_are_computed_twice() {
    let body = format!(
        "shape = Shape(h)
         p = MatMul(h, w)
         qone = Reshape(p, shape)
         kone = MatMul(h, w)
         vone = MatMul(h, w)
         {}
         again = Reshape(h, shape)
         out = Add(again, aone)",
        attention("one")
    );
    let (model, survey) = found(&body);
    let module = layer_of(&survey, "oone").module.as_ref().unwrap();
    let twice = module.duplicated.iter();
    let twice: Vec<_> = twice.map(|&i| model.graph.nodes[i].label()).collect();
    assert_eq!(twice, ["node_shape"]);
}
