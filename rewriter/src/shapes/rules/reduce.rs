//! Reductions along axes, and sums that run along one.

use super::context::{Context, axis, like_first};
use super::*;
use crate::onnx::elem_type;
use crate::shapes::{Dim, Value};

const fn reduction(name: &'static str) -> Op {
    op(name, Shape::First(reduce), Axis::By(kept)).ends(is_reduced)
}

pub(super) const OPS: &[Op] = &[
    reduction("ReduceMean").is(NORM),
    reduction("ReduceSum"),
    reduction("ReduceMax"),
    reduction("ReduceMin"),
    reduction("ReduceProd"),
    reduction("ReduceL1"),
    reduction("ReduceL2").is(NORM),
    reduction("ReduceLogSum"),
    reduction("ReduceLogSumExp"),
    reduction("ReduceSumSquare").is(NORM),
    op("ArgMax", Shape::First(arg), Axis::By(arg_kept)).ends(is_searched),
    op("ArgMin", Shape::First(arg), Axis::By(arg_kept)).ends(is_searched),
    op("CumSum", Shape::First(like_first), Axis::Same).along(running),
    op("CumProd", Shape::First(like_first), Axis::Same).along(running),
    op("Det", Shape::First(of_matrices), Axis::By(outside_matrix)),
    ms(
        "Inverse",
        Shape::First(like_first),
        Axis::By(outside_matrix),
    ),
    ms("ReduceSumInteger", Shape::First(reduce), Axis::By(kept)).ends(is_reduced),
    op(
        "DFT",
        Shape::Open("a spectrum"),
        Axis::Lost("positions become frequencies"),
    ),
    op(
        "STFT",
        Shape::Open("a spectrogram"),
        Axis::Lost("positions become frequencies"),
    ),
    ms(
        "Rfft",
        Shape::Open("a spectrum"),
        Axis::Lost("positions become frequencies"),
    ),
    ms(
        "Irfft",
        Shape::Open("a spectrum"),
        Axis::Lost("frequencies become positions"),
    ),
];

/// Which axes are reduced, of `rank`; `None` if that is not known.
fn reduced(node: &Node, given: Option<Vec<i64>>, rank: usize) -> Option<Vec<usize>> {
    let named = node.ints("axes").is_some() || node.input(1).is_some();
    let axes = if named { given? } else { Vec::new() };
    if axes.is_empty() {
        let nothing = node.int("noop_with_empty_axes").unwrap_or(0) != 0;
        return Some(if nothing {
            Vec::new()
        } else {
            (0..rank).collect()
        });
    }
    axes.into_iter().map(|a| axis(a, rank)).collect()
}

fn without(dims: &[Dim], axes: &[usize], keep: bool) -> Vec<Dim> {
    let one = |(i, d): (usize, &Dim)| match axes.contains(&i) {
        false => Some(d.clone()),
        true => keep.then(|| 1.into()),
    };
    dims.iter().enumerate().filter_map(one).collect()
}

fn keeps(node: &Node) -> bool {
    node.int("keepdims").unwrap_or(1) != 0
}

fn reduce(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let axes = reduced(c.node, c.ints_given("axes", 1), dims.len())?;
    let whole = axes.len() == dims.len() && dims.len() <= 1;
    let shape = without(dims, &axes, keeps(c.node));
    let value = match c.value(0) {
        Some(Value::Ints(v)) if whole => of_sizes(c.node.op(), v),
        _ => None,
    };
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(shape),
        value: value.map(|n| Value::Ints(vec![n])),
    })
}

/// Of a shape vector: the number of elements, the longest side.
fn of_sizes(op: &str, sizes: &[Dim]) -> Option<Dim> {
    let known = || sizes.iter().map(Dim::known).collect::<Option<Vec<_>>>();
    match op {
        "ReduceProd" => Dim::product(sizes),
        "ReduceMax" => known()?.into_iter().max().map(Dim::from),
        "ReduceMin" => known()?.into_iter().min().map(Dim::from),
        "ReduceSum" => known()?
            .into_iter()
            .try_fold(0i64, i64::checked_add)
            .map(Dim::from),
        _ => None,
    }
}

/// The axis moves up by as many as are gone before it.
fn moved_up(f: &AxisStep, axes: &[usize]) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    if f.slot != 0 || axes.contains(&at) {
        return None;
    }
    let gone = if keeps(f.node) {
        0
    } else {
        axes.iter().filter(|&&a| a < at).count()
    };
    f.moved(at - gone, &inner)
}

fn reduced_in(f: &AxisStep) -> Option<Vec<usize>> {
    let given = match f.node.ints("axes") {
        Some(axes) => Some(axes.to_vec()),
        None => f.node.input(1).and_then(|a| f.facts.of(a).known_ints()),
    };
    reduced(f.node, given, f.input.len())
}

fn kept(f: &AxisStep) -> Option<AxisOffset> {
    moved_up(f, &reduced_in(f)?)
}

fn is_reduced(f: &AxisStep) -> bool {
    let at = f.at().zip(reduced_in(f));
    f.slot == 0 && at.is_some_and(|((at, _), axes)| axes.contains(&at))
}

fn is_searched(f: &AxisStep) -> bool {
    let searched = axis(f.node.int("axis").unwrap_or(0), f.input.len());
    f.at().is_some_and(|(at, _)| Some(at) == searched)
}

fn arg(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let at = axis(c.node.int("axis").unwrap_or(0), dims.len())?;
    let dims = without(dims, &[at], keeps(c.node));
    Some(Fact::of(elem_type::INT64, Some(dims)))
}

fn arg_kept(f: &AxisStep) -> Option<AxisOffset> {
    let at = axis(f.node.int("axis").unwrap_or(0), f.input.len())?;
    moved_up(f, &[at])
}

/// The axis is an input: any may be meant.
fn running(_: &Node, rank: usize) -> Option<Range<usize>> {
    Some(0..rank)
}

fn of_matrices(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let outside = dims.get(..dims.len().checked_sub(2)?)?;
    Some(Fact::of(c.ty(0), Some(outside.to_vec())))
}

fn outside_matrix(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    if f.slot != 0 || at + 2 >= f.input.len() {
        return None;
    }
    f.moved(at, &inner)
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;

    #[test]
    fn reduced_axes_go_or_become_one() {
        let mut g = Given::new("ReduceMean").ints_attribute("axes", &[-1]);
        g.input(1, &["batch", "tokens", "8"]);
        assert_eq!(g.shows(), "float32 [batch, tokens, 1]");
        assert_eq!((g.axis(0, 1), g.axis(0, 2)), (Some(1), None));
        assert!(g.ends(0, 2) && !g.ends(0, 1));
        let mut g = Given::new("ReduceSum").int("keepdims", 0);
        g.input(1, &["batch", "4", "tokens"]).ints(&[1]);
        assert_eq!(g.shows(), "float32 [batch, tokens]");
        assert_eq!(g.axis(0, 2), Some(1));
        let mut g = Given::new("ReduceMax").int("keepdims", 0);
        g.input(1, &["batch", "tokens"]);
        assert_eq!(g.shows(), "float32 []");
        let mut g = Given::new("ReduceSum").int("noop_with_empty_axes", 1);
        g.input(1, &["batch", "tokens"]);
        assert_eq!(g.shows(), "float32 [batch, tokens]");
    }

    #[test]
    fn sizes_multiply() {
        let mut g = Given::new("ReduceProd").int("keepdims", 0);
        g.sizes(&["batch", "4", "2"]);
        assert_eq!(g.shows(), "int64 [] = [8·batch]");
    }

    #[test]
    fn positions_of_the_largest() {
        let mut g = Given::new("ArgMax").int("axis", -1).int("keepdims", 0);
        g.input(1, &["batch", "tokens", "8"]);
        assert_eq!(g.shows(), "int64 [batch, tokens]");
        assert_eq!((g.axis(0, 1), g.axis(0, 2)), (Some(1), None));
    }

    #[test]
    fn sums_that_run_along_an_axis_mix_it() {
        let mut g = Given::new("CumSum");
        g.input(1, &["batch", "tokens"]).int_scalar("1");
        g.shows();
        assert_eq!(g.axis(0, 0), Some(0));
        assert_eq!(g.axis_apart(0, 0), None);
    }
}
