//! The numbers of layers.

use super::{HEAD, found, in_text, layer};
use crate::find::Survey;
use proptest::prelude::*;

/// The layers' nodes in the order of their numbers.
fn numbered(survey: &Survey) -> Vec<String> {
    survey.layers().map(|l| survey.label(l)).collect()
}

/// Two attentions of one norm, as of blocks with dual attention.
fn dual(first: &str, second: &str) -> String {
    format!(
        "{}
         {}
         h1 = Add(h, a{first})
         out = Add(h1, a{second})",
        layer("h", "b"),
        layer("h", "a")
    )
}

/// Two attentions whose results go on apart and meet in a Concat.
fn apart(first: &str, second: &str) -> String {
    format!(
        "ints half [32, 32]
         x1, x2 = Split(h, half) axis=1
         {}
         {}
         y1 = Add(x1, aa)
         y2 = Add(x2, ab)
         out = Concat({first}, {second}) axis=1",
        layer("x2", "b"),
        layer("x1", "a")
    )
}

#[test]
fn of_two_attentions_side_by_side_the_one_that_joins_the_stream_first_comes_first() {
    assert_eq!(numbered(&found(&dual("a", "b")).1), ["node_oa", "node_ob"]);
    assert_eq!(numbered(&found(&dual("b", "a")).1), ["node_ob", "node_oa"]);
}

#[test]
fn of_two_streams_the_first_operand_where_they_meet_comes_first() {
    assert_eq!(
        numbered(&found(&apart("y1", "y2")).1),
        ["node_oa", "node_ob"]
    );
    assert_eq!(
        numbered(&found(&apart("y2", "y1")).1),
        ["node_ob", "node_oa"]
    );
}

#[test]
fn a_layer_that_depends_on_another_comes_after_it() {
    let body = format!(
        "{}
         h1 = Add(h, aone)
         {}
         out = Add(atwo, h)",
        layer("h", "one"),
        layer("h1", "two")
    );
    assert_eq!(numbered(&found(&body).1), ["node_oone", "node_otwo"]);
}

#[test]
fn two_results_in_one_sum_come_in_the_order_of_its_operands() {
    let body = |a: &str, b: &str| {
        format!(
            "{}\n{}\n both = Add({a}, {b})\n out = Add(h, both)",
            layer("h", "a"),
            layer("h", "b")
        )
    };
    assert_eq!(
        numbered(&found(&body("aa", "ab")).1),
        ["node_oa", "node_ob"]
    );
    assert_eq!(
        numbered(&found(&body("ab", "aa")).1),
        ["node_ob", "node_oa"]
    );
}

proptest! {
    #[test]
    fn the_order_of_nodes_in_the_file_does_not_matter(
        (text, shuffled) in prop::sample::select(vec![
            dual("a", "b"), dual("b", "a"), apart("y1", "y2"), apart("y2", "y1"),
        ])
        .prop_flat_map(|body| {
            let text = format!("{HEAD}\n{body}");
            // Declarations stay in front; nodes come in any order, as some converters write them.
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            let (nodes, declared): (Vec<_>, Vec<_>) = lines.into_iter().partition(|l| l.contains('='));
            let shuffled = Just(nodes).prop_shuffle();
            (Just(text), shuffled.prop_map(move |nodes| [declared.clone(), nodes].concat().join("\n")))
        })
    ) {
        prop_assert_eq!(numbered(&in_text(&text).1), numbered(&in_text(&shuffled).1));
    }
}
