//! Recognising softmax(scale · q·kᵀ + mask)·v around an anchor: a Softmax or an attention operator.
//!
//! `softmax` reads attention spelled out in primitive operators, with `product` for its two products and `mask` for what
//! is added in between; `fused` reads attention operators. All end in one [`Core`]. `blocks` puts together the cores of one
//! attention that is computed in blocks, `part` says what the blocks' operands are parts of.

mod blocks;
mod fused;
mod group_query;
mod known;
mod mask;
mod part;
mod product;
mod softmax;

pub use mask::{Mask, Term};
pub(super) use softmax::leads_to_product;

use super::Reason;
use super::operand::{self, Operand, Prep};
use super::source::Dependence;
use crate::onnx::{Graph, Node, elem_type};
use crate::shapes::{self, ANCHOR, Dim, Facts};
use ditfastattn_contract::operators::DOMAIN;

/// The attention core: what the op will read and write instead of the exporter's nodes.
#[derive(Clone, Debug, PartialEq)]
pub struct Core {
    /// Index of the Softmax or attention node.
    pub anchor: usize,
    pub q: Operand,
    pub k: Operand,
    pub v: Operand,
    /// What the op writes; its value keeps its name. Its `prep` is read backwards.
    pub out: Operand,
    /// Factor on q·kᵀ; `None` = 1/√head_dim.
    pub scale: Option<f64>,
    pub mask: Mask,
    /// The type in which the op reads q, k and v; the result's may be another.
    pub elem_type: i32,
    pub heads: Option<i64>,
    /// Fewer than `heads` under grouped-query attention.
    pub kv_heads: Option<i64>,
    pub head_dim: Option<i64>,
    /// Tokens of the sequence, text included: one per query.
    pub tokens: Option<Dim>,
    /// Tokens that a query can see. Windows need as many as there are queries.
    pub keys: Option<Dim>,
    /// Why it is not joined with other attentions of which it looks like a block.
    pub apart: Option<Reason>,
}

impl Core {
    /// Every value of the graph that lowering reads for the op.
    pub fn reads(&self) -> impl Iterator<Item = &str> {
        let operands = [&self.q, &self.k, &self.v];
        operands
            .into_iter()
            .flat_map(|o| std::iter::once(o.value.as_str()).chain(o.side_values()))
            .chain(self.mask.values())
    }
}

/// Whether `node` can be the middle of an attention.
pub fn is_anchor(graph: &Graph, node: &Node) -> bool {
    // What is computed in place of attention is no attention of the model's; whoever's operator it is else, it is named.
    let is_foreign = || {
        !shapes::has_row(node)
            && node.domain() != DOMAIN.as_str()
            && node.op().contains("Attention")
    };
    shapes::is(node, ANCHOR) || is_written_out(graph, node) || is_foreign()
}

/// Whether `node` divides exponentials by their sum.
pub fn is_written_out(graph: &Graph, node: &Node) -> bool {
    softmax::spelled_out(graph, node).is_some()
}

/// Every anchor of `graph` with the attention around it, or the reason why it is none, or none that the op can compute.
pub fn cores(
    graph: &Graph,
    facts: &Facts,
    dependence: &Dependence,
) -> Vec<(usize, Result<Core, Reason>)> {
    let anchors = (0..graph.nodes.len()).filter(|&i| is_anchor(graph, &graph.nodes[i]));
    let mut cores = anchors
        .map(|index| (index, core(graph, facts, dependence, index)))
        .collect();
    blocks::join(graph, facts, &mut cores);
    cores
}

/// The attention around the anchor `index`.
fn core(
    graph: &Graph,
    facts: &Facts,
    dependence: &Dependence,
    index: usize,
) -> Result<Core, Reason> {
    let node = &graph.nodes[index];
    let found = match (node.domain(), node.op()) {
        ("", "Softmax" | "Div") => softmax::around(graph, facts, dependence, index)?,
        ("", "Attention") => fused::attention(graph, facts, index)?,
        ("com.microsoft", "MultiHeadAttention") => fused::multi_head(graph, facts, index)?,
        ("com.microsoft", "Attention") => fused::with_weights(graph, facts, index)?,
        ("com.microsoft", "GroupQueryAttention") => group_query::read(graph, facts, index)?,
        (domain, op) => {
            let domain = if domain.is_empty() { "ai.onnx" } else { domain };
            return Err(Reason::new(
                format!("the fused operator {domain}::{op} is not supported"),
                [node.label()],
            ));
        }
    };
    finish(graph, facts, found)
}

/// Layout, scale and sizes once q, k, v and the result are known.
fn finish(graph: &Graph, facts: &Facts, found: Core) -> Result<Core, Reason> {
    let label = graph.nodes[found.anchor].label();
    let elem = common_type(facts, &found).map_err(|what| Reason::new(what, [label]))?;
    let mut scale = found.scale.unwrap_or(1.0);
    let default_scale = found.scale.is_none();
    let q = operand::absorb(graph, facts, &found.q, Some(&mut scale));
    let k = operand::absorb(graph, facts, &found.k, Some(&mut scale));
    let v = operand::absorb(graph, facts, &found.v, None);
    let out = operand::absorb_result(graph, facts, &found.out);
    if out.value.is_empty() {
        return Err(Reason::new(
            "the attention's result has no name, expected one that somebody can read",
            [label],
        ));
    }
    let head_dim = q.size(facts, 'D').and_then(|d| d.known());
    let (scale, q, k) = match (default_scale, head_dim) {
        (false, _) => (Some(scale), q, k),
        (true, Some(d)) => (Some(scale / (d as f64).sqrt()), q, k),
        // Without head_dim a factor on q or k cannot be joined with 1/√head_dim: leave it where it is.
        (true, None) => (
            None,
            operand::absorb(graph, facts, &found.q, None),
            operand::absorb(graph, facts, &found.k, None),
        ),
    };
    let elem_type = if elem != 0 {
        elem
    } else {
        facts.of(&out.value).elem_type
    };
    let [q, k, v] = [q, k, v].map(|operand| match operand.elem_type(facts) {
        0 => operand,
        ty if ty == elem_type => operand,
        _ => operand.cast(elem_type),
    });
    Ok(Core {
        heads: q.size(facts, 'H').and_then(|d| d.known()),
        kv_heads: k.size(facts, 'H').and_then(|d| d.known()),
        head_dim,
        tokens: q.size(facts, 'S'),
        keys: k.size(facts, 'S'),
        q,
        k,
        v,
        out,
        scale,
        elem_type,
        ..found
    })
}

/// The type that the op reads q, k and v in: theirs, or where they differ the wider. 0 if none is known.
///
/// # Errors
/// Which of them has a type that the op does not read.
fn common_type(facts: &Facts, core: &Core) -> Result<i32, String> {
    let operands = [("q", &core.q), ("k", &core.k), ("v", &core.v)];
    let factors = core.q.prep.iter().filter_map(|p| match p {
        Prep::Times(factor) => Some(("a factor on the scores", facts.of(factor).elem_type)),
        _ => None,
    });
    let types = operands.map(|(name, operand)| (name, operand.elem_type(facts)));
    let mut common = 0;
    for (name, ty) in types.into_iter().chain(factors).filter(|(_, ty)| *ty != 0) {
        if !elem_type::is_supported_float(ty) {
            return Err(format!(
                "{name} is {}, expected float32, float16 or bfloat16",
                elem_type::name(ty)
            ));
        }
        // Neither of the 16-bit types holds the other.
        common = if common == 0 || common == ty {
            ty
        } else {
            elem_type::FLOAT
        };
    }
    Ok(common)
}

impl Core {
    /// A core as it is first seen, before [`finish`].
    fn seen(anchor: usize, [q, k, v, out]: [Operand; 4], scale: Option<f64>, mask: Mask) -> Self {
        Self {
            anchor,
            q,
            k,
            v,
            out,
            scale,
            mask,
            elem_type: 0,
            heads: None,
            kv_heads: None,
            head_dim: None,
            tokens: None,
            keys: None,
            apart: None,
        }
    }
}
