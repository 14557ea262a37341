//! Where the module ends.

use super::{found, layer, layer_of};
use crate::find::Module;

fn module(body: &str) -> Module {
    layer_of(&found(body).1, "oone").module.clone().unwrap()
}

/// Projections and attention of `h`, without an output projection.
fn core() -> String {
    let whole = layer("h", "one");
    whole.lines().take(4).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_bias_belongs_to_the_output_projection() {
    let body = format!(
        "weight bias [32]
         {}
         biased = Add(aone, bias)
         out = Add(h, biased)",
        layer("h", "one")
    );
    let module = module(&body);
    assert_eq!(
        (module.sinks, module.projects_out),
        (vec!["biased".to_owned()], true)
    );
}

#[test]
fn what_is_added_from_the_stream_is_no_bias() {
    let body = format!("{}\n out = Add(aone, h)", layer("h", "one"));
    assert_eq!(module(&body).sinks, ["aone"]);
}

#[test]
fn a_result_that_is_cut_in_two_has_two_sinks() {
    let body = format!(
        "ints half [32, 32]
         {}
         left, right = Split(oone, half) axis=1
         p = MatMul(left, w)
         q = MatMul(right, w)
         y = Concat(p, q) axis=1
         out = Add(h, y)",
        core()
    );
    assert_eq!(module(&body).sinks, ["p", "q"]);
}

#[test]
fn without_an_output_projection_the_core_is_the_end() {
    let body = format!("{}\n out = Add(h, oone)", core());
    let module = module(&body);
    assert_eq!(
        (module.sinks, module.projects_out),
        (vec!["oone".to_owned()], false)
    );
}

#[test]
fn a_convolution_over_several_positions_is_no_output_projection() {
    let body = |size: usize| {
        format!(
            "weight kernel [32, 32, {size}]
             {}
             turned = Transpose(oone) perm=[0, 2, 1]
             c = Conv(turned, kernel) kernel_shape=[{size}] pads=[{pad}, {pad}]
             back = Transpose(c) perm=[0, 2, 1]
             out = Add(h, back)",
            core(),
            pad = size / 2
        )
    };
    assert_eq!(module(&body(1)).sinks, ["c"]);
    assert_eq!(module(&body(3)).sinks, ["oone"]);
}
