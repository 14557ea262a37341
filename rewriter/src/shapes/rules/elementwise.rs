//! Element by element, with numpy broadcasting where there are several inputs.

use super::context::{Context, ints_value, like_first, round_to, same, same_as};
use super::*;
use crate::onnx::elem_type;
use crate::shapes::{Dim, Value};

const fn unary(name: &'static str) -> Op {
    op(name, Shape::First(like_first), Axis::Same).is(ELEMENT)
}

const fn computed(name: &'static str) -> Op {
    op(name, Shape::First(number), Axis::Same).is(ELEMENT)
}

const fn binary(name: &'static str) -> Op {
    op(name, Shape::First(numbers), Axis::Aligned).is(ELEMENT)
}

const fn comparison(name: &'static str) -> Op {
    op(name, Shape::First(compared), Axis::Aligned)
}

/// An activation that ONNX Runtime fused, with its bias as second input perhaps.
const fn activation(name: &'static str) -> Op {
    ms(name, Shape::First(like_first), Axis::Same).is(ELEMENT)
}

pub(super) const OPS: &[Op] = &[
    computed("Neg"),
    computed("Abs"),
    computed("Sqrt"),
    computed("Reciprocal"),
    computed("Floor"),
    computed("Ceil"),
    computed("Exp"),
    computed("Log"),
    computed("Sign"),
    unary("Round"),
    unary("Sin"),
    unary("Cos"),
    unary("Tan"),
    unary("Asin"),
    unary("Acos"),
    unary("Atan"),
    unary("Sinh"),
    unary("Cosh"),
    unary("Tanh"),
    unary("Asinh"),
    unary("Acosh"),
    unary("Atanh"),
    unary("Sigmoid"),
    unary("Erf"),
    unary("Gelu"),
    unary("Relu"),
    unary("LeakyRelu"),
    unary("ThresholdedRelu"),
    unary("Elu"),
    unary("Celu"),
    unary("Selu"),
    unary("Softplus"),
    unary("Softsign"),
    unary("HardSwish"),
    unary("HardSigmoid"),
    unary("Swish"),
    unary("Mish"),
    unary("Shrink"),
    unary("Clip"),
    op("Not", Shape::First(not), Axis::Same),
    unary("BitwiseNot"),
    op("IsNaN", Shape::First(truth), Axis::Same),
    op("IsInf", Shape::First(truth), Axis::Same),
    binary("Add").is(SUM),
    binary("Sub").is(SUM),
    binary("Mul").is(SCALE),
    binary("Div").is(SCALE),
    binary("Pow"),
    binary("Mod"),
    binary("Min"),
    binary("Max"),
    binary("Sum"),
    binary("Mean"),
    binary("PRelu"),
    binary("SwiGLU"),
    binary("BitShift"),
    binary("BitwiseAnd"),
    binary("BitwiseOr"),
    binary("BitwiseXor"),
    comparison("Equal"),
    comparison("Greater"),
    comparison("Less"),
    comparison("GreaterOrEqual"),
    comparison("LessOrEqual"),
    comparison("And"),
    comparison("Or"),
    comparison("Xor"),
    op("Where", Shape::First(chosen), Axis::Aligned),
    activation("Gelu"),
    activation("FastGelu"),
    activation("QuickGelu"),
    activation("BiasGelu"),
    activation("BiasAdd"),
    activation("ScaledSiLU"),
    ms("GatedAdd", Shape::First(like_first), Axis::SameOf(3)),
    ms("SwiGLU", Shape::First(gated), Axis::By(gated_axis)),
    ms(
        "BiasSplitGelu",
        Shape::First(split_gelu),
        Axis::By(gated_axis),
    ),
    ms("ComplexMul", Shape::First(numbers), Axis::Aligned),
    ms("ComplexMulConj", Shape::First(numbers), Axis::Aligned),
    ms(
        "MulInteger",
        Shape::First(of_integers),
        Axis::Lost("its zero points lie between its operands"),
    ),
    ms(
        "IsAllFinite",
        Shape::Open("one number about many tensors"),
        Axis::Lost("one number about many tensors"),
    ),
];

fn truth(c: &mut Context) -> Option<Fact> {
    same_as(c, elem_type::BOOL)
}

fn not(c: &mut Context) -> Option<Fact> {
    let mut fact = same(c);
    fact.value = c.ints(0).map(|v| {
        let flipped = v.into_iter().map(|b| i64::from(b == 0).into());
        Value::Ints(flipped.collect())
    });
    Some(fact)
}

/// Half of the last axis gates the other half, where both are in one tensor.
fn gated(c: &mut Context) -> Option<Fact> {
    if c.input(1).is_some() {
        return like_first(c);
    }
    split_gelu(c)
}

fn split_gelu(c: &mut Context) -> Option<Fact> {
    let mut dims = c.dims(0)?;
    let last = dims.last_mut()?;
    *last = last.over(&2.into())?;
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn gated_axis(f: &AxisStep) -> Option<AxisOffset> {
    if f.slot > 1 {
        return None;
    }
    f.unless_resized()
}

fn of_integers(c: &mut Context) -> Option<Fact> {
    let (a, b) = (c.dims(0)?, c.dims(2)?);
    let dims = c.broadcast(&a, &b);
    Some(Fact::of(elem_type::INT32, Some(dims)))
}

fn number(c: &mut Context) -> Option<Fact> {
    let mut fact = same(c);
    let op = c.node.op();
    fact.value = match (c.value(0), op) {
        (Some(Value::Ints(v)), "Neg") => v
            .iter()
            .map(|d| d.times(&(-1).into()))
            .collect::<Option<_>>()
            .map(Value::Ints),
        (Some(Value::Ints(v)), "Abs") => v
            .iter()
            .map(|d| Some(d.known()?.checked_abs()?.into()))
            .collect::<Option<_>>()
            .map(Value::Ints),
        (Some(Value::Floats(v)), _) => {
            let apply: fn(f64) -> f64 = match op {
                "Sqrt" => f64::sqrt,
                "Reciprocal" => f64::recip,
                "Neg" => |x| -x,
                "Abs" => f64::abs,
                "Floor" => f64::floor,
                "Ceil" => f64::ceil,
                "Exp" => f64::exp,
                "Log" => f64::ln,
                _ => return Some(fact),
            };
            let ty = fact.elem_type;
            let values = v.iter().map(|&x| round_to(ty, apply(x)));
            Some(Value::Floats(values.collect()))
        }
        _ => None,
    };
    Some(fact)
}

fn numbers(c: &mut Context) -> Option<Fact> {
    // Of Sum, Mean, Min and Max there may be any number.
    let mut dims: Option<Vec<Dim>> = None;
    for i in 0..c.inputs.len() {
        let Some(next) = c.dims(i) else {
            return Some(Fact::of(c.ty(0), None));
        };
        dims = Some(match dims {
            None => next,
            Some(dims) => c.broadcast(&dims, &next),
        });
    }
    let ty = c.ty(0);
    let op = c.node.op().to_owned();
    let value = match (c.inputs.len(), c.value(0).cloned(), c.value(1).cloned()) {
        (2, Some(Value::Ints(a)), Some(Value::Ints(b))) => integers(c, &op, &a, &b),
        (2, Some(Value::Floats(a)), Some(Value::Floats(b))) => floats(ty, &op, &a, &b),
        _ => None,
    };
    Some(Fact {
        elem_type: ty,
        shape: dims,
        value,
    })
}

fn integers(c: &mut Context, op: &str, a: &[Dim], b: &[Dim]) -> Option<Value> {
    let one = |(a, b): (Dim, Dim)| {
        let known = a.known().zip(b.known());
        match op {
            "Add" => c.symbols.sum(&a, &b, false),
            "Sub" => c.symbols.sum(&a, &b, true),
            "Mul" => a.times(&b),
            "Div" => match known {
                // ONNX integer division truncates; sizes are never negative.
                Some((a, b)) if b != 0 => a.checked_div(b).map(Dim::from),
                Some(_) => None,
                _ => a.over(&b),
            },
            // The sign of ONNX's Mod is that of the divisor.
            "Mod" if known?.1 != 0 => {
                let (a, b) = known?;
                let rest = a.checked_rem(b)?;
                let wraps = rest != 0 && (rest < 0) != (b < 0) && !c.flag("fmod");
                Some(Dim::from(if wraps { rest + b } else { rest }))
            }
            "Min" if a == b => Some(a),
            "Max" if a == b => Some(a),
            "Min" => known.map(|(a, b)| a.min(b).into()),
            "Max" => known.map(|(a, b)| a.max(b).into()),
            "Pow" => {
                let (a, b) = known?;
                Some(a.checked_pow(u32::try_from(b).ok()?)?.into())
            }
            _ => None,
        }
    };
    pairs(a, b)?
        .into_iter()
        .map(one)
        .collect::<Option<_>>()
        .map(Value::Ints)
}

fn floats(ty: i32, op: &str, a: &[f64], b: &[f64]) -> Option<Value> {
    let apply: fn(f64, f64) -> f64 = match op {
        "Add" => |a, b| a + b,
        "Sub" => |a, b| a - b,
        "Mul" => |a, b| a * b,
        "Div" => |a, b| a / b,
        "Pow" => f64::powf,
        _ => return None,
    };
    let pairs = pairs(a, b)?.into_iter();
    Some(Value::Floats(
        pairs.map(|(a, b)| round_to(ty, apply(a, b))).collect(),
    ))
}

fn compared(c: &mut Context) -> Option<Fact> {
    let (a, b) = (c.dims(0)?, c.dims(1)?);
    let dims = c.broadcast(&a, &b);
    Some(Fact {
        elem_type: elem_type::BOOL,
        shape: Some(dims),
        value: comparison_value(c),
    })
}

/// Comparisons of two shape vectors, as 0 and 1: exporters compare sizes with −1 to find what to keep.
fn comparison_value(c: &Context) -> Option<Value> {
    let (Value::Ints(a), Value::Ints(b)) = (c.value(0)?, c.value(1)?) else {
        return None;
    };
    let op = c.node.op();
    let one = |(a, b): (Dim, Dim)| -> Option<Dim> {
        let truth = match (op, a.known(), b.known()) {
            ("Equal", Some(a), Some(b)) => a == b,
            // Sizes are not negative.
            ("Equal", Some(n), None) | ("Equal", None, Some(n)) if n < 0 => false,
            ("Equal", ..) if a == b => true,
            ("Greater", Some(a), Some(b)) => a > b,
            ("GreaterOrEqual", Some(a), Some(b)) => a >= b,
            ("Less", Some(a), Some(b)) => a < b,
            ("LessOrEqual", Some(a), Some(b)) => a <= b,
            ("And", Some(a), Some(b)) => a != 0 && b != 0,
            ("Or", Some(a), Some(b)) => a != 0 || b != 0,
            ("Xor", Some(a), Some(b)) => (a != 0) != (b != 0),
            _ => return None,
        };
        Some(i64::from(truth).into())
    };
    pairs(a, b)?
        .into_iter()
        .map(one)
        .collect::<Option<_>>()
        .map(Value::Ints)
}

fn chosen(c: &mut Context) -> Option<Fact> {
    let [condition, yes, no] = [0, 1, 2].map(|i| c.dims(i));
    let dims = c.broadcast(&condition?, &yes?);
    let dims = c.broadcast(&dims, &no?);
    Some(Fact {
        elem_type: c.ty(1),
        shape: Some(dims),
        value: chosen_value(c),
    })
}

/// `Where` over shape vectors.
fn chosen_value(c: &Context) -> Option<Value> {
    let condition = c.ints(0)?;
    let (yes, no) = (ints_value(c.value(1)?)?, ints_value(c.value(2)?)?);
    let pairs = pairs(yes, no)?;
    if condition.len() != pairs.len() {
        return None;
    }
    let picked = condition.iter().zip(pairs);
    let picked = picked.map(|(&c, (yes, no))| if c != 0 { yes } else { no });
    Some(Value::Ints(picked.collect()))
}

/// Pairs up two value lists of equal length, or repeats the one that has a single element.
fn pairs<T: Clone>(a: &[T], b: &[T]) -> Option<Vec<(T, T)>> {
    match (a.len(), b.len()) {
        (x, y) if x == y => Some(a.iter().cloned().zip(b.iter().cloned()).collect()),
        (1, _) => Some(b.iter().map(|y| (a[0].clone(), y.clone())).collect()),
        (_, 1) => Some(a.iter().map(|x| (x.clone(), b[0].clone())).collect()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;
    use super::*;

    #[test]
    fn broadcasting_aligns_at_the_end() {
        let mut g = Given::new("Add");
        g.input(1, &["batch", "tokens", "8"]).input(1, &["8"]);
        assert_eq!(g.shows(), "float32 [batch, tokens, 8]");
        assert_eq!(g.axis(0, 1), Some(1));
        let mut g = Given::new("Mul");
        g.input(1, &["tokens", "8"]).input(1, &["batch", "1", "8"]);
        assert_eq!(g.shows(), "float32 [batch, tokens, 8]");
        assert_eq!((g.axis(0, 0), g.axis(1, 0)), (Some(1), Some(0)));
    }

    #[test]
    fn a_table_with_a_row_per_row_binds_the_batch() {
        let mut g = Given::new("Mul").static_batch(2);
        g.input(1, &["batch", "32", "8"])
            .input(1, &["2", "32", "8"]);
        assert_eq!(g.shows(), "float32 [batch, 32, 8]");
        assert!(g.batch_is_bound);
        let mut g = Given::new("Mul").static_batch(2);
        g.input(1, &["batch", "32", "8"])
            .input(1, &["1", "32", "8"]);
        g.shows();
        assert!(!g.batch_is_bound);
    }

    #[test]
    fn sizes_are_computed_with() {
        let sizes = |op: &str, a: &[&str], b: &[i64]| {
            let mut g = Given::new(op);
            g.sizes(a).ints(b);
            g.shows()
        };
        assert_eq!(
            sizes("Mul", &["batch", "3"], &[2]),
            "int64 [2] = [2·batch, 6]"
        );
        assert_eq!(
            sizes("Div", &["batch", "7"], &[2]),
            "int64 [2] = [batch/2, 3]"
        );
        assert_eq!(sizes("Mod", &["-7"], &[3]), "int64 [1] = [2]");
        assert_eq!(sizes("Equal", &["batch"], &[-1]), "bool [1] = [0]");
        assert_eq!(sizes("Max", &["4", "2"], &[3]), "int64 [2] = [4, 3]");
    }

    #[test]
    fn scales_are_computed_in_their_type() {
        let mut g = Given::new("Sqrt");
        g.typed_floats(elem_type::FLOAT16, &[2.0]);
        assert_eq!(g.shows(), "float16 [1] = [1.4140625]");
        let mut g = Given::new("Div");
        g.floats(&[1.0]).floats(&[4.0]);
        assert_eq!(g.shows(), "float32 [1] = [0.25]");
    }

    #[test]
    fn a_choice_between_sizes_is_made() {
        let mut g = Given::new("Where");
        g.bools(&[1, 0]).sizes(&["batch", "4"]).ints(&[9, 9]);
        assert_eq!(g.shows(), "int64 [2] = [batch, 9]");
    }

    #[test]
    fn gates_halve_the_last_axis() {
        let mut g = Given::microsoft("SwiGLU");
        g.input(1, &["batch", "tokens", "16"]);
        assert_eq!(g.shows(), "float32 [batch, tokens, 8]");
        assert_eq!((g.axis(0, 1), g.axis(0, 2)), (Some(1), None));
    }

    #[test]
    fn other_elements_keep_shape_and_axes() {
        for name in ["Gelu", "Clip", "Not", "IsNaN", "Swish", "BitwiseNot"] {
            let mut g = Given::new(name);
            g.input(1, &["batch", "tokens"]);
            assert!(g.shows().ends_with(" [batch, tokens]"), "{name}");
            assert_eq!(g.axis(0, 1), Some(1), "{name}");
        }
    }
}
