//! Operators that pick, cut, join or overwrite elements along an axis.

use super::context::{Context, at_positions, axis, ints_value, like_first};
use super::layout::unchanged_axis;
use super::*;
use crate::onnx::elem_type;
use crate::shapes::{BATCH, Dim, Value};

/// Axes longer than this are data, not shape vectors.
const LISTED: i64 = 64;

pub(super) const OPS: &[Op] = &[
    op("Gather", Shape::First(gather), Axis::By(gathered))
        .is(PICK)
        .ends(is_picked),
    op(
        "GatherElements",
        Shape::First(gather_elements),
        Axis::By(unchanged_axis),
    ),
    op("GatherND", Shape::First(gather_nd), Axis::By(gathered_nd)),
    ms("GatherND", Shape::First(gather_nd), Axis::By(gathered_nd)),
    ms(
        "GatherBlockQuantized",
        Shape::First(gather_quantized),
        Axis::By(gathered_quantized),
    ),
    op("Slice", Shape::First(slice), Axis::By(unchanged_axis)).is(PICK),
    op("Split", Shape::All(split), Axis::By(unchanged_axis)).is(PICK),
    op("Concat", Shape::First(concat), Axis::By(concatenated)).is(PICK),
    op("Pad", Shape::First(pad), Axis::By(unchanged_axis)),
    ms("Pad", Shape::First(pad), Axis::By(unchanged_axis)),
    op("Trilu", Shape::First(like_first), Axis::Same),
    ms("Trilu", Shape::First(like_first), Axis::Same),
    op("ScatterND", Shape::First(like_first), Axis::Same),
    op("ScatterElements", Shape::First(like_first), Axis::Same),
    op("Scatter", Shape::First(like_first), Axis::Same),
    op("TensorScatter", Shape::First(like_first), Axis::Same),
    op("TopK", Shape::All(top_k), Axis::By(sorted)).along(along_axis),
    op("Compress", Shape::First(compress), Axis::By(unchanged_axis)),
    op(
        "Unique",
        Shape::Open("how many there are is data"),
        Axis::Lost("elements are sorted"),
    ),
    ms(
        "Unique",
        Shape::Open("how many there are is data"),
        Axis::Lost("elements are sorted"),
    ),
    op(
        "NonMaxSuppression",
        Shape::Open("how many there are is data"),
        Axis::Lost("boxes are picked"),
    ),
    op(
        "RoiAlign",
        Shape::Open("regions of an image"),
        Axis::Lost("regions of an image"),
    ),
    op(
        "MaxRoiPool",
        Shape::Open("regions of an image"),
        Axis::Lost("regions of an image"),
    ),
    ms(
        "CropAndResize",
        Shape::Open("regions of an image"),
        Axis::Lost("regions of an image"),
    ),
];

/// An axis of which elements are sorted by one another.
fn along_axis(node: &Node, rank: usize) -> Option<Range<usize>> {
    let at = axis(node.int("axis").unwrap_or(-1), rank)?;
    Some(at..at + 1)
}

fn gather(c: &mut Context) -> Option<Fact> {
    let data = c.shape(0)?;
    let indices = c.shape(1)?;
    let at = axis(c.node.int("axis").unwrap_or(0), data.len())?;
    let dims: Vec<Dim> = [&data[..at], indices, &data[at + 1..]].concat();
    let value = (|| {
        if data.len() != 1 {
            return None;
        }
        let len = usize::try_from(data[0].known()?).ok()?;
        let picked = c.ints(1)?.into_iter().map(|i| axis(i, len));
        at_positions(c.value(0)?, &picked.collect::<Option<Vec<_>>>()?)
    })();
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(dims),
        value,
    })
}

fn gathered(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    let picked = axis(f.node.int("axis").unwrap_or(0), f.input.len())?;
    if f.slot == 1 {
        // The indices' axes stand where the picked axis was, and everything outside that is outside them too.
        return f.moved(picked + at, &inner);
    }
    let indices = f.facts.shape(f.node.input(1)?)?.len();
    match picked.cmp(&at) {
        std::cmp::Ordering::Equal => None,
        std::cmp::Ordering::Greater => f.moved(at, &inner),
        std::cmp::Ordering::Less => f.moved((at + indices).checked_sub(1)?, &inner),
    }
}

/// One element of the axis is taken.
fn is_picked(f: &AxisStep) -> bool {
    let picked = axis(f.node.int("axis").unwrap_or(0), f.input.len());
    let indices = f.node.input(1).and_then(|i| f.facts.shape(i));
    let is_one = indices.is_some_and(|dims| dims.iter().all(|d| d.known() == Some(1)));
    f.slot == 0 && is_one && f.at().is_some_and(|(at, _)| Some(at) == picked)
}

fn gather_elements(c: &mut Context) -> Option<Fact> {
    Some(Fact::of(c.ty(0), c.dims(1)))
}

fn gather_nd(c: &mut Context) -> Option<Fact> {
    let (data, indices) = (c.shape(0)?, c.shape(1)?);
    let batch = usize::try_from(c.node.int("batch_dims").unwrap_or(0)).ok()?;
    let depth = usize::try_from(indices.last()?.known()?).ok()?;
    let rest = data.get(batch.checked_add(depth)?..)?;
    let dims = [&indices[..indices.len() - 1], rest].concat();
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn gathered_nd(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    let batch = usize::try_from(f.node.int("batch_dims").unwrap_or(0)).ok()?;
    if f.slot != 0 || at >= batch {
        return None;
    }
    f.moved(at, &inner)
}

/// A table in blocks of integers; the result has the type of its scales.
fn gather_quantized(c: &mut Context) -> Option<Fact> {
    let (data, indices) = (c.shape(0)?, c.shape(1)?);
    let at = axis(c.node.int("gather_axis").unwrap_or(0), data.len())?;
    let mut data = data.to_vec();
    // Two numbers of 4 bits in a byte.
    if c.node.int("bits").unwrap_or(4) == 4 && c.ty(0) == elem_type::UINT8 {
        let quantized = axis(c.node.int("quantize_axis").unwrap_or(1), data.len())?;
        data[quantized] = data[quantized].times(&2.into())?;
    }
    let dims = [&data[..at], indices, &data[at + 1..]].concat();
    Some(Fact::of(c.ty(2), Some(dims)))
}

fn gathered_quantized(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    let data = f.facts.shape(f.node.input(0)?)?;
    let picked = axis(f.node.int("gather_axis").unwrap_or(0), data.len())?;
    if f.slot != 1 {
        return None;
    }
    f.moved(picked + at, &inner)
}

fn slice(c: &mut Context) -> Option<Fact> {
    let mut dims = c.dims(0)?;
    let bounds = |attribute: &str, input: usize| c.dims_given(attribute, input);
    let (starts, ends) = (bounds("starts", 1), bounds("ends", 2));
    let has_axes = c.node.ints("axes").is_some() || c.input(3).is_some();
    let axes = if has_axes {
        c.ints_given("axes", 3)?
    } else {
        let count = starts.as_ref().or(ends.as_ref())?.len();
        (0..count as i64).collect()
    };
    let steps = match c.input(4) {
        Some(_) => c.ints(4),
        None => Some(vec![1; axes.len()]),
    };
    let mut value = None;
    for (i, &at) in axes.iter().enumerate() {
        let at = axis(at, dims.len())?;
        let start = starts.as_ref().and_then(|s| s.get(i).cloned());
        let end = ends.as_ref().and_then(|s| s.get(i).cloned());
        let step = steps.as_ref().and_then(|s| s.get(i).copied());
        let numbers = |d: &Option<Dim>| d.as_ref().and_then(Dim::known);
        let known = (numbers(&start), numbers(&end), step, dims[at].known());
        dims[at] = match known {
            (Some(start), Some(end), Some(step), Some(size)) => {
                let (count, picked) = positions(start, end, step, size)?;
                if dims.len() == 1 && picked.len() as i64 == count {
                    value = c.value(0).and_then(|v| at_positions(v, &picked));
                }
                count.into()
            }
            (_, _, Some(1), _) => match (start, end) {
                (Some(from), Some(to)) => {
                    span(c, &dims[at].clone(), &from, &to).unwrap_or_else(|| c.fresh())
                }
                _ => c.fresh(),
            },
            (Some(0), Some(end), Some(step), None) if step > 1 && end >= i64::from(i32::MAX) => {
                // Every other token: whole where the size is a multiple.
                let part = dims[at].over(&step.into())?;
                if part.is_whole() { part } else { c.fresh() }
            }
            _ => c.fresh(),
        };
    }
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(dims),
        value,
    })
}

/// How much of an axis of size `size` lies between two bounds, which exporters keep inside the axis: one stream of a joint
/// sequence, one half of a batch.
fn span(c: &mut Context, size: &Dim, from: &Dim, to: &Dim) -> Option<Dim> {
    let absolute = |c: &mut Context, at: &Dim| match at.known() {
        Some(end) if end >= i64::from(i32::MAX) => Some(size.clone()),
        // A literal bound of a batch that was traced: half of it, as in `x[: len(x) // 2]`.
        Some(n) if n > 0 && size.depends_on(BATCH) && c.static_batch.is_some() => {
            size.times(&n.into())?.over(&c.literal(size)?.into())
        }
        _ if at.is_negative() => c.symbols.sum(size, at, false),
        // A slice stops at the end of the axis: a literal beyond it would be no size.
        Some(n) if n > 0 && size.known().is_none() && !c.symbols.is_part(at, size) => None,
        _ => Some(at.clone()),
    };
    let (from, to) = (absolute(c, from)?, absolute(c, to)?);
    c.symbols
        .sum(&to, &from, true)
        .filter(|d| d.known().is_none_or(|n| n >= 0) && !d.is_negative())
}

/// Positions that a slice of an axis of `size` elements picks: their count, and the list itself where the axis is short enough
/// to be a shape vector.
fn positions(start: i64, end: i64, step: i64, size: i64) -> Option<(i64, Vec<usize>)> {
    let wrap = |at: i64| if at < 0 { at.saturating_add(size) } else { at };
    let (start, span) = match step {
        1.. => {
            let start = wrap(start).clamp(0, size);
            (start, wrap(end).clamp(0, size) - start)
        }
        0 => return None,
        _ => {
            let start = wrap(start).clamp(-1, size - 1);
            (start, start - wrap(end).clamp(-1, size - 1))
        }
    };
    let stride = i64::try_from(step.unsigned_abs()).ok()?;
    let count = if span <= 0 {
        0
    } else {
        (span - 1) / stride + 1
    };
    let list = if size <= LISTED {
        (0..count).map(|i| (start + i * step) as usize).collect()
    } else {
        Vec::new()
    };
    Some((count, list))
}

fn split(c: &mut Context) -> Option<Vec<Fact>> {
    let dims = c.dims(0)?;
    let count = c.node.proto.output.len();
    let at = axis(c.node.int("axis").unwrap_or(0), dims.len())?;
    let given = c.node.ints("split").is_some_and(|s| !s.is_empty()) || c.input(1).is_some();
    let sizes: Option<Vec<Dim>> = if given {
        c.dims_given("split", 1)
    } else {
        even_parts(&dims[at], count)
    };
    let ty = c.ty(0);
    let value = c.value(0).filter(|_| dims.len() == 1).cloned();
    let mut offset = 0usize;
    let mut facts = Vec::with_capacity(count);
    for i in 0..count {
        let size = match &sizes {
            Some(sizes) => sizes.get(i)?.clone(),
            None => c.fresh(),
        };
        let known = size.known().and_then(|n| usize::try_from(n).ok());
        let piece = value.as_ref().zip(known).and_then(|(value, n)| {
            let positions: Vec<usize> = (offset..offset.checked_add(n)?).collect();
            at_positions(value, &positions)
        });
        offset = offset.saturating_add(known.unwrap_or(0));
        let mut out = dims.clone();
        out[at] = size;
        facts.push(Fact {
            elem_type: ty,
            shape: Some(out),
            value: piece.filter(|_| sizes.is_some()),
        });
    }
    Some(facts)
}

/// `size` in `count` parts, of which the last may be smaller (since opset 18).
fn even_parts(size: &Dim, count: usize) -> Option<Vec<Dim>> {
    let parts = i64::try_from(count).ok().filter(|&n| n > 0)?;
    let Some(known) = size.known() else {
        return Some(vec![size.over(&parts.into())?; count]);
    };
    let part = known.checked_add(parts - 1)? / parts;
    let last = known - part * (parts - 1);
    let mut sizes = vec![Dim::from(part); count];
    *sizes.last_mut()? = last.into();
    (last >= 0).then_some(sizes)
}

fn concat(c: &mut Context) -> Option<Fact> {
    let count = c.inputs.len();
    let mut dims = c.dims(0)?;
    let at = axis(c.node.int("axis").unwrap_or(0), dims.len())?;
    for i in 1..count {
        let other = c.dims(i)?;
        if other.len() != dims.len() {
            return None;
        }
        let sum = c.symbols.sum(&dims[at], &other[at], false)?;
        for (axis, dim) in other.into_iter().enumerate() {
            dims[axis] = if axis == at {
                sum.clone()
            } else {
                let before = dims[axis].clone();
                c.unify(&before, &dim)
            };
        }
    }
    let value = (dims.len() == 1)
        .then(|| {
            let mut all = Vec::new();
            for i in 0..count {
                all.extend(ints_value(c.value(i)?)?.iter().cloned());
            }
            Some(Value::Ints(all))
        })
        .flatten();
    Some(Fact {
        elem_type: c.ty(0),
        shape: Some(dims),
        value,
    })
}

fn concatenated(f: &AxisStep) -> Option<AxisOffset> {
    f.unless_resized()
}

fn pad(c: &mut Context) -> Option<Fact> {
    let dims = c.dims(0)?;
    let rank = dims.len();
    let axes: Option<Vec<usize>> = match c.input(3) {
        Some(_) => c.ints(3).and_then(|list| {
            let axes = list.into_iter().map(|a| axis(a, rank));
            axes.collect()
        }),
        None => Some((0..rank).collect()),
    };
    let pads = c
        .ints_given("pads", 1)
        .or_else(|| c.node.ints("paddings").map(<[i64]>::to_vec));
    let pads = axes
        .zip(pads)
        .filter(|(axes, pads)| pads.len() == 2 * axes.len());
    let dims = dims
        .into_iter()
        .enumerate()
        .map(|(at, dim)| {
            let more =
                pads.as_ref()
                    .and_then(|(axes, pads)| match axes.iter().position(|&a| a == at) {
                        Some(i) => pads[i].checked_add(pads[i + axes.len()]),
                        None => Some(0),
                    });
            more.and_then(|more| c.symbols.sum(&dim, &more.into(), false))
                .unwrap_or_else(|| c.fresh())
        })
        .collect();
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn top_k(c: &mut Context) -> Option<Vec<Fact>> {
    let mut dims = c.dims(0)?;
    let at = axis(c.node.int("axis").unwrap_or(-1), dims.len())?;
    let count = match c.node.int("k") {
        Some(k) => Some(k.into()),
        None => c
            .value(1)
            .and_then(ints_value)
            .and_then(|k| k.first().cloned()),
    };
    dims[at] = count.unwrap_or_else(|| c.fresh());
    Some(vec![
        Fact::of(c.ty(0), Some(dims.clone())),
        Fact::of(elem_type::INT64, Some(dims)),
    ])
}

/// Along the sorted axis elements lose their order even if all are kept.
fn sorted(f: &AxisStep) -> Option<AxisOffset> {
    let (at, _) = f.at()?;
    let sorted = axis(f.node.int("axis").unwrap_or(-1), f.input.len())?;
    if f.slot != 0 || at == sorted {
        return None;
    }
    f.unless_resized()
}

fn compress(c: &mut Context) -> Option<Fact> {
    let kept = c.fresh();
    let dims = match c.node.int("axis") {
        Some(at) => {
            let mut dims = c.dims(0)?;
            let at = axis(at, dims.len())?;
            dims[at] = kept;
            dims
        }
        None => vec![kept],
    };
    Some(Fact::of(c.ty(0), Some(dims)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;

    #[test]
    fn gathering_puts_the_indices_in_the_axis_place() {
        let mut g = Given::new("Gather").int("axis", 1);
        g.input(1, &["batch", "9", "8"]).input(7, &["3", "4"]);
        assert_eq!(g.shows(), "float32 [batch, 3, 4, 8]");
        assert_eq!(
            (g.axis(0, 0), g.axis(0, 1), g.axis(0, 2)),
            (Some(0), None, Some(3))
        );
        assert_eq!(g.axis(1, 0), Some(1));
        let mut g = Given::new("Gather");
        g.sizes(&["batch", "tokens"]).int_scalar("-1");
        assert_eq!(g.shows(), "int64 [] = [tokens]");
    }

    #[test]
    fn gathered_elements_have_the_shape_of_the_indices() {
        let mut g = Given::new("GatherElements").int("axis", 1);
        g.input(1, &["batch", "64", "8"])
            .input(7, &["batch", "48", "8"]);
        assert_eq!(g.shows(), "float32 [batch, 48, 8]");
        assert_eq!((g.axis(0, 0), g.axis(0, 1)), (Some(0), None));
        let mut g = Given::new("GatherND").int("batch_dims", 1);
        g.input(1, &["batch", "9", "8"])
            .input(7, &["batch", "5", "1"]);
        assert_eq!(g.shows(), "float32 [batch, 5, 8]");
        assert_eq!(g.axis(0, 0), Some(0));
    }

    #[test]
    fn slices_have_their_size() {
        let slice = |dims: &[&str], from: &[i64], to: &[i64], at: &[i64]| {
            let mut g = Given::new("Slice");
            g.input(1, dims).ints(from).ints(to).ints(at);
            g.shows()
        };
        assert_eq!(
            slice(&["batch", "9"], &[1], &[-2], &[1]),
            "float32 [batch, 6]"
        );
        assert_eq!(
            slice(&["batch", "tokens"], &[0], &[i64::MAX], &[1]),
            "float32 [batch, tokens]"
        );
        // It may stop before 5.
        assert_eq!(
            slice(&["batch", "tokens"], &[0], &[5], &[1]),
            "float32 [batch, ?]"
        );
        let mut g = Given::new("Slice");
        g.sizes(&["batch", "tokens", "8"])
            .ints(&[-1])
            .ints(&[-9])
            .ints(&[0])
            .ints(&[-2]);
        assert_eq!(g.shows(), "int64 [2] = [8, batch]");
        let mut g = Given::new("Slice");
        g.input(1, &["7", "6", "5"]).ints(&[1, 2]).ints(&[4, 4]);
        assert_eq!(g.shows(), "float32 [3, 2, 5]");
    }

    #[test]
    fn what_was_joined_is_taken_apart_again() {
        let mut g = Given::new("Concat").int("axis", 1);
        g.input(1, &["batch", "text", "8"])
            .input(1, &["batch", "image", "8"]);
        assert_eq!(g.shows(), "float32 [batch, (text + image), 8]");
        assert_eq!((g.axis(0, 0), g.axis(0, 1)), (Some(0), None));
        let mut g = Given::new("Split").int("axis", -1).outputs(2);
        g.input(1, &["batch", "7"]);
        assert_eq!(g.shows_all(), ["float32 [batch, 4]", "float32 [batch, 3]"]);
        let mut g = Given::new("Split").outputs(2);
        g.sizes(&["batch", "tokens", "8"]).ints(&[1, 2]);
        assert_eq!(
            g.shows_all(),
            ["int64 [1] = [batch]", "int64 [2] = [tokens, 8]"]
        );
    }

    #[test]
    fn padding_adds_to_the_axes_it_names() {
        let mut g = Given::new("Pad");
        g.input(1, &["batch", "6"]).ints(&[0, 1, 0, 2]);
        assert_eq!(g.shows(), "float32 [batch, 9]");
        assert_eq!((g.axis(0, 0), g.axis(0, 1)), (Some(0), None));
        let mut g = Given::new("Pad");
        g.input(1, &["batch", "6"])
            .ints(&[1, 2])
            .left_out()
            .ints(&[-1]);
        assert_eq!(g.shows(), "float32 [batch, 9]");
    }

    #[test]
    fn the_largest_elements_lose_their_order() {
        let mut g = Given::new("TopK").int("axis", 1).outputs(2);
        g.input(1, &["batch", "64", "8"]).ints(&[48]);
        assert_eq!(
            g.shows_all(),
            ["float32 [batch, 48, 8]", "int64 [batch, 48, 8]"]
        );
        assert_eq!((g.axis(0, 0), g.axis(0, 1)), (Some(0), None));
        let mut g = Given::new("TopK").outputs(2);
        g.input(1, &["batch", "64"]).ints(&[64]);
        g.shows();
        assert_eq!(g.axis(0, 1), None);
    }
}
