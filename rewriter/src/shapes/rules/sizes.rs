//! Shape arithmetic: what makes sizes, ranges and fills, and what makes numbers out of nothing.

use super::context::{Context, axis, ints_value, is_integer, like_first, same_as};
use super::*;
use crate::onnx::{self, elem_type};
use crate::shapes::{Dim, Value};

/// Shape vectors are short; longer fills are data.
const LISTED: i64 = 64;

const fn random(name: &'static str, shape: Shape, axis: Axis) -> Op {
    op(name, shape, axis).is(RANDOM)
}

const NOTHING_IN: &str = "it has no input with axes";

pub(super) const OPS: &[Op] = &[
    op("Constant", Shape::First(constant), Axis::Lost(NOTHING_IN)).is(PICK),
    op(
        "Shape",
        Shape::First(shape),
        Axis::Lost("a size is not data"),
    )
    .is(SIZE),
    op("Size", Shape::First(size), Axis::Lost("a size is not data")).is(SIZE),
    op(
        "ConstantOfShape",
        Shape::First(fill),
        Axis::Lost("a size is not data"),
    ),
    op("Range", Shape::First(range), Axis::Lost(NOTHING_IN)),
    ms("Range", Shape::First(range), Axis::Lost(NOTHING_IN)),
    op("OneHot", Shape::First(one_hot), Axis::By(one_hot_axis)),
    op(
        "EyeLike",
        Shape::First(eye_like),
        Axis::Lost("a size is not data"),
    ),
    op(
        "NonZero",
        Shape::First(non_zero),
        Axis::Lost("how many there are is data"),
    ),
    random("RandomNormal", Shape::First(drawn), Axis::Lost(NOTHING_IN)),
    random("RandomUniform", Shape::First(drawn), Axis::Lost(NOTHING_IN)),
    random(
        "RandomNormalLike",
        Shape::First(drawn_like),
        Axis::Lost("a size is not data"),
    ),
    random(
        "RandomUniformLike",
        Shape::First(drawn_like),
        Axis::Lost("a size is not data"),
    ),
    random("Bernoulli", Shape::First(drawn_like), Axis::Same),
    random(
        "Multinomial",
        Shape::Open("how many there are is an attribute"),
        Axis::Lost("classes become samples"),
    ),
    op("HannWindow", Shape::First(window), Axis::Lost(NOTHING_IN)),
    op(
        "HammingWindow",
        Shape::First(window),
        Axis::Lost(NOTHING_IN),
    ),
    op(
        "BlackmanWindow",
        Shape::First(window),
        Axis::Lost(NOTHING_IN),
    ),
    op(
        "MelWeightMatrix",
        Shape::Open("a filter bank of a spectrogram"),
        Axis::Lost(NOTHING_IN),
    ),
    op(
        "AffineGrid",
        Shape::Open("its sizes are data"),
        Axis::Lost("a grid is made of few numbers"),
    ),
    ms(
        "RelativePositionBias",
        Shape::Open("its sizes are data"),
        Axis::Lost("a table becomes a bias"),
    ),
    ms(
        "GatedRelativePositionBias",
        Shape::Open("its sizes are data"),
        Axis::Lost("queries become a bias"),
    ),
];

fn constant(c: &mut Context) -> Option<Fact> {
    c.graph.constant(c.node.output(0)).as_ref().map(Fact::from)
}

fn shape(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let rank = i64::try_from(dims.len()).ok()?;
    let clamp =
        |at: i64| (if at < 0 { at.saturating_add(rank) } else { at }).clamp(0, rank) as usize;
    let start = clamp(c.node.int("start").unwrap_or(0));
    let end = clamp(c.node.int("end").unwrap_or(rank)).max(start);
    let dims = dims[start..end].to_vec();
    Some(Fact {
        elem_type: elem_type::INT64,
        shape: Some(vec![(dims.len() as i64).into()]),
        value: Some(Value::Ints(dims)),
    })
}

fn size(c: &mut Context) -> Option<Fact> {
    let size = Dim::product(c.shape(0)?)?;
    Some(Fact {
        elem_type: elem_type::INT64,
        shape: Some(vec![]),
        value: Some(Value::Ints(vec![size])),
    })
}

fn fill(c: &mut Context) -> Option<Fact> {
    let dims = ints_value(c.value(0)?)?.to_vec();
    let fill = match c.node.attribute("value").and_then(|a| a.t.as_ref()) {
        Some(tensor) => onnx::Constant::read(tensor)?.1,
        None => onnx::Constant {
            elem_type: elem_type::FLOAT,
            dims: vec![1],
            data: Some(onnx::Data::Floats(vec![0.0])),
        },
    };
    let count = Dim::product(&dims).and_then(|n| n.known());
    let value = count.filter(|n| (0..=LISTED).contains(n)).and_then(|n| {
        let n = n as usize;
        Some(match fill.data.as_ref()? {
            onnx::Data::Ints(v) => Value::Ints(vec![(*v.first()?).into(); n]),
            onnx::Data::Floats(v) => Value::Floats(vec![*v.first()?; n]),
        })
    });
    Some(Fact {
        elem_type: fill.elem_type,
        shape: Some(dims),
        value,
    })
}

fn range(c: &mut Context) -> Option<Fact> {
    let scalars = [0, 1, 2].map(|i| c.input(i).and_then(Fact::scalar));
    let step_given = c.input(2).is_some();
    let by_one = scalars[2] == Some(1.0) || !step_given;
    let mut value = None;
    let dim = match (scalars[0], c.value(1), scalars[1]) {
        (Some(0.0), Some(Value::Ints(limit)), None) if by_one && limit.len() == 1 => {
            limit[0].clone()
        }
        (Some(start), _, Some(limit)) if by_one || scalars[2].is_some() => {
            let step = if by_one { 1.0 } else { scalars[2]? };
            let count = ((limit - start) / step).ceil().max(0.0);
            if count.is_nan() || count > f64::from(i32::MAX) {
                return None;
            }
            if is_integer(c.ty(0)) && count <= LISTED as f64 {
                let all = (0..count as i64).map(|i| Dim::from(start as i64 + i * step as i64));
                value = Some(Value::Ints(all.collect()));
            }
            (count as i64).into()
        }
        _ => c.fresh(),
    };
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(vec![dim]),
        value,
    })
}

/// TorchScript spells `repeat_interleave` with it: a shape vector of ones and one repeat count.
fn one_hot(c: &mut Context) -> Option<Fact> {
    let mut dims = c.dims(0)?;
    let depth = c.input(1)?.scalar()? as i64;
    let at = axis(c.node.int("axis").unwrap_or(-1), dims.len() + 1)?;
    dims.insert(at, depth.into());
    let value = (|| {
        let [hot] = c.ints(0)?[..] else { return None };
        let [off, on] = ints_value(c.value(2)?)? else {
            return None;
        };
        let hot = axis(hot, usize::try_from(depth).ok()?)?;
        let pick = |i: usize| if i == hot { on } else { off }.clone();
        (depth <= LISTED).then(|| Value::Ints((0..depth as usize).map(pick).collect()))
    })();
    Some(Fact {
        elem_type: c.ty(2),
        shape: Some(dims),
        value,
    })
}

fn one_hot_axis(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    let new = axis(f.node.int("axis").unwrap_or(-1), f.input.len() + 1)?;
    if f.slot != 0 {
        return None;
    }
    f.moved(at + usize::from(at >= new), &inner)
}

fn eye_like(c: &mut Context) -> Option<Fact> {
    same_as(c, data_type(c).unwrap_or(c.ty(0)))
}

fn non_zero(c: &mut Context) -> Option<Fact> {
    let rank = c.shape(0)?.len() as i64;
    let count = c.fresh();
    Some(Fact::of(elem_type::INT64, Some(vec![rank.into(), count])))
}

fn data_type(c: &Context) -> Option<i32> {
    i32::try_from(c.node.int("dtype")?).ok()
}

fn drawn(c: &mut Context) -> Option<Fact> {
    let dims = c.node.ints("shape")?.iter().map(|&d| d.into()).collect();
    let ty = data_type(c).unwrap_or(elem_type::FLOAT);
    Some(Fact::of(ty, Some(dims)))
}

fn drawn_like(c: &mut Context) -> Option<Fact> {
    match data_type(c) {
        Some(ty) => same_as(c, ty),
        None => like_first(c),
    }
}

fn window(c: &mut Context) -> Option<Fact> {
    let size = c.value(0).and_then(ints_value)?.first()?.clone();
    let ty = c.node.int("output_datatype").unwrap_or(1);
    Some(Fact::of(i32::try_from(ty).ok()?, Some(vec![size])))
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;

    #[test]
    fn sizes_are_values() {
        let mut g = Given::new("Shape").int("start", -2);
        g.input(1, &["batch", "tokens", "8"]);
        assert_eq!(g.shows(), "int64 [2] = [tokens, 8]");
        let mut g = Given::new("Size");
        g.input(1, &["batch", "8"]);
        assert_eq!(g.shows(), "int64 [] = [8·batch]");
        let mut g = Given::new("ConstantOfShape");
        g.sizes(&["2"]);
        assert_eq!(g.shows(), "float32 [2] = [0.0, 0.0]");
        let mut g = Given::new("ConstantOfShape");
        g.sizes(&["batch", "8"]);
        assert_eq!(g.shows(), "float32 [batch, 8]");
    }

    #[test]
    fn ranges_have_a_size() {
        let mut g = Given::new("Range");
        g.int_scalar("0").int_scalar("tokens").int_scalar("1");
        assert_eq!(g.shows(), "int64 [tokens]");
        let mut g = Given::new("Range");
        g.int_scalar("1").int_scalar("8").int_scalar("3");
        assert_eq!(g.shows(), "int64 [3] = [1, 4, 7]");
        let mut g = Given::new("Range");
        g.int_scalar("1").int_scalar("tokens").int_scalar("1");
        assert_eq!(g.shows(), "int64 [?]");
    }

    #[test]
    fn a_hot_one_is_a_repeat_count() {
        let mut g = Given::new("OneHot");
        g.ints(&[1]).int_scalar("3").sizes(&["1", "batch"]);
        assert_eq!(g.shows(), "int64 [1, 3] = [1, batch, 1]");
        let mut g = Given::new("OneHot").int("axis", 0);
        g.input(7, &["batch"]).int_scalar("3").ints(&[0, 1]);
        assert_eq!(g.shows(), "int64 [3, batch]");
        assert_eq!(g.axis(0, 0), Some(1));
    }
}
