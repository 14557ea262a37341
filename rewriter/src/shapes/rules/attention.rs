//! Attention in one operator, and what belongs to it: rotary embeddings, linear attention.

use super::context::{Context, like_first};
use super::*;
use crate::shapes::Dim;

const fn anchor(name: &'static str, shape: Shape, axis: Axis) -> Op {
    ms(name, shape, axis).is(ANCHOR)
}

const fn opaque(name: &'static str, why: &'static str) -> Op {
    anchor(name, Shape::Open(why), Axis::Lost(why))
}

const CACHE: &str = "attention over a cache of keys";

pub(super) const OPS: &[Op] = &[
    op("Attention", Shape::First(attention), Axis::By(queries))
        .ends(keys)
        .is(ANCHOR),
    anchor(
        "MultiHeadAttention",
        Shape::First(multi_head),
        Axis::By(queries),
    ),
    anchor("Attention", Shape::First(projecting), Axis::By(queries)).ends(keys),
    anchor("QAttention", Shape::First(projecting), Axis::By(queries)).ends(keys),
    anchor(
        "GroupQueryAttention",
        Shape::First(grouped),
        Axis::By(queries),
    ),
    opaque("PackedAttention", "rows are put one behind the other"),
    opaque(
        "PackedMultiHeadAttention",
        "rows are put one behind the other",
    ),
    opaque("DecoderAttention", CACHE),
    opaque("DecoderMaskedMultiHeadAttention", CACHE),
    opaque("DecoderMaskedSelfAttention", CACHE),
    opaque("PagedAttention", CACHE),
    opaque("SparseAttention", CACHE),
    opaque("SparsePagedAttention", CACHE),
    opaque("DynamicSparseAttention", "which keys are seen is data"),
    opaque("LongformerAttention", "a band and global tokens"),
    opaque("QOrderedAttention", "rows are in the provider's order"),
    opaque(
        "QOrderedLongformerAttention",
        "rows are in the provider's order",
    ),
    ms(
        "SparseAttentionIndexer",
        Shape::Open(CACHE),
        Axis::Lost(CACHE),
    ),
    ms(
        "PackedSparseAttentionIndexer",
        Shape::Open(CACHE),
        Axis::Lost(CACHE),
    ),
    ms(
        "PackedSparseAttentionIndexerMerge",
        Shape::Open(CACHE),
        Axis::Lost(CACHE),
    ),
    op("LinearAttention", Shape::First(linear), Axis::By(queries))
        .ends(keys)
        .is(LINEAR),
    ms("LinearAttention", Shape::First(linear), Axis::By(queries))
        .ends(keys)
        .is(LINEAR),
    ms("LinearAttentionGate", Shape::First(like_first), Axis::Same),
    ms(
        "GatedDeltaNet",
        Shape::Open("a recurrence over tokens"),
        Axis::Lost("a recurrence over tokens"),
    )
    .is(LINEAR),
    op("RotaryEmbedding", Shape::First(like_first), Axis::Same),
    ms("RotaryEmbedding", Shape::First(like_first), Axis::Same),
    ms(
        "GemmaRotaryEmbedding",
        Shape::Open("two results of several inputs"),
        Axis::Lost("two results of several inputs"),
    ),
    ms(
        "MRotaryEmbedding",
        Shape::Open("two results of several inputs"),
        Axis::Lost("two results of several inputs"),
    ),
    ms(
        "RMSNormRotary",
        Shape::Open("a slice of the last axis, heads joined"),
        Axis::Lost("a slice of the last axis, heads joined"),
    ),
];

/// The axis of the queries' tokens in an input of `rank` axes, and in the result.
fn tokens(f: &AxisStep) -> Option<(usize, usize)> {
    match (f.input.len(), f.output?.len()) {
        (3, 3) => Some((1, 1)),
        (4, 4) => Some((2, 2)),
        // Heads apart, [B, H, S, D], or packed [B, S, H, 3, D], become side by side.
        (4, 3) => Some((2, 1)),
        (5, 3) => Some((1, 1)),
        _ => None,
    }
}

/// Rows, and the queries' tokens.
fn queries(f: &AxisStep) -> Option<AxisOffset> {
    let (at, inner) = f.at()?;
    if f.slot != 0 || f.out != 0 {
        return None;
    }
    match tokens(f) {
        _ if at == 0 => f.moved(0, &inner),
        Some((from, to)) if at == from => f.moved(to, &inner),
        _ => None,
    }
}

/// Keys and the channels of q are summed over.
fn keys(f: &AxisStep) -> bool {
    let Some((at, _)) = f.at() else { return false };
    match f.slot {
        0 => at + 1 == f.input.len(),
        1 | 2 => at > 0 && at + 1 < f.input.len(),
        _ => false,
    }
}

fn attention(c: &mut Context) -> Option<Fact> {
    let (q, v) = (c.shape(0)?, c.shape(2)?);
    let mut dims = q.to_vec();
    match q.len() {
        4 => *dims.last_mut()? = v.last()?.clone(),
        3 => *dims.last_mut()? = width(c, v)?,
        _ => return None,
    }
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// All heads of the result of attention over values [B, S, H·D].
fn width(c: &Context, v: &[Dim]) -> Option<Dim> {
    let (heads, kv_heads) = (c.node.int("q_num_heads")?, c.node.int("kv_num_heads")?);
    v.last()?.over(&kv_heads.into())?.times(&heads.into())
}

/// [B, S, H·D] from q of that shape, or from packed [B, S, H, 3, D].
fn multi_head(c: &mut Context) -> Option<Fact> {
    let q = c.shape(0)?;
    let dims = match q.len() {
        3 => {
            let width = match c.shape(2) {
                Some([_, _, v]) => v.clone(),
                Some([_, heads, _, head_dim]) => heads.times(head_dim)?,
                _ => q[2].clone(),
            };
            vec![q[0].clone(), q[1].clone(), width]
        }
        4 => vec![q[0].clone(), q[2].clone(), q[1].times(&q[3])?],
        5 => vec![q[0].clone(), q[1].clone(), q[2].times(&q[4])?],
        _ => return None,
    };
    Some(Fact::of(c.ty(0), Some(dims)))
}

/// The weights inside project x to q, k and v: [B, S, width of v].
fn projecting(c: &mut Context) -> Option<Fact> {
    let (x, weights) = (c.shape(0)?, c.shape(1)?);
    let width = match c.node.ints("qkv_hidden_sizes") {
        Some(&[_, _, v]) => v.into(),
        _ => weights.last()?.over(&3.into())?,
    };
    let [batch, tokens, _] = x else { return None };
    let dims = vec![batch.clone(), tokens.clone(), width];
    let ty = if c.node.op() == "QAttention" {
        c.ty(3)
    } else {
        c.ty(0)
    };
    Some(Fact::of(ty, Some(dims)))
}

/// q [B, S, H·D], or q, k and v side by side.
fn grouped(c: &mut Context) -> Option<Fact> {
    let mut dims = c.dims(0)?;
    if c.input(1).is_none() {
        let (heads, kv_heads) = (c.node.int("num_heads")?, c.node.int("kv_num_heads")?);
        let all = heads.checked_add(kv_heads.checked_mul(2)?)?;
        let last = dims.last_mut()?;
        *last = last.over(&all.into())?.times(&heads.into())?;
    }
    Some(Fact::of(c.ty(0), Some(dims)))
}

fn linear(c: &mut Context) -> Option<Fact> {
    let (q, v) = (c.shape(0)?, c.shape(2)?);
    let [batch, tokens, _] = q else { return None };
    let dims = vec![batch.clone(), tokens.clone(), width(c, v)?];
    Some(Fact::of(c.ty(0), Some(dims)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::*;

    #[test]
    fn attention_has_the_queries_tokens_and_the_values_width() {
        let mut g = Given::new("Attention")
            .int("q_num_heads", 4)
            .int("kv_num_heads", 2);
        g.input(1, &["batch", "tokens", "32"])
            .input(1, &["batch", "keys", "16"])
            .input(1, &["batch", "keys", "24"]);
        assert_eq!(g.shows(), "float32 [batch, tokens, 48]");
        assert_eq!(
            (g.axis(0, 0), g.axis(0, 1), g.axis(1, 1)),
            (Some(0), Some(1), None)
        );
        let mut g = Given::new("Attention");
        g.input(1, &["batch", "4", "tokens", "8"])
            .input(1, &["batch", "4", "keys", "8"])
            .input(1, &["batch", "4", "keys", "6"]);
        assert_eq!(g.shows(), "float32 [batch, 4, tokens, 6]");
        assert_eq!(g.axis(0, 2), Some(2));
    }

    #[test]
    fn packed_operands_are_unpacked() {
        let mut g = Given::microsoft("MultiHeadAttention").int("num_heads", 4);
        g.input(10, &["batch", "tokens", "4", "3", "8"]);
        assert_eq!(g.shows(), "float16 [batch, tokens, 32]");
        let mut g = Given::microsoft("Attention").int("num_heads", 4);
        g.input(1, &["batch", "tokens", "16"])
            .input(1, &["16", "96"]);
        assert_eq!(g.shows(), "float32 [batch, tokens, 32]");
        let mut g = Given::microsoft("GroupQueryAttention")
            .int("num_heads", 4)
            .int("kv_num_heads", 2);
        g.input(1, &["batch", "tokens", "64"]);
        assert_eq!(g.shows(), "float32 [batch, tokens, 32]");
    }

    #[test]
    fn rotary_embeddings_keep_the_shape() {
        let mut g = Given::new("RotaryEmbedding");
        g.input(1, &["batch", "4", "tokens", "8"]);
        assert_eq!(g.shows(), "float32 [batch, 4, tokens, 8]");
        assert_eq!(g.axis(0, 2), Some(2));
    }
}
