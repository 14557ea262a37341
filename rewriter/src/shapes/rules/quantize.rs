//! To integers with a scale and back, and what is computed between.

use super::context::{Context, like_first, same_as};
use super::*;
use crate::onnx::elem_type;

const fn like_input(name: &'static str) -> Op {
    ms(name, Shape::First(like_first), Axis::Same)
}

const fn opaque(name: &'static str, why: &'static str) -> Op {
    ms(name, Shape::Open(why), Axis::Lost(why))
}

pub(super) const OPS: &[Op] = &[
    op("QuantizeLinear", Shape::First(quantize), Axis::Same).is(QUANTIZE),
    ms("QuantizeLinear", Shape::First(quantize), Axis::Same).is(QUANTIZE),
    op("DequantizeLinear", Shape::First(dequantize), Axis::Same).is(QUANTIZE),
    ms("DequantizeLinear", Shape::First(dequantize), Axis::Same).is(QUANTIZE),
    op("DynamicQuantizeLinear", Shape::All(by_range), Axis::Same).is(QUANTIZE),
    ms("QLinearAdd", Shape::First(two), Axis::By(of_two)),
    ms("QLinearMul", Shape::First(two), Axis::By(of_two)),
    ms(
        "QLinearConcat",
        Shape::Open("its operands lie between scales"),
        Axis::Lost("its operands lie between scales"),
    ),
    ms(
        "QLinearWhere",
        Shape::Open("its operands lie between scales"),
        Axis::Lost("its operands lie between scales"),
    ),
    ms(
        "QLinearReduceMean",
        Shape::Open("its axes are those of another version"),
        Axis::Lost("its axes are those of another version"),
    ),
    like_input("QLinearSigmoid"),
    like_input("QLinearLeakyRelu"),
    like_input("QLinearSoftmax").is(ANCHOR),
    opaque("QuantizeBFP", "blocks of a provider's own floats"),
    opaque("DequantizeBFP", "blocks of a provider's own floats"),
    opaque("QuantizeWithOrder", "rows are in the provider's order"),
    opaque("DequantizeWithOrder", "rows are in the provider's order"),
    opaque("QOrderedGelu", "rows are in the provider's order"),
    opaque(
        "QOrderedLayerNormalization",
        "rows are in the provider's order",
    ),
];

fn quantize(c: &mut Context) -> Option<Fact> {
    let ty = match (c.input(2), c.node.int("output_dtype")) {
        (Some(zero_point), _) => zero_point.elem_type,
        (None, Some(ty)) if ty != 0 => i32::try_from(ty).ok()?,
        (None, _) => elem_type::UINT8,
    };
    same_as(c, ty)
}

fn dequantize(c: &mut Context) -> Option<Fact> {
    let ty = match c.node.int("output_dtype") {
        Some(ty) if ty != 0 => i32::try_from(ty).ok()?,
        _ => c.ty(1),
    };
    same_as(c, ty)
}

fn by_range(c: &mut Context) -> Option<Vec<Fact>> {
    Some(vec![
        Fact::of(elem_type::UINT8, c.dims(0)),
        Fact::of(elem_type::FLOAT, Some(vec![])),
        Fact::of(elem_type::UINT8, Some(vec![])),
    ])
}

/// a, its scale and zero point, b, its scale and zero point, those of the result.
fn two(c: &mut Context) -> Option<Fact> {
    let (a, b) = (c.dims(0)?, c.dims(3)?);
    let dims = c.broadcast(&a, &b);
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn of_two(f: &AxisStep) -> Option<AxisOffset> {
    matches!(f.slot, 0 | 3).then(|| f.aligned())?
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;

    #[test]
    fn integers_have_the_type_of_their_zero_point() {
        let mut g = Given::new("QuantizeLinear");
        g.input(1, &["batch", "8"]).input(1, &[]).input(3, &[]);
        assert_eq!(g.shows(), "int8 [batch, 8]");
        let mut g = Given::new("QuantizeLinear");
        g.input(1, &["batch", "8"]).input(1, &[]);
        assert_eq!(g.shows(), "uint8 [batch, 8]");
        let mut g = Given::new("DequantizeLinear");
        g.input(3, &["batch", "8"]).input(10, &[]);
        assert_eq!(g.shows(), "float16 [batch, 8]");
        assert_eq!(g.axis(0, 0), Some(0));
    }

    #[test]
    fn a_dynamic_range_is_one_for_all() {
        let mut g = Given::new("DynamicQuantizeLinear").outputs(3);
        g.input(1, &["batch", "8"]);
        assert_eq!(
            g.shows_all(),
            ["uint8 [batch, 8]", "float32 []", "uint8 []"]
        );
        assert_eq!((g.axis_to(0, 0, 0), g.axis_to(0, 0, 1)), (Some(0), None));
    }
}
