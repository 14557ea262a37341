//! Where q, k and v come from.

use super::{attention, found, kind_of, layer, layer_of};
use crate::find::Kind;

fn sources(body: &str, value: &str) -> Vec<String> {
    let (_, survey) = found(body);
    let layer = layer_of(&survey, value);
    assert!(!layer.joint, "two streams");
    layer.module.as_ref().unwrap().sources.clone()
}

#[test]
fn the_source_is_what_all_three_projections_read() {
    let body = format!("{}\n out = Add(h, aone)", layer("h", "one"));
    assert_eq!(sources(&body, "oone"), ["h"]);
}

#[test]
fn a_shift_by_the_time_is_no_stream_of_its_own() {
    let body = format!(
        "shift = MatMul(te, w)
         p = MatMul(h, w)
         qone = Add(p, shift)
         kone = MatMul(h, w)
         vone = MatMul(h, w)
         {}
         out = Add(h, aone)",
        attention("one")
    );
    assert_eq!(sources(&body, "oone"), ["h"]);
}

#[test]
fn values_mixed_with_those_of_an_earlier_layer_are_self_attention() {
    let body = format!(
        "{}
         h1 = Add(h, aone)
         qtwo = MatMul(h1, w)
         ktwo = MatMul(h1, w)
         own = MatMul(h1, w)
         vtwo = Add(own, vone)
         {}
         out = Add(h1, atwo)",
        layer("h", "one"),
        attention("two")
    );
    assert_eq!(layer_of(&found(&body).1, "otwo").index, 1);
}

#[test]
fn a_low_rank_adapter_has_the_source_of_what_it_adapts() {
    let body = format!(
        "weight down [32, 4]
         weight up [4, 32]
         low = MatMul(h, down)
         more = MatMul(low, up)
         p = MatMul(h, w)
         qone = Add(p, more)
         kone = MatMul(h, w)
         vone = MatMul(h, w)
         {}
         out = Add(h, aone)",
        attention("one")
    );
    assert_eq!(sources(&body, "oone"), ["h"]);
}

#[test]
fn keys_and_values_of_a_prompt_are_cross_attention() {
    let body = format!(
        "input prompt float [b, 8, 32]
         {}
         qtwo = MatMul(aone, w)
         ktwo = MatMul(prompt, w)
         vtwo = MatMul(prompt, w)
         {}
         out = Add(h, atwo)",
        layer("h", "one"),
        attention("two")
    );
    let (_, survey) = found(&body);
    let Kind::Cross { queries, keys } = kind_of(&survey, "otwo") else {
        panic!("{survey:?}");
    };
    assert_eq!((queries.as_str(), keys.as_str()), ("aone", "prompt"));
}

#[test]
fn an_einsum_with_a_weight_is_a_projection() {
    let einsum = |x: &str, y: &str| format!("{y} = Einsum({x}, w) equation=\"bnc,cd->bnd\"");
    let body = format!(
        "{}\n{}\n{}
         oone = Attention(qone, kone, vone) q_num_heads=4 kv_num_heads=4
         {}
         out = Add(h, aone)",
        einsum("h", "qone"),
        einsum("h", "kone"),
        einsum("h", "vone"),
        einsum("oone", "aone")
    );
    let (_, survey) = found(&body);
    let module = layer_of(&survey, "oone").module.as_ref().unwrap();
    assert_eq!(
        (&module.sources[..], &module.sinks[..]),
        (&["h".to_owned()][..], &["aone".to_owned()][..])
    );
}
