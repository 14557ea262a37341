//! Where one axis of interest lies in a tensor's memory: how many elements-with-everything-behind-them come before it.
//!
//! A tensor is a row-major list. An axis keeps its place in that list through every Reshape, so a place is one size: the
//! product of the dimensions before it. Fails closed: an operator without a rule has no place.

use crate::onnx::Node;
use crate::shapes::{self, Dim, Facts};

/// The product of all dimensions outside the axis; 1 = outermost.
pub type Place = Dim;

/// The axis of `shape` in which `place` begins, and what of that axis is still outside it.
fn axis_of(shape: &[Dim], place: &Place) -> Option<(usize, Dim)> {
    let one = Dim::from(1);
    let mut outer = one.clone();
    let mut found = None;
    for (axis, dim) in shape.iter().enumerate() {
        // The last axis that begins at the place: axes of size 1 before it do not matter.
        if outer == *place {
            if *dim == one && axis + 1 < shape.len() {
                outer = outer.times(dim)?;
                found = Some((axis, one.clone()));
                continue;
            }
            return Some((axis, one));
        }
        outer = outer.times(dim)?;
    }
    if found.is_some() {
        return found;
    }
    // Inside an axis: [H·B, …] has the batch after H.
    let mut outer = one.clone();
    for (axis, dim) in shape.iter().enumerate() {
        let inner = place.over(&outer)?;
        let rest = dim.over(&inner)?;
        if inner.is_whole() && rest.is_whole() && inner != *dim {
            return Some((axis, inner));
        }
        outer = outer.times(dim)?;
    }
    None
}

fn place_in(shape: &[Dim], axis: usize, inner: &Dim) -> Option<Place> {
    Dim::product(shape.get(..axis)?)?.times(inner)
}

/// The axis of `value` that starts exactly at `place`.
pub fn exact_axis(facts: &Facts, value: &str, place: &Place) -> Option<usize> {
    let (axis, inner) = axis_of(facts.shape(value)?, place)?;
    (inner.known() == Some(1)).then_some(axis)
}

/// Where the axis that lies at `place` in input `slot` of `node` lies in its output `out`; `None` where it is lost.
pub fn follow(facts: &Facts, node: &Node, slot: usize, place: &Place, out: usize) -> Option<Place> {
    let input = facts.shape(node.input(slot)?)?;
    let output = facts.shape(node.output(out));
    let rank = input.len();
    let at = || axis_of(input, place);
    // Numpy alignment: axes count from the end.
    let aligned = |output: &[Dim]| {
        let (axis, inner) = at()?;
        let axis = (axis + output.len()).checked_sub(rank)?;
        place_in(output, axis, &inner)
    };
    // The result has the axis at `to`.
    let moved = |to: usize| {
        let (_, inner) = at()?;
        place_in(output?, to, &inner)
    };
    match (node.domain(), node.op()) {
        ("", "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze") if slot == 0 => Some(place.clone()),
        (
            "",
            "Identity"
            | "Cast"
            | "CastLike"
            | "Dropout"
            | "LayerNormalization"
            | "RMSNormalization"
            | "SimplifiedLayerNormalization"
            | "Softmax"
            | "LogSoftmax"
            | "Neg"
            | "Abs"
            | "Exp"
            | "Log"
            | "Sqrt"
            | "Reciprocal"
            | "Sin"
            | "Cos"
            | "Tanh"
            | "Sigmoid"
            | "Erf"
            | "Gelu"
            | "Relu"
            | "LeakyRelu"
            | "Elu"
            | "Selu"
            | "Softplus"
            | "Floor"
            | "Ceil"
            | "Round"
            | "Sign"
            | "HardSwish"
            | "HardSigmoid"
            | "Swish"
            | "Mish"
            | "Not"
            | "IsNaN"
            | "IsInf"
            | "Clip"
            | "QuantizeLinear"
            | "DequantizeLinear"
            | "DynamicQuantizeLinear"
            | "ScatterND"
            | "ScatterElements"
            | "InstanceNormalization"
            | "GroupNormalization"
            | "Trilu",
        )
        | (
            "com.microsoft",
            "Gelu" | "FastGelu" | "QuickGelu" | "BiasGelu" | "QuantizeLinear" | "DequantizeLinear",
        ) if slot == 0 && out == 0 => Some(place.clone()),
        (
            "",
            "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Mod" | "Min" | "Max" | "PRelu" | "Where"
            | "Equal" | "Greater" | "Less" | "GreaterOrEqual" | "LessOrEqual" | "And" | "Or"
            | "Expand",
        ) if slot == 0 || !node.is("Expand") => aligned(output?),
        ("com.microsoft", "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization")
            if slot < 2 =>
        {
            Some(place.clone())
        }
        ("", "Transpose") => {
            let (axis, inner) = at()?;
            let perm: Vec<usize> = match node.ints("perm") {
                Some(perm) if !perm.is_empty() => perm
                    .iter()
                    .map(|&p| usize::try_from(p).ok())
                    .collect::<Option<_>>()?,
                _ => (0..rank).rev().collect(),
            };
            let to = perm.iter().position(|&p| p == axis)?;
            place_in(output?, to, &inner)
        }
        ("", "MatMul" | "MatMulInteger")
        | (
            "com.microsoft",
            "FusedMatMul" | "MatMulNBits" | "DynamicQuantizeMatMul" | "MatMulIntegerToFloat",
        ) => {
            let flag = |name: &str| node.int(name).unwrap_or(0) != 0;
            let (axis, _) = at()?;
            let plain = !["transA", "transB", "transBatchA", "transBatchB"]
                .iter()
                .any(|f| flag(f));
            let contracted = if slot == 0 {
                rank - 1
            } else {
                rank.checked_sub(2)?
            };
            if rank < 2 || slot > 1 || axis == contracted {
                return None;
            }
            if !plain && axis + 2 >= rank {
                return None;
            }
            aligned(output?)
        }
        ("", "Gemm") | ("com.microsoft", "FusedGemm") => {
            let (axis, _) = at()?;
            (slot == 0 && axis == 0 && node.int("transA").unwrap_or(0) == 0).then(|| moved(0))?
        }
        ("", "Conv") | ("com.microsoft", "FusedConv") => {
            let (axis, _) = at()?;
            (slot == 0 && axis != 1).then(|| moved(axis))?
        }
        ("", "ReduceMean" | "ReduceSum" | "ReduceMax" | "ReduceMin" | "ReduceL2") if slot == 0 => {
            let (axis, _) = at()?;
            let axes = match node.ints("axes") {
                Some(axes) => axes.to_vec(),
                None => facts.of(node.input(1)?).known_ints()?,
            };
            let axes = axes
                .into_iter()
                .map(|a| shapes::axis(a, rank))
                .collect::<Option<Vec<_>>>()?;
            if axes.contains(&axis) {
                return None;
            }
            let keep = node.int("keepdims").unwrap_or(1) != 0;
            let gone = if keep {
                0
            } else {
                axes.iter().filter(|&&a| a < axis).count()
            };
            moved(axis - gone)
        }
        ("", "Slice" | "Split" | "Concat" | "Tile" | "Pad" | "CumSum" | "GatherElements")
            if slot == 0 || node.is("Concat") =>
        {
            let (axis, _) = at()?;
            // Along the axis itself the result is another sequence of its elements.
            (output?.get(axis) == input.get(axis)).then(|| moved(axis))?
        }
        ("", "Gather") if slot == 0 => {
            let (axis, _) = at()?;
            let picked = shapes::axis(node.int("axis").unwrap_or(0), rank)?;
            let indices = facts.shape(node.input(1)?)?.len();
            match picked.cmp(&axis) {
                std::cmp::Ordering::Equal => None,
                std::cmp::Ordering::Greater => moved(axis),
                std::cmp::Ordering::Less => moved((axis + indices).checked_sub(1)?),
            }
        }
        ("", "Einsum") => {
            let (axis, _) = at()?;
            let equation = node.attribute("equation")?.s.as_ref()?;
            let equation = std::str::from_utf8(equation).ok()?.replace(' ', "");
            let (terms, result) = equation.split_once("->")?;
            let letter = terms.split(',').nth(slot)?.chars().nth(axis)?;
            moved(result.chars().position(|l| l == letter)?)
        }
        // [B, …] in every form of every attention operator; sequence axes are the caller's business.
        ("" | "com.microsoft", "Attention" | "MultiHeadAttention") if slot == 0 => {
            let (axis, _) = at()?;
            (axis == 0).then(|| moved(0))?
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shapes::Symbols;

    #[test]
    fn places_are_found_in_folded_axes() {
        let mut symbols = Symbols::default();
        let batch = Dim::from(symbols.named("batch"));
        let tokens = Dim::from(symbols.named("tokens"));
        let [one, heads, width]: [Dim; 3] = [1.into(), 4.into(), 18.into()];
        let folded = |a: &Dim, b: &Dim| a.times(b).unwrap();
        // [tokens, batch·heads, width]
        let shape = [tokens.clone(), folded(&batch, &heads), width.clone()];
        assert_eq!(axis_of(&shape, &tokens), Some((1, one.clone())));
        // [heads·batch, tokens, width]: the batch lies behind the heads in one axis.
        let shape = [folded(&heads, &batch), tokens.clone(), width.clone()];
        assert_eq!(axis_of(&shape, &heads), Some((0, heads.clone())));
        // [batch, tokens, width]
        let shape = [batch.clone(), tokens.clone(), width];
        assert_eq!(axis_of(&shape, &one), Some((0, one.clone())));
        assert_eq!(axis_of(&shape, &batch), Some((1, one)));
    }
}
