//! Operators that compute nothing: the same elements in another order, shape or type, or several times.

use super::context::{Context, axis, axis_or_end, ints_value, like_first, round_to};
use super::*;
use crate::onnx::elem_type;
use crate::shapes::{BATCH, Dim, Value};

pub(super) const OPS: &[Op] = &[
    op("Identity", Shape::First(identity), Axis::Same).is(COPY),
    op("Cast", Shape::First(cast), Axis::Same).is(COPY),
    op("CastLike", Shape::First(cast_like), Axis::Same).is(COPY),
    op("BitCast", Shape::First(bit_cast), Axis::Same),
    op("Dropout", Shape::All(dropout), Axis::Same).is(COPY),
    ms("BiasDropout", Shape::First(like_first), Axis::Same),
    ms("BitmaskDropout", Shape::First(like_first), Axis::Same),
    ms("BitmaskBiasDropout", Shape::First(like_first), Axis::Same),
    op("Reshape", Shape::First(reshape), Axis::By(first_input)).is(RESHAPE),
    op("Flatten", Shape::First(flatten), Axis::Same).is(RESHAPE),
    op("Squeeze", Shape::First(squeeze), Axis::Same).is(RESHAPE),
    op("Unsqueeze", Shape::First(unsqueeze), Axis::Same).is(RESHAPE),
    ms("ExpandDims", Shape::First(expand_dims), Axis::Same).is(RESHAPE),
    op("Transpose", Shape::First(transpose), Axis::By(transposed)).is(TRANSPOSE),
    op("Expand", Shape::First(expand), Axis::By(expanded)).is(REPEAT),
    op("Tile", Shape::First(tile), Axis::By(unchanged_axis)).is(REPEAT),
    op(
        "DepthToSpace",
        Shape::First(blocks),
        Axis::By(outside_of_image),
    ),
    op(
        "SpaceToDepth",
        Shape::First(blocks),
        Axis::By(outside_of_image),
    ),
    op(
        "CenterCropPad",
        Shape::Open("its sizes are data"),
        Axis::Lost("tokens are cut off or added"),
    ),
    op(
        "Col2Im",
        Shape::Open("its sizes are data"),
        Axis::Lost("positions overlap"),
    ),
    op(
        "ReverseSequence",
        Shape::First(like_first),
        Axis::Lost("each row is turned round by a length of its own"),
    ),
    ms(
        "UnfoldTensor",
        Shape::Open("windows overlap"),
        Axis::Lost("positions overlap"),
    ),
    ms(
        "RemovePadding",
        Shape::Open("the number of tokens is data"),
        Axis::Lost("rows are put one behind the other"),
    ),
    ms(
        "RestorePadding",
        Shape::Open("the number of tokens is data"),
        Axis::Lost("rows are put one behind the other"),
    ),
    ms(
        "GatherPacked",
        Shape::Open("the number of tokens is data"),
        Axis::Lost("rows are put one behind the other"),
    ),
];

fn identity(c: &mut Context) -> Option<Fact> {
    c.input(0).cloned()
}

fn cast(c: &mut Context) -> Option<Fact> {
    let to = i32::try_from(c.node.int("to")?).ok()?;
    Some(cast_to(c, to))
}

fn cast_like(c: &mut Context) -> Option<Fact> {
    let to = c.ty(1);
    match to {
        0 => Some(Fact::of(0, c.dims(0))),
        _ => Some(cast_to(c, to)),
    }
}

fn cast_to(c: &Context, to: i32) -> Fact {
    let is_float = elem_type::is_supported_float(to) || to == elem_type::DOUBLE;
    let value = match (c.value(0), to) {
        (Some(Value::Ints(v)), elem_type::INT32 | elem_type::INT64) => Some(Value::Ints(v.clone())),
        (Some(Value::Ints(v)), elem_type::BOOL) => v
            .iter()
            .map(|d| d.known().map(|i| i64::from(i != 0).into()))
            .collect::<Option<_>>()
            .map(Value::Ints),
        (Some(Value::Ints(v)), _) if is_float => v
            .iter()
            .map(Dim::known)
            .map(|i| i.map(|i| round_to(to, i as f64)))
            .collect::<Option<_>>()
            .map(Value::Floats),
        (Some(Value::Floats(v)), elem_type::INT32 | elem_type::INT64) => Some(Value::Ints(
            v.iter().map(|f| Dim::from(f.trunc() as i64)).collect(),
        )),
        (Some(Value::Floats(v)), _) if is_float => {
            Some(Value::Floats(v.iter().map(|&f| round_to(to, f)).collect()))
        }
        _ => None,
    };
    Fact {
        elem_type: to,
        shape: c.dims(0),
        value,
    }
}

fn bit_cast(c: &mut Context) -> Option<Fact> {
    let to = i32::try_from(c.node.int("to")?).ok()?;
    Some(Fact::of(to, c.dims(0)))
}

fn dropout(c: &mut Context) -> Option<Vec<Fact>> {
    let fact = c.input(0)?.clone();
    let mask = Fact::of(elem_type::BOOL, fact.shape.clone());
    Some(vec![fact, mask])
}

fn flatten(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let at = axis_or_end(c.node.int("axis").unwrap_or(1), dims.len())?;
    let (a, b) = (Dim::product(&dims[..at])?, Dim::product(&dims[at..])?);
    Some(Fact::of(c.ty(0), Some(vec![a, b])))
}

fn unsqueeze(c: &mut Context) -> Option<Fact> {
    let axes = c.ints_given("axes", 1)?;
    with_axes(c, axes)
}

fn expand_dims(c: &mut Context) -> Option<Fact> {
    let at = c.ints(1)?;
    with_axes(c, at)
}

fn with_axes(c: &Context, axes: Vec<i64>) -> Option<Fact> {
    let mut dims = c.dims(0)?;
    let rank = dims.len() + axes.len();
    let mut axes = axes
        .into_iter()
        .map(|a| axis(a, rank))
        .collect::<Option<Vec<_>>>()?;
    axes.sort_unstable();
    for at in axes {
        dims.insert(at.min(dims.len()), 1.into());
    }
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(dims),
        value: c.value(0).cloned(),
    })
}

fn squeeze(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let has_axes = c.node.ints("axes").is_some() || c.input(1).is_some();
    let axes: Vec<usize> = if has_axes {
        c.ints_given("axes", 1)?
            .into_iter()
            .map(|a| axis(a, dims.len()))
            .collect::<Option<_>>()?
    } else {
        let known = dims.iter().map(Dim::known).collect::<Option<Vec<_>>>()?;
        let ones = known.iter().enumerate().filter(|&(_, &d)| d == 1);
        ones.map(|(i, _)| i).collect()
    };
    let kept = dims.iter().enumerate().filter(|(i, _)| !axes.contains(i));
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(kept.map(|(_, d)| d.clone()).collect()),
        value: c.value(0).cloned(),
    })
}

fn reshape(c: &mut Context) -> Option<Fact> {
    let ty = c.ty(0);
    let target = c.dims_given("shape", 1)?;
    let value = c.value(0).cloned();
    let input = c.dims(0);
    let allow_zero = c.flag("allowzero");
    let mut dims = Vec::with_capacity(target.len());
    let mut inferred = None;
    for (i, dim) in target.iter().enumerate() {
        dims.push(match dim.known() {
            Some(-1) => {
                inferred = Some(i);
                1.into()
            }
            Some(0) if !allow_zero => input.as_ref()?.get(i)?.clone(),
            _ => dim.clone(),
        });
    }
    let Some(input) = input else {
        // The input's shape is unknown; only a target without -1 says everything.
        return inferred.is_none().then(|| Fact::of(ty, Some(dims)));
    };
    let total = Dim::product(&input)?;
    let first = target.first().and_then(Dim::known).filter(|&n| n > 1);
    let baked = first.filter(|_| inferred != Some(0)).and_then(|first| {
        let rest = total.over(&Dim::product(&dims)?)?;
        match c.static_batch {
            // The input's size depends on the batch, the target's does not.
            Some(batch) => (first % batch == 0 && rest.depends_on(BATCH))
                .then(|| Dim::from(BATCH).times(&(first / batch).into()))?,
            None => match inferred {
                Some(i) => is_traced(&input, &target, i, first),
                // Without a -1 the model works for that number of rows only.
                None => rest.over(&BATCH.into())?.times(&first.into())?.known() == Some(1),
            }
            .then(|| Dim::from(BATCH)),
        }
    });
    if let Some(rows) = &baked {
        dims[0] = rows.clone();
    }
    if let Some(i) = inferred {
        dims[i] = total.over(&Dim::product(&dims)?)?;
    }
    if baked.is_some() {
        c.repaired = without_batch(&target, &dims, input.first(), inferred, allow_zero);
    }
    Some(Fact {
        elem_type: ty,
        shape: Some(dims),
        value,
    })
}

/// Whether `target` begins with the number of rows that TorchScript traced, in a graph whose batch is said to be dynamic:
/// `x.reshape(*x.shape[:-1], -1, 2)` becomes `[2, N, H, -1, 2]`. The -1 at `inferred` would then take up what the batch grows
/// by, behind axes that are those of the input: tokens would be torn apart, which nobody means.
fn is_traced(input: &[Dim], target: &[Dim], inferred: usize, first: i64) -> bool {
    let between = 1..inferred;
    let is_torn = between.clone().any(|i| target[i].known() != Some(1));
    is_torn
        && first > 1
        && input.first() == Some(&BATCH.into())
        && between.clone().all(|i| {
            let same = input.get(i) == Some(&target[i]);
            same || target[i].known() == Some(0)
        })
}

/// The literal `target`, whose first size is the batch, rewritten for any batch: -1 there if every
/// other size is known, else 0 (copy) if the input starts with it too.
fn without_batch(
    target: &[Dim],
    dims: &[Dim],
    input_first: Option<&Dim>,
    inferred: Option<usize>,
    allow_zero: bool,
) -> Option<Vec<i64>> {
    let mut literal = target.iter().map(Dim::known).collect::<Option<Vec<_>>>()?;
    match inferred {
        None => literal[0] = -1,
        Some(i) => match dims[i].known() {
            Some(size) => {
                literal[i] = size;
                literal[0] = -1;
            }
            None if !allow_zero && input_first == dims.first() => literal[0] = 0,
            None => return None,
        },
    }
    Some(literal)
}

fn permutation(node: &Node, rank: usize) -> Option<Vec<usize>> {
    match node.ints("perm") {
        Some(perm) if !perm.is_empty() => {
            let perm = perm.iter().map(|&p| axis(p, rank));
            perm.collect::<Option<Vec<_>>>().filter(|p| p.len() == rank)
        }
        _ => Some((0..rank).rev().collect()),
    }
}

fn transpose(c: &mut Context) -> Option<Fact> {
    let dims = c.shape(0)?;
    let perm = permutation(c.node, dims.len())?;
    let dims = perm.iter().map(|&p| dims[p].clone()).collect();
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn transposed(f: &AxisStep) -> Option<AxisOffset> {
    let (axis, inner) = f.at()?;
    let perm = permutation(f.node, f.input.len())?;
    f.moved(perm.iter().position(|&p| p == axis)?, &inner)
}

fn first_input(f: &AxisStep) -> Option<AxisOffset> {
    (f.slot == 0).then(|| f.place.clone())
}

fn expand(c: &mut Context) -> Option<Fact> {
    let target = c.value(1).and_then(ints_value)?.to_vec();
    let dims = c.dims(0)?;
    // An empty target, or 1, leaves a size as it is.
    let dims = c.broadcast(&dims, &target);
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn expanded(f: &AxisStep) -> Option<AxisOffset> {
    if f.slot != 0 {
        return None;
    }
    f.aligned()
}

fn tile(c: &mut Context) -> Option<Fact> {
    let dims = c.dims(0)?;
    let repeats = c.value(1).and_then(ints_value)?;
    let tiled = dims.iter().zip(repeats).map(|(d, n)| d.times(n));
    let tiled = tiled.collect::<Option<Vec<_>>>()?;
    Some(Fact::of(
        c.ty(0),
        (tiled.len() == dims.len()).then_some(tiled),
    ))
}

/// Axes that keep their size keep their place.
pub(super) fn unchanged_axis(f: &AxisStep) -> Option<AxisOffset> {
    if f.slot != 0 {
        return None;
    }
    f.unless_resized()
}

/// Blocks of pixels become channels, or the reverse.
fn blocks(c: &mut Context) -> Option<Fact> {
    let [batch, channels, height, width] = c.shape(0)? else {
        return None;
    };
    let size = Dim::from(c.node.int("blocksize")?);
    let area = size.times(&size)?;
    let dims = if c.node.is("DepthToSpace") {
        [
            batch.clone(),
            channels.over(&area)?,
            height.times(&size)?,
            width.times(&size)?,
        ]
    } else {
        [
            batch.clone(),
            channels.times(&area)?,
            height.over(&size)?,
            width.over(&size)?,
        ]
    };
    Some(Fact::of(c.ty(0), Some(dims.to_vec())))
}

fn outside_of_image(f: &AxisStep) -> Option<AxisOffset> {
    let (axis, inner) = f.at()?;
    if f.slot != 0 || axis != 0 {
        return None;
    }
    f.moved(0, &inner)
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;
    use super::*;

    #[test]
    fn casts_keep_the_shape_and_what_is_known() {
        let mut g = Given::new("Cast").int("to", 10);
        g.input(elem_type::FLOAT, &["batch", "4"]);
        assert_eq!(g.shows(), "float16 [batch, 4]");
        let mut g = Given::new("CastLike");
        g.floats(&[0.5]).input(elem_type::FLOAT16, &["3"]);
        assert_eq!(g.shows(), "float16 [1] = [0.5]");
        let mut g = Given::new("CastLike");
        g.input(elem_type::FLOAT, &["batch"]).unknown();
        assert_eq!(g.shows(), "? [batch]");
    }

    #[test]
    fn reshape_resolves_zeros_and_the_rest() {
        let mut g = Given::new("Reshape");
        g.input(1, &["batch", "64", "72"]).ints(&[0, -1, 4, 18]);
        assert_eq!(g.shows(), "float32 [batch, 64, 4, 18]");
        let mut g = Given::new("Reshape").int("allowzero", 1);
        g.input(1, &["batch", "64"]).ints(&[0, 3]);
        assert_eq!(g.shows(), "float32 [0, 3]");
    }

    #[test]
    fn rows_that_were_traced_into_a_target_are_the_batch() {
        let mut g = Given::new("Reshape");
        g.input(1, &["batch", "32", "16"]).ints(&[2, 32, 4, 4]);
        assert_eq!(g.shows(), "float32 [batch, 32, 4, 4]");
        assert_eq!(g.repaired, Some(vec![-1, 32, 4, 4]));
        let mut g = Given::new("Reshape");
        g.input(1, &["batch", "32", "2", "16"])
            .ints(&[2, 32, 2, -1, 2]);
        assert_eq!(g.shows(), "float32 [batch, 32, 2, 8, 2]");
        assert_eq!(g.repaired, Some(vec![-1, 32, 2, 8, 2]));
        // Halves of guidance are meant.
        let mut g = Given::new("Reshape");
        g.input(1, &["batch", "32", "16"]).ints(&[2, -1, 32, 16]);
        assert_eq!(g.shows(), "float32 [2, batch/2, 32, 16]");
        assert_eq!(g.repaired, None);
    }

    #[test]
    fn a_static_batch_in_a_target_is_taken_out() {
        let mut g = Given::new("Reshape").static_batch(2);
        g.input(1, &["batch", "32", "16"]).ints(&[2, 32, 4, 4]);
        assert_eq!(g.shows(), "float32 [batch, 32, 4, 4]");
        assert_eq!(g.repaired, Some(vec![-1, 32, 4, 4]));
    }

    #[test]
    fn axes_come_and_go() {
        let mut g = Given::new("Unsqueeze");
        g.input(1, &["batch", "4"]).ints(&[-1, 1]);
        assert_eq!(g.shows(), "float32 [batch, 1, 4, 1]");
        let mut g = Given::new("Squeeze").ints_attribute("axes", &[-2]);
        g.input(1, &["batch", "1", "4"]);
        assert_eq!(g.shows(), "float32 [batch, 4]");
        // What a symbol may be 1 is not known to go.
        let mut g = Given::new("Squeeze");
        g.input(1, &["batch", "1", "4"]);
        assert_eq!(g.shows(), "unknown");
        let mut g = Given::new("Flatten").int("axis", 2);
        g.input(1, &["batch", "3", "4", "5"]);
        assert_eq!(g.shows(), "float32 [3·batch, 20]");
    }

    #[test]
    fn axes_keep_their_place_through_layout() {
        let mut g = Given::new("Transpose").ints_attribute("perm", &[0, 2, 1, 3]);
        g.input(1, &["batch", "tokens", "4", "8"]);
        assert_eq!(g.shows(), "float32 [batch, 4, tokens, 8]");
        assert_eq!(g.axis(0, 1), Some(2));
        let mut g = Given::new("Reshape");
        g.input(1, &["batch", "tokens", "32"]).ints(&[0, 0, 4, 8]);
        g.shows();
        assert_eq!(g.axis(0, 1), Some(1));
        let mut g = Given::new("Tile");
        g.input(1, &["batch", "tokens"]).ints(&[2, 1]);
        assert_eq!(g.shows(), "float32 [2·batch, tokens]");
        assert_eq!(g.axis(0, 1), Some(1));
        assert_eq!(g.axis(0, 0), None);
    }

    #[test]
    fn expanding_aligns_at_the_end() {
        let mut g = Given::new("Expand");
        g.input(1, &["tokens", "1"]).ints(&[2, 1, 8]);
        assert_eq!(g.shows(), "float32 [2, tokens, 8]");
        assert_eq!(g.axis(0, 0), Some(1));
    }

    #[test]
    fn blocks_of_pixels_become_channels() {
        let mut g = Given::new("SpaceToDepth").int("blocksize", 2);
        g.input(1, &["batch", "4", "height", "8"]);
        assert_eq!(g.shows(), "float32 [batch, 16, height/2, 4]");
        assert_eq!(g.axis(0, 0), Some(0));
        assert_eq!(g.axis(0, 2), None);
    }
}
