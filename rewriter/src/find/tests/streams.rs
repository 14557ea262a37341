//! Which tokens are text.

use super::{found, in_text, layer, layer_of};
use crate::find::Text;

/// The text of the layer of `body` whose attention makes `value`.
fn text(body: &str, value: &str) -> Text {
    layer_of(&found(body).1, value).text.clone()
}

fn node_lost(text: &Text) -> &str {
    match text {
        Text::Lost { node, .. } => node,
        other => panic!("not lost: {other:?}"),
    }
}

fn at_start(text: &Text) -> bool {
    match text {
        Text::Known { at_start, .. } => *at_start,
        other => panic!("not known: {other:?}"),
    }
}

const PROMPT: &str = "input prompt float [b, 8, 32]
    input length int64 [b]";

#[test]
fn a_sequence_of_the_latents_alone_has_no_text() {
    let body = format!("{}\n out = Add(h, aone)", layer("h", "one"));
    assert_eq!(text(&body, "oone"), Text::None);
}

#[test]
fn what_is_joined_in_front_of_the_latents_is_text_at_the_start() {
    let body = format!(
        "{PROMPT}
         j = Concat(prompt, h) axis=1
         {}
         p, out = Split(aone) axis=1 num_outputs=2",
        layer("j", "one")
    );
    let text = text(&body, "oone");
    assert_eq!((text.known(), at_start(&text)), (Some(8), true));
}

#[test]
fn what_is_joined_behind_the_latents_is_text_at_the_end() {
    let body = format!(
        "{PROMPT}
         j = Concat(h, prompt) axis=1
         {}
         out = Add(h, x)",
        layer("j", "one")
    );
    let text = text(&body, "oone");
    assert_eq!((text.known(), at_start(&text)), (Some(8), false));
}

#[test]
fn text_is_known_behind_attention_too() {
    let body = format!(
        "{PROMPT}
         j = Concat(prompt, h) axis=1
         {}
         j2 = Add(j, aone)
         {}
         out = Add(h, x)",
        layer("j", "one"),
        layer("j2", "two")
    );
    assert_eq!(text(&body, "otwo").known(), Some(8));
}

#[test]
fn text_of_an_open_length_is_measured_when_the_model_runs() {
    let body = format!(
        "input prompt float [b, p, 32]
         j = Concat(prompt, h) axis=1
         {}
         out = Add(h, x)",
        layer("j", "one")
    );
    let Text::Known { pieces, .. } = text(&body, "oone") else {
        panic!("not known");
    };
    assert_eq!(pieces[0].tokens.known(), None);
    assert_eq!(pieces[0].measured, ("prompt".to_owned(), 1));
}

#[test]
fn text_on_both_sides_is_scattered() {
    let body = format!(
        "{PROMPT}
         j = Concat(prompt, h, prompt) axis=1
         {}
         out = Add(h, x)",
        layer("j", "one")
    );
    assert_eq!(text(&body, "oone"), Text::Scattered);
}

#[test]
fn image_tokens_that_are_cut_out_again_have_no_text() {
    let body = format!(
        "{PROMPT}
         ints sizes [8, 64]
         j = Concat(prompt, h) axis=1
         {}
         p, image = Split(aone, sizes) axis=1
         {}
         out = Add(h, atwo)",
        layer("j", "one"),
        layer("image", "two")
    );
    assert_eq!(text(&body, "otwo"), Text::None);
}

#[test]
fn text_behind_an_operator_without_a_rule_for_axes_is_lost_there() {
    let body = format!(
        "{PROMPT}
         j = Concat(prompt, h) axis=1
         turned = ReverseSequence(j, length) batch_axis=0 time_axis=1
         {}
         out = Add(h, x)",
        layer("turned", "one")
    );
    assert_eq!(node_lost(&text(&body, "oone")), "node_turned");
}

#[test]
fn what_is_lost_in_one_layer_is_lost_in_those_behind_it() {
    let body = format!(
        "{PROMPT}
         j = Concat(prompt, h) axis=1
         turned = ReverseSequence(j, length) batch_axis=0 time_axis=1
         {}
         next = Add(turned, aone)
         {}
         out = Add(h, x)",
        layer("turned", "one"),
        layer("next", "two")
    );
    assert_eq!(node_lost(&text(&body, "otwo")), "node_turned");
}

#[test]
fn image_tokens_behind_an_operator_without_a_rule_are_image_tokens() {
    let body = format!(
        "input length int64 [b]
         turned = ReverseSequence(h, length) batch_axis=0 time_axis=1
         {}
         out = Add(h, aone)",
        layer("turned", "one")
    );
    assert_eq!(text(&body, "oone"), Text::None);
}

#[test]
fn channels_joined_to_the_latents_are_no_text() {
    let (_, survey) = in_text(&format!(
        "opset 23
         input x float [b, 64, 4]
         input mask float [b, 64, 28]
         input t float [b]
         output out float [b, 64, 4]
         weight w [32, 32]
         weight f [1, 32]
         weight end [32, 4]
         ints one [1]
         t1 = Unsqueeze(t, one)
         tf = Mul(t1, f)
         ts = Sin(tf)
         te = Unsqueeze(ts, one)
         wide = Concat(x, mask) axis=2
         h = Add(wide, te)
         {}
         out = MatMul(aone, end)",
        layer("h", "one")
    ));
    assert_eq!(layer_of(&survey, "oone").text, Text::None);
}

#[test]
fn text_written_into_image_tokens_is_lost() {
    let body = format!(
        "{PROMPT}
         input places int64 [b, 8, 2]
         j = ScatterND(h, places, prompt)
         {}
         out = Add(h, aone)",
        layer("j", "one")
    );
    assert_eq!(node_lost(&text(&body, "oone")), "node_j");
}

#[test]
fn a_class_token_picked_from_a_table_is_text() {
    let body = format!(
        "input y int64 [b]
         weight classes [10, 32]
         picked = Gather(classes, y) axis=0
         token = Unsqueeze(picked, one)
         j = Concat(token, h) axis=1
         {}
         out = Add(h, x)",
        layer("j", "one")
    );
    let text = text(&body, "oone");
    assert_eq!((text.known(), at_start(&text)), (Some(1), true));
}
