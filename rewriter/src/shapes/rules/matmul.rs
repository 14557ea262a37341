//! Matrix products, plain, fused, quantised, and by equation.

use super::context::{Context, ints_value};
use super::*;
use crate::onnx::elem_type;
use crate::shapes::Dim;
use std::collections::HashMap;

const fn product(name: &'static str, shape: Shape, axis: Axis) -> Op {
    op(name, shape, axis).is(PRODUCT)
}

/// A product with weights that were packed: input 0 is the data.
const fn packed(name: &'static str, shape: Shape) -> Op {
    ms(name, shape, Axis::By(rows_of_data))
        .ends(channels)
        .is(PROJECTION)
}

const EXPERTS: &str = "which expert computes a token is data";

pub(super) const OPS: &[Op] = &[
    product("MatMul", Shape::First(matmul), Axis::By(outside))
        .ends(contracted)
        .is(PROJECTION),
    op("MatMulInteger", Shape::First(integers), Axis::By(outside))
        .ends(contracted)
        .is(PROJECTION),
    op(
        "QLinearMatMul",
        Shape::First(quantized),
        Axis::By(outside_of_quantized),
    ),
    op("Gemm", Shape::First(gemm), Axis::By(gemm_rows))
        .ends(gemm_contracted)
        .is(PROJECTION),
    product("Einsum", Shape::First(einsum), Axis::By(einsum_axis))
        .ends(summed)
        .is(PROJECTION),
    ms("FusedMatMul", Shape::First(fused), Axis::By(outside))
        .ends(contracted)
        .is(PRODUCT)
        .is(PROJECTION),
    ms("TransposeMatMul", Shape::First(fused), Axis::By(outside))
        .ends(contracted)
        .is(PROJECTION),
    ms(
        "FusedMatMulActivation",
        Shape::First(fused),
        Axis::By(outside),
    ),
    ms("FusedGemm", Shape::First(gemm), Axis::By(gemm_rows))
        .ends(gemm_contracted)
        .is(PROJECTION),
    ms("GemmFastGelu", Shape::First(matmul), Axis::By(outside)).ends(contracted),
    ms("GemmFloat8", Shape::First(gemm_float8), Axis::By(gemm_rows)).ends(gemm_contracted),
    ms("QGemm", Shape::First(quantized_gemm), Axis::By(gemm_rows)).ends(gemm_contracted),
    ms(
        "DynamicQuantizeMatMul",
        Shape::First(to_float),
        Axis::By(outside),
    )
    .is(PROJECTION),
    ms(
        "MatMulIntegerToFloat",
        Shape::First(to_float),
        Axis::By(outside),
    )
    .is(PROJECTION),
    ms("MatMulInteger16", Shape::First(integers), Axis::By(outside)).ends(contracted),
    packed("MatMulNBits", Shape::First(columns_named)),
    packed("MatMulBnb4", Shape::First(columns_named)),
    packed("MatMulFpQ4", Shape::First(columns_by_shape)),
    packed(
        "MatMulBlockQuantizedFp8Weight",
        Shape::Open("the layout of its weights is the provider's"),
    ),
    packed(
        "MatMulBlockQuantizedFp4Weight",
        Shape::Open("the layout of its weights is the provider's"),
    ),
    ms(
        "MatMulNBitsQLoRA",
        Shape::First(columns_named),
        Axis::By(rows_of_data),
    ),
    ms(
        "MatMulNBitsMlp",
        Shape::First(columns_named),
        Axis::By(rows_of_data),
    ),
    ms(
        "MatMulNBitsQkv",
        Shape::All(three_projections),
        Axis::By(rows_of_three),
    ),
    ms(
        "MatMulPacked",
        Shape::Open("the layout of its weights is the provider's"),
        Axis::By(rows_of_data),
    ),
    ms(
        "SparseToDenseMatMul",
        Shape::Open("a sparse operand"),
        Axis::Lost("a sparse operand"),
    ),
    ms(
        "QOrderedMatMul",
        Shape::First(matmul_of_ordered),
        Axis::Lost("rows are in the provider's order"),
    ),
    ms(
        "CDist",
        Shape::First(distances),
        Axis::Lost("a distance of every pair"),
    ),
    ms("MoE", Shape::First(super::context::like_first), Axis::Same),
    ms("QMoE", Shape::First(super::context::like_first), Axis::Same),
    ms("MoEGroupRouter", Shape::Open(EXPERTS), Axis::Lost(EXPERTS)),
    ms("MoEPacked", Shape::Open(EXPERTS), Axis::Lost(EXPERTS)),
    ms(
        "RouterGateUpProj",
        Shape::Open(EXPERTS),
        Axis::Lost(EXPERTS),
    ),
];

fn product_of(c: &mut Context, a: &[Dim], b: &[Dim], ty: i32) -> Option<Fact> {
    let (ra, rb) = (a.len(), b.len());
    if ra == 0 || rb == 0 {
        return None;
    }
    let mut dims = c.broadcast(&a[..ra.saturating_sub(2)], &b[..rb.saturating_sub(2)]);
    if ra >= 2 {
        dims.push(a[ra - 2].clone());
    }
    if rb >= 2 {
        dims.push(b[rb - 1].clone());
    }
    Some(Fact::of(ty, Some(dims)))
}

fn matmul(c: &mut Context) -> Option<Fact> {
    let (a, b) = (c.dims(0)?, c.dims(1)?);
    product_of(c, &a, &b, c.ty(0))
}

fn integers(c: &mut Context) -> Option<Fact> {
    let (a, b) = (c.dims(0)?, c.dims(1)?);
    product_of(c, &a, &b, elem_type::INT32)
}

fn to_float(c: &mut Context) -> Option<Fact> {
    let (a, b) = (c.dims(0)?, c.dims(1)?);
    product_of(c, &a, &b, elem_type::FLOAT)
}

/// a, its scale and zero point, b, its scale and zero point, those of the result.
fn quantized(c: &mut Context) -> Option<Fact> {
    let (a, b) = (c.dims(0)?, c.dims(3)?);
    product_of(c, &a, &b, c.ty(7))
}

fn matmul_of_ordered(c: &mut Context) -> Option<Fact> {
    let (a, b) = (c.dims(0)?, c.dims(2)?);
    product_of(c, &a, &b, c.ty(0))
}

fn fused(c: &mut Context) -> Option<Fact> {
    let mut dims = [c.dims(0)?, c.dims(1)?];
    for (dims, flags) in dims
        .iter_mut()
        .zip([["transA", "transBatchA"], ["transB", "transBatchB"]])
    {
        let n = dims.len();
        match flags.map(|f| c.flag(f) && n >= 2) {
            [false, false] => {}
            [true, false] => dims.swap(n - 1, n - 2),
            // The second to last axis lies in front of the batch.
            [false, true] => dims[..n - 1].rotate_left(1),
            [true, true] => return None,
        }
    }
    let [a, b] = dims;
    product_of(c, &a, &b, c.ty(0))
}

fn gemm_dims(c: &Context, a: usize, b: usize) -> Option<Vec<Dim>> {
    let (a, b) = (c.shape(a)?, c.shape(b)?);
    if a.len() != 2 || b.len() != 2 {
        return None;
    }
    let rows = a[usize::from(c.flag("transA"))].clone();
    let columns = b[usize::from(!c.flag("transB"))].clone();
    Some(vec![rows, columns])
}

fn gemm(c: &mut Context) -> Option<Fact> {
    Some(Fact::of(c.ty(0), Some(gemm_dims(c, 0, 1)?)))
}

fn gemm_float8(c: &mut Context) -> Option<Fact> {
    let ty = i32::try_from(c.node.int("dtype").unwrap_or(1)).ok()?;
    Some(Fact::of(ty, Some(gemm_dims(c, 0, 1)?)))
}

fn quantized_gemm(c: &mut Context) -> Option<Fact> {
    let ty = if c.input(8).is_some() {
        c.ty(8)
    } else {
        elem_type::FLOAT
    };
    Some(Fact::of(ty, Some(gemm_dims(c, 0, 3)?)))
}

/// All axes of the data but the last, and as many columns as the attribute `N` says.
fn columns_named(c: &mut Context) -> Option<Fact> {
    let columns = c.node.int("N")?;
    with_columns(c, columns.into())
}

fn columns_by_shape(c: &mut Context) -> Option<Fact> {
    let columns = ints_value(c.value(2)?)?.get(1)?.clone();
    with_columns(c, columns)
}

fn with_columns(c: &Context, columns: Dim) -> Option<Fact> {
    let mut dims = c.dims(0)?;
    *dims.last_mut()? = columns;
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn three_projections(c: &mut Context) -> Option<Vec<Fact>> {
    let (q, kv) = (c.node.int("Nq")?, c.node.int("Nkv")?);
    let mut facts = [q, kv, kv]
        .map(|n| with_columns(c, n.into()))
        .into_iter()
        .collect::<Option<Vec<_>>>()?;
    facts.push(super::context::same(c));
    Some(facts)
}

fn distances(c: &mut Context) -> Option<Fact> {
    let (a, b) = (c.shape(0)?.first()?, c.shape(1)?.first()?);
    Some(Fact::of(c.ty(0), Some(vec![a.clone(), b.clone()])))
}

/// Outside the two axes of a matrix, and the rows of the left or columns of the right operand.
fn outside(f: &AxisStep) -> Option<AxisOffset> {
    if f.slot > 1 {
        return None;
    }
    outside_of(f, f.slot == 0)
}

fn outside_of_quantized(f: &AxisStep) -> Option<AxisOffset> {
    match f.slot {
        0 => outside_of(f, true),
        3 => outside_of(f, false),
        _ => None,
    }
}

fn outside_of(f: &AxisStep, is_left: bool) -> Option<AxisOffset> {
    let flag = |name: &str| f.node.int(name).unwrap_or(0) != 0;
    let rank = f.input.len();
    let (at, _) = f.at()?;
    let flags = ["transA", "transB", "transBatchA", "transBatchB"];
    let is_plain = !flags.iter().any(|name| flag(name));
    let contracted = if is_left {
        rank.checked_sub(1)?
    } else {
        rank.checked_sub(2)?
    };
    if rank < 2 || at == contracted || (!is_plain && at + 2 >= rank) {
        return None;
    }
    if flag("transBatchA") || flag("transBatchB") {
        return None;
    }
    f.aligned()
}

fn gemm_rows(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    let stays = f.slot == 0 && at == 0 && f.node.int("transA").unwrap_or(0) == 0;
    stays.then(|| f.moved(0, &inner))?
}

fn rows_of_data(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    let stays = f.slot == 0 && f.out == 0 && at + 1 < f.input.len();
    stays.then(|| f.moved(at, &inner))?
}

fn rows_of_three(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    let stays = f.slot == 0 && at + 1 < f.input.len();
    stays.then(|| f.moved(at, &inner))?
}

/// The axis that a product sums over.
fn contracted(f: &AxisStep) -> bool {
    let flag = |name: &str| f.node.int(name).unwrap_or(0) != 0;
    let Some((at, _)) = f.at() else { return false };
    let from_end = match f.slot {
        0 => 1 + usize::from(flag("transA")),
        1 | 3 => 2 - usize::from(flag("transB")),
        _ => return false,
    };
    let is_moved = flag("transBatchA") || flag("transBatchB");
    // Of a vector the only axis.
    let rank = f.input.len();
    !is_moved && at + from_end.min(rank) == rank
}

fn gemm_contracted(f: &AxisStep) -> bool {
    f.slot < 2 && contracted(f)
}

fn channels(f: &AxisStep) -> bool {
    f.slot == 0 && f.at().is_some_and(|(at, _)| at + 1 == f.input.len())
}

/// The terms of an Einsum and its result, an axis per letter; axes of an ellipsis are digits, the last of them 0, so that they
/// align as numpy aligns them.
struct Equation {
    terms: Vec<Vec<char>>,
    result: Vec<char>,
}

impl Equation {
    /// Reads the equation of `node` for operands of these ranks.
    fn read(node: &Node, ranks: &[usize]) -> Option<Self> {
        let text = node.attribute("equation")?.s.as_ref()?;
        let text = std::str::from_utf8(text).ok()?.replace(' ', "");
        let (terms, result) = match text.split_once("->") {
            Some((terms, result)) => (terms, Some(result)),
            None => (text.as_str(), None),
        };
        let terms: Vec<&str> = terms.split(',').collect();
        if terms.len() != ranks.len() {
            return None;
        }
        let spelled: Vec<Vec<char>> = terms
            .iter()
            .zip(ranks)
            .map(|(term, &rank)| {
                let letters = term.replace("...", "").chars().count();
                let spelled = spell(term, rank.checked_sub(letters)?)?;
                (spelled.len() == rank).then_some(spelled)
            })
            .collect::<Option<_>>()?;
        let widest = spelled
            .iter()
            .map(|t| t.iter().filter(|l| l.is_ascii_digit()).count())
            .max()?;
        let result = match result {
            Some(result) => spell(result, widest)?,
            // Without a result: what the ellipses have, then letters that occur once, in order.
            None => {
                let mut once: Vec<char> = text.chars().filter(|l| l.is_alphabetic()).collect();
                once.sort_unstable();
                let count = |l: char| text.chars().filter(|&x| x == l).count();
                once.retain(|&l| count(l) == 1);
                let mut all = spell("...", widest)?;
                all.extend(once);
                all
            }
        };
        Some(Self {
            terms: spelled,
            result,
        })
    }
}

/// One character per axis of `term`, whose ellipsis stands for `more` axes.
fn spell(term: &str, more: usize) -> Option<Vec<char>> {
    let digit = |i: usize| char::from_digit(u32::try_from(i).ok()?, 10);
    let (before, after) = match term.split_once("...") {
        Some(parts) => parts,
        None => (term, ""),
    };
    let axes = (0..more).rev().map(digit).collect::<Option<Vec<_>>>()?;
    let axes = if term.contains("...") {
        axes
    } else {
        Vec::new()
    };
    Some(before.chars().chain(axes).chain(after.chars()).collect())
}

fn einsum(c: &mut Context) -> Option<Fact> {
    let shapes: Vec<Vec<Dim>> = (0..c.inputs.len())
        .map(|i| c.dims(i))
        .collect::<Option<_>>()?;
    let ranks: Vec<usize> = shapes.iter().map(Vec::len).collect();
    let equation = Equation::read(c.node, &ranks)?;
    let mut sizes: HashMap<char, Dim> = HashMap::new();
    for (term, dims) in equation.terms.iter().zip(&shapes) {
        for (&letter, dim) in term.iter().zip(dims) {
            let one = std::slice::from_ref(dim);
            let size = match sizes.get(&letter).cloned() {
                Some(before) => c.broadcast(&[before], one).pop()?,
                None => dim.clone(),
            };
            sizes.insert(letter, size);
        }
    }
    let dims = equation.result.iter().map(|l| sizes.get(l).cloned());
    Some(Fact::of(c.ty(0), Some(dims.collect::<Option<_>>()?)))
}

/// The equation of an axis' node, and the letter of the axis; not one that its term has twice, of which only the diagonal
/// is left.
fn letter(f: &AxisStep) -> Option<(Equation, char)> {
    let (at, _) = f.at()?;
    let inputs = f.node.proto.input.iter();
    let ranks = inputs.map(|i| f.facts.shape(i).map(<[Dim]>::len));
    let equation = Equation::read(f.node, &ranks.collect::<Option<Vec<_>>>()?)?;
    let term = equation.terms.get(f.slot)?;
    let letter = *term.get(at)?;
    let is_once = term.iter().filter(|&&l| l == letter).count() == 1;
    is_once.then_some((equation, letter))
}

fn einsum_axis(f: &AxisStep) -> Option<AxisOffset> {
    let (_, inner) = f.at()?;
    let (equation, letter) = letter(f)?;
    let to = equation.result.iter().position(|&l| l == letter)?;
    f.moved(to, &inner)
}

fn summed(f: &AxisStep) -> bool {
    letter(f).is_some_and(|(equation, letter)| !equation.result.contains(&letter))
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;

    #[test]
    fn products_broadcast_what_is_outside_the_matrices() {
        let mut g = Given::new("MatMul");
        g.input(1, &["batch", "4", "tokens", "8"])
            .input(1, &["8", "16"]);
        assert_eq!(g.shows(), "float32 [batch, 4, tokens, 16]");
        assert_eq!((g.axis(0, 2), g.axis(0, 3)), (Some(2), None));
        assert!(g.ends(0, 3) && g.ends(1, 0) && !g.ends(0, 2) && !g.ends(1, 1));
        let mut g = Given::new("MatMulInteger");
        g.input(2, &["tokens", "8"]).input(3, &["8", "16"]);
        assert_eq!(g.shows(), "int32 [tokens, 16]");
    }

    #[test]
    fn fused_products_transpose() {
        let mut g = Given::microsoft("FusedMatMul").int("transB", 1);
        g.input(1, &["batch", "tokens", "8"])
            .input(1, &["batch", "keys", "8"]);
        assert_eq!(g.shows(), "float32 [batch, tokens, keys]");
        assert_eq!((g.axis(0, 0), g.axis(0, 1)), (Some(0), None));
        assert!(g.ends(0, 2) && g.ends(1, 2));
        let mut g = Given::microsoft("FusedMatMul").int("transBatchA", 1);
        g.input(1, &["tokens", "batch", "8"])
            .input(1, &["batch", "8", "4"]);
        assert_eq!(g.shows(), "float32 [batch, tokens, 4]");
        assert_eq!(g.axis(0, 1), None);
    }

    #[test]
    fn packed_weights_name_their_columns() {
        for name in ["MatMulNBits", "MatMulBnb4"] {
            let mut g = Given::microsoft(name).int("N", 24).int("K", 8);
            g.input(10, &["batch", "tokens", "8"])
                .input(2, &["24", "1", "4"]);
            assert_eq!(g.shows(), "float16 [batch, tokens, 24]", "{name}");
            assert_eq!((g.axis(0, 1), g.axis(0, 2)), (Some(1), None), "{name}");
        }
    }

    #[test]
    fn gemm_keeps_its_rows() {
        let mut g = Given::new("Gemm").int("transB", 1);
        g.input(1, &["batch", "8"]).input(1, &["16", "8"]);
        assert_eq!(g.shows(), "float32 [batch, 16]");
        assert_eq!(g.axis(0, 0), Some(0));
        let mut g = Given::new("Gemm").int("transA", 1);
        g.input(1, &["8", "batch"]).input(1, &["8", "16"]);
        assert_eq!(g.shows(), "float32 [batch, 16]");
        assert_eq!(g.axis(0, 1), None);
    }

    #[test]
    fn equations_have_letters_ellipses_and_diagonals() {
        let einsum = |equation: &str| Given::new("Einsum").text("equation", equation);
        let mut g = einsum("bhnd, bhmd -> bhnm");
        g.input(1, &["batch", "4", "tokens", "8"])
            .input(1, &["batch", "4", "keys", "8"]);
        assert_eq!(g.shows(), "float32 [batch, 4, tokens, keys]");
        assert_eq!(
            (g.axis(0, 2), g.axis(1, 2), g.axis(0, 3)),
            (Some(2), Some(3), None)
        );
        let mut g = einsum("...n,d->...nd");
        g.input(1, &["batch", "tokens"]).input(1, &["8"]);
        assert_eq!(g.shows(), "float32 [batch, tokens, 8]");
        assert_eq!((g.axis(0, 0), g.axis(0, 1)), (Some(0), Some(1)));
        let mut g = einsum("...ij,...jk");
        g.input(1, &["batch", "2", "3"]).input(1, &["3", "5"]);
        assert_eq!(g.shows(), "float32 [batch, 2, 5]");
        let mut g = einsum("bii->bi");
        g.input(1, &["batch", "3", "3"]);
        assert_eq!(g.shows(), "float32 [batch, 3]");
        assert_eq!((g.axis(0, 0), g.axis(0, 1)), (Some(0), None));
    }
}
