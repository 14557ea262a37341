//! Softmax and norms: shape and order stay, elements along some axes see one another.

use super::context::{Context, axis, like_first, same};
use super::*;

const fn norm(name: &'static str, along: Along) -> Op {
    op(name, Shape::First(like_first), Axis::Same).along(along)
}

pub(super) const OPS: &[Op] = &[
    norm("Softmax", softmax_axis).is(ANCHOR),
    norm("LogSoftmax", softmax_axis),
    norm("Hardmax", softmax_axis),
    ms("BiasSoftmax", Shape::First(like_first), Axis::Same)
        .along(all)
        .is(ANCHOR),
    op(
        "LayerNormalization",
        Shape::All(with_statistics),
        Axis::Same,
    )
    .along(from_axis)
    .is(NORM),
    op("RMSNormalization", Shape::First(like_first), Axis::Same)
        .along(from_axis)
        .is(NORM),
    op(
        "SimplifiedLayerNormalization",
        Shape::All(with_statistics),
        Axis::Same,
    )
    .along(from_axis)
    .is(NORM),
    ms(
        "SkipLayerNormalization",
        Shape::All(with_sum),
        Axis::By(any_summand),
    )
    .along(last),
    ms(
        "SkipSimplifiedLayerNormalization",
        Shape::All(with_sum),
        Axis::By(any_summand),
    )
    .along(last),
    ms("GatedRMSNorm", Shape::First(like_first), Axis::Same).along(last),
    ms("BranchwiseRMSNorm", Shape::First(like_first), Axis::Same).along(last),
    norm("GroupNormalization", all_but_rows),
    norm("InstanceNormalization", positions),
    ms("GroupNorm", Shape::First(like_first), Axis::Same).along(all_but_rows),
    ms(
        "SkipGroupNorm",
        Shape::All(group_norm_with_sum),
        Axis::SameOf(1),
    )
    .along(all_but_rows),
    norm("BatchNormalization", in_training),
    norm("LpNormalization", last_or_axis),
    norm("LRN", channels),
    norm("MeanVarianceNormalization", all),
];

fn softmax_axis(node: &Node, rank: usize) -> Option<Range<usize>> {
    let at = match node.int("axis") {
        Some(at) => at,
        // Before opset 13 the default was axis 1, with all later axes flattened into it.
        None => return Some(1.min(rank)..rank),
    };
    let at = axis(at, rank)?;
    Some(at..rank)
}

fn from_axis(node: &Node, rank: usize) -> Option<Range<usize>> {
    Some(axis(node.int("axis").unwrap_or(-1), rank)?..rank)
}

fn last(_: &Node, rank: usize) -> Option<Range<usize>> {
    Some(rank.checked_sub(1)?..rank)
}

fn last_or_axis(node: &Node, rank: usize) -> Option<Range<usize>> {
    let at = axis(node.int("axis").unwrap_or(-1), rank)?;
    Some(at..at + 1)
}

fn all(_: &Node, rank: usize) -> Option<Range<usize>> {
    Some(0..rank)
}

fn all_but_rows(_: &Node, rank: usize) -> Option<Range<usize>> {
    Some(1.min(rank)..rank)
}

fn positions(_: &Node, rank: usize) -> Option<Range<usize>> {
    Some(2.min(rank)..rank)
}

fn channels(_: &Node, rank: usize) -> Option<Range<usize>> {
    Some(1.min(rank)..2.min(rank))
}

fn in_training(node: &Node, rank: usize) -> Option<Range<usize>> {
    let trains = node.int("training_mode").unwrap_or(0) != 0;
    Some(0..if trains { rank } else { 0 })
}

fn with_statistics(c: &mut Context) -> Option<Vec<Fact>> {
    Some(vec![same(c)])
}

/// The normalised sum, mean, deviation, and the sum itself.
fn with_sum(c: &mut Context) -> Option<Vec<Fact>> {
    let fact = same(c);
    Some(vec![fact.clone(), Fact::default(), Fact::default(), fact])
}

fn any_summand(f: &AxisStep) -> Option<AxisOffset> {
    (f.slot < 2 && matches!(f.out, 0 | 3)).then(|| f.place.clone())
}

fn group_norm_with_sum(c: &mut Context) -> Option<Vec<Fact>> {
    let fact = same(c);
    Some(vec![fact.clone(), fact])
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;

    #[test]
    fn norms_keep_shape_and_order() {
        for name in [
            "Softmax",
            "LayerNormalization",
            "RMSNormalization",
            "GroupNormalization",
        ] {
            let mut g = Given::new(name);
            g.input(1, &["batch", "tokens", "8"]);
            assert_eq!(g.shows(), "float32 [batch, tokens, 8]", "{name}");
            assert_eq!(g.axis(0, 1), Some(1), "{name}");
            assert_eq!(g.axis_apart(0, 0), Some(0), "{name}");
        }
    }

    #[test]
    fn a_norm_over_the_rows_is_no_longer_about_one_row() {
        let mut g = Given::new("Softmax").int("axis", 0);
        g.input(1, &["batch", "tokens"]);
        g.shows();
        assert_eq!(g.axis_apart(0, 0), None);
        let mut g = Given::new("LayerNormalization").int("axis", 0);
        g.input(1, &["batch", "tokens"]);
        g.shows();
        assert_eq!(g.axis_apart(0, 0), None);
    }

    #[test]
    fn a_skip_norm_also_gives_the_sum() {
        let mut g = Given::microsoft("SkipLayerNormalization").outputs(4);
        g.input(1, &["batch", "tokens", "8"])
            .input(1, &["batch", "tokens", "8"]);
        assert_eq!(g.shows_all()[3], "float32 [batch, tokens, 8]");
        assert_eq!(g.axis_to(1, 1, 3), Some(1));
    }
}
