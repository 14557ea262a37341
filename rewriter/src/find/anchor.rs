//! Recognising softmax(scale · q·kᵀ)·v around an anchor: a Softmax or an attention operator.

use super::Reason;
use super::operand::{self, Operand};
use crate::onnx::{Data, Graph, Node, elem_type};
use crate::shapes::Facts;

/// The attention core: what the op will read and write instead of the exporter's nodes.
#[derive(Clone, Debug, PartialEq)]
pub struct Core {
    /// Index of the Softmax or attention node.
    pub anchor: usize,
    pub q: Operand,
    pub k: Operand,
    pub v: Operand,
    /// What the op writes; its value keeps its name.
    pub out: Operand,
    /// Factor on q·kᵀ; `None` = 1/√head_dim.
    pub scale: Option<f64>,
    /// Additive or boolean mask on the scores, if any.
    pub mask: Option<String>,
    pub elem_type: i32,
    pub heads: Option<i64>,
    pub head_dim: Option<i64>,
    /// Tokens, for people: `64`, `height·width/4`.
    pub tokens: Option<String>,
}

/// Whether `node` can be the middle of an attention.
pub fn is_anchor(graph: &Graph, node: &Node) -> bool {
    match node.domain() {
        "" => matches!(node.op(), "Softmax" | "Attention") || spelled_out(graph, node).is_some(),
        "com.microsoft" => matches!(
            node.op(),
            "MultiHeadAttention" | "Attention" | "GroupQueryAttention" | "PackedMultiHeadAttention"
        ),
        _ => false,
    }
}

/// A softmax, however it is written; its result is the first output of `node`.
struct Softmax<'g> {
    node: &'g Node,
    scores: &'g str,
    /// `None`: not known.
    axis: Option<i64>,
}

/// exp(x) / sum(exp(x)), with or without the maximum subtracted from x first, as ONNX Runtime writes Softmax in float16
/// for the CPU and people write it by hand.
fn spelled_out<'g>(graph: &'g Graph, div: &'g Node) -> Option<Softmax<'g>> {
    if !div.is("Div") {
        return None;
    }
    let made_by =
        |value: &'g str, op: &str| graph.producer(value).map(|(n, _)| n).filter(|n| n.is(op));
    let exp = made_by(div.input(0)?, "Exp")?;
    let sum =
        made_by(div.input(1)?, "ReduceSum").filter(|sum| sum.input(0) == Some(exp.output(0)))?;
    if sum.int("keepdims") == Some(0) {
        return None;
    }
    let axes = sum.ints("axes").map(<[i64]>::to_vec).or_else(|| {
        match graph.constant(sum.input(1)?)?.data? {
            Data::Ints(axes) => Some(axes),
            Data::Floats(_) => None,
        }
    });
    let axis = axes
        .and_then(|axes| <[i64; 1]>::try_from(axes).ok())
        .map(|[axis]| axis);
    let shifted = exp.input(0)?;
    let scores = made_by(shifted, "Sub")
        .filter(|sub| {
            sub.input(1)
                .and_then(|max| made_by(max, "ReduceMax"))
                .is_some_and(|max| max.input(0) == sub.input(0))
        })
        .and_then(|sub| sub.input(0))
        .unwrap_or(shifted);
    Some(Softmax {
        node: div,
        scores,
        axis,
    })
}

/// The attention around the anchor `index`.
///
/// # Errors
/// The reason why it is none, or none that the op can compute.
pub fn core(graph: &Graph, facts: &Facts, index: usize) -> Result<Core, Reason> {
    let node = &graph.nodes[index];
    let found = match (node.domain(), node.op()) {
        ("", "Softmax") => {
            let scores = node
                .input(0)
                .ok_or_else(|| Reason::new("the Softmax has no input", [node.label()]))?;
            let axis = Some(node.int("axis").unwrap_or(-1));
            around_softmax(graph, facts, index, &Softmax { node, scores, axis })?
        }
        ("", "Div") => {
            let softmax = spelled_out(graph, node)
                .ok_or_else(|| Reason::new("not a softmax", [node.label()]))?;
            around_softmax(graph, facts, index, &softmax)?
        }
        ("", "Attention") => around_attention(graph, facts, index)?,
        (domain, op) => {
            return Err(Reason::new(
                format!("the fused operator {domain}::{op} is not supported yet"),
                [node.label()],
            ));
        }
    };
    finish(graph, facts, found)
}

/// Layout, scale and sizes once q, k, v and the result are known.
fn finish(graph: &Graph, facts: &Facts, found: Core) -> Result<Core, Reason> {
    let label = graph.nodes[found.anchor].label();
    let elem = facts.of(&found.q.value).elem_type;
    if elem != 0 && !elem_type::is_supported_float(elem) {
        return Err(Reason::new(
            format!(
                "q is {}, expected float32, float16 or bfloat16",
                elem_type::name(elem)
            ),
            [label],
        ));
    }
    let mut scale = found.scale.unwrap_or(1.0);
    let default_scale = found.scale.is_none();
    let q = operand::absorb(graph, facts, &found.q, Some(&mut scale));
    let k = operand::absorb(graph, facts, &found.k, Some(&mut scale));
    let v = operand::absorb(graph, facts, &found.v, None);
    let out = operand::absorb_result(graph, facts, &found.out);
    let head_dim = found.q.packed_heads.map_or_else(
        || q.size(facts, 'D').and_then(crate::shapes::Dim::known),
        |h| {
            facts
                .shape(&found.q.value)
                .and_then(|s| s.last()?.known())
                .map(|w| w / h.max(1))
        },
    );
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
    let heads = found
        .q
        .packed_heads
        .or_else(|| q.size(facts, 'H').and_then(crate::shapes::Dim::known));
    let tokens = match found.q.packed_heads {
        Some(_) => facts
            .shape(&q.value)
            .and_then(|s| s.get(1))
            .map(|d| facts.symbols.show(d)),
        None => q.size(facts, 'S').map(|d| facts.symbols.show(d)),
    };
    let elem_type = if elem != 0 {
        elem
    } else {
        facts.of(&out.value).elem_type
    };
    Ok(Core {
        q,
        k,
        v,
        out,
        scale,
        elem_type,
        heads,
        head_dim,
        tokens,
        ..found
    })
}

fn layout_for(rank: usize, four: &str, three: &str) -> Option<String> {
    match rank {
        4 => Some(four.into()),
        3 => Some(three.into()),
        _ => None,
    }
}

fn around_softmax(
    graph: &Graph,
    facts: &Facts,
    index: usize,
    found: &Softmax,
) -> Result<Core, Reason> {
    let Softmax {
        node: softmax,
        scores,
        axis,
    } = *found;
    let upstream = scores_product(graph, facts, softmax, scores)?;
    let rank = [scores, &upstream.q, &upstream.k]
        .iter()
        .find_map(|v| facts.of(v).rank());
    let Some(rank) = rank else {
        return Err(Reason::new(
            "the rank of q, k and the scores is unknown; run shape inference on the model first",
            [softmax.label()],
        ));
    };
    if axis != Some(-1) && axis != Some(rank as i64 - 1) {
        let axis = axis.map_or("an unknown axis".into(), |a| format!("axis {a}"));
        return Err(Reason::new(
            format!("the softmax runs over {axis}, not over the keys (the last axis)"),
            [softmax.label()],
        ));
    }
    let (pv, v) = weighted_values(graph, softmax)?;
    let q_layout = layout_for(rank, "BHSD", "BSD");
    let (Some(q_layout), Some(kt_layout)) = (q_layout, layout_for(rank, "BHDS", "BDS")) else {
        return Err(Reason::new(
            format!("the scores have rank {rank}, expected 3 or 4"),
            [softmax.label()],
        ));
    };
    let k_layout = if upstream.k_transposed {
        q_layout.clone()
    } else {
        kt_layout
    };
    for (name, value) in [("q", &upstream.q), ("k", &upstream.k), ("v", &v)] {
        if let Some(r) = facts.of(value).rank().filter(|&r| r != rank) {
            return Err(Reason::new(
                format!("{name} has rank {r} but the scores have rank {rank}"),
                [softmax.label()],
            ));
        }
    }
    Ok(Core {
        anchor: index,
        q: Operand::new(&upstream.q, &q_layout),
        k: Operand::new(&upstream.k, &k_layout),
        v: Operand::new(&v, &q_layout),
        out: Operand::new(pv.output(0), &q_layout),
        scale: Some(upstream.scale),
        mask: upstream.mask,
        elem_type: 0,
        heads: None,
        head_dim: None,
        tokens: None,
    })
}

struct Product {
    q: String,
    k: String,
    /// k is [.., tokens, channels] (FusedMatMul with transB).
    k_transposed: bool,
    scale: f64,
    mask: Option<String>,
}

/// From the Softmax's input back to q·kᵀ, over casts, scalar factors and a mask.
fn scores_product(
    graph: &Graph,
    facts: &Facts,
    softmax: &Node,
    scores: &str,
) -> Result<Product, Reason> {
    let mut at = scores.to_owned();
    let mut scale = 1.0;
    let mut mask = None;
    loop {
        let Some((node, _)) = graph.producer(&at) else {
            return Err(Reason::new(
                format!("not attention: the Softmax's input `{at}` is not computed"),
                [softmax.label()],
            ));
        };
        let not_attention = |what: String| Err(Reason::new(what, [softmax.label(), node.label()]));
        match (node.domain(), node.op()) {
            ("", "Cast" | "Identity" | "Dropout") => at = node.proto.input[0].clone(),
            ("", op @ ("Mul" | "Div")) => {
                let (a, b) = (node.input(0), node.input(1));
                match operand::scalar_factor(facts, op, a, b) {
                    Some((value, factor)) => {
                        scale *= factor;
                        at = value.to_owned();
                    }
                    None => {
                        return not_attention(format!(
                            "the scores are {op}-ed by something that is not one known number"
                        ));
                    }
                }
            }
            ("", "Add") => {
                // The scores are the operand that leads to a product of two activations; the other is the mask.
                let (a, b) = (node.proto.input[0].clone(), node.proto.input[1].clone());
                let (scores, other) = if leads_to_product(graph, &a) {
                    (a, b)
                } else {
                    (b, a)
                };
                mask = Some(other);
                at = scores;
            }
            ("", "Where") => {
                return not_attention(
                    "the scores are masked by Where, which is not supported yet".into(),
                );
            }
            ("", "MatMul") => {
                let (q, k) = (node.proto.input[0].clone(), node.proto.input[1].clone());
                return Ok(Product {
                    q,
                    k,
                    k_transposed: false,
                    scale,
                    mask,
                });
            }
            ("com.microsoft", "FusedMatMul") => {
                let flag = |name: &str| node.int(name).unwrap_or(0) != 0;
                if flag("transA") || flag("transBatchA") || flag("transBatchB") {
                    return not_attention(
                        "q·kᵀ is a FusedMatMul with transA or transBatch, which is not supported"
                            .into(),
                    );
                }
                let (q, k) = (node.proto.input[0].clone(), node.proto.input[1].clone());
                scale *= f64::from(node.float("alpha").unwrap_or(1.0));
                return Ok(Product {
                    q,
                    k,
                    k_transposed: flag("transB"),
                    scale,
                    mask,
                });
            }
            (_, op) => {
                return not_attention(format!(
                    "not attention that is known: the Softmax's input comes from {op}, expected q·kᵀ (MatMul)"
                ));
            }
        }
    }
}

fn leads_to_product(graph: &Graph, value: &str) -> bool {
    let mut at = value;
    loop {
        match graph.producer(at) {
            Some((node, _)) if matches!(node.op(), "MatMul" | "FusedMatMul") => return true,
            Some((node, _)) if matches!(node.op(), "Cast" | "Mul" | "Div" | "Identity") => {
                match node.input(0) {
                    Some(input) => at = input,
                    None => return false,
                }
            }
            _ => return false,
        }
    }
}

/// From the Softmax's result to the product with v.
fn weighted_values<'g>(graph: &'g Graph, softmax: &'g Node) -> Result<(&'g Node, String), Reason> {
    let mut at = softmax.output(0);
    loop {
        let consumers = graph.consumers(at);
        let next = match consumers {
            _ if graph.is_output(at) => {
                return Err(Reason::new(
                    format!("the attention weights `{at}` are an output of the model"),
                    [softmax.label()],
                ));
            }
            [only] => &graph.nodes[*only],
            // The exporters' guard for rows that are masked everywhere: Where(IsNaN(p), 0, p).
            [nan, guard] if graph.nodes[*nan].is("IsNaN") && graph.nodes[*guard].is("Where") => {
                &graph.nodes[*guard]
            }
            [] => {
                return Err(Reason::new(
                    "not attention: the Softmax's result is not used",
                    [softmax.label()],
                ));
            }
            many => {
                let users = many.iter().map(|&i| graph.nodes[i].label());
                return Err(Reason::new(
                    "the attention weights are used in more than one place",
                    std::iter::once(softmax.label()).chain(users),
                ));
            }
        };
        match (next.domain(), next.op()) {
            ("", "Cast" | "Identity" | "Dropout" | "Where") => at = next.output(0),
            ("", "MatMul") if next.input(0) == Some(at) => {
                let v = next.input(1).unwrap_or_default().to_owned();
                return Ok((next, v));
            }
            ("com.microsoft", "FusedMatMul")
                if next.input(0) == Some(at)
                    && next.float("alpha").unwrap_or(1.0) == 1.0
                    && ["transA", "transB", "transBatchA", "transBatchB"]
                        .iter()
                        .all(|f| next.int(f).unwrap_or(0) == 0) =>
            {
                let v = next.input(1).unwrap_or_default().to_owned();
                return Ok((next, v));
            }
            (_, op) => {
                return Err(Reason::new(
                    format!(
                        "not attention that is known: the Softmax's result goes into {op}, expected the product with v"
                    ),
                    [softmax.label(), next.label()],
                ));
            }
        }
    }
}

fn around_attention(graph: &Graph, facts: &Facts, index: usize) -> Result<Core, Reason> {
    let node = &graph.nodes[index];
    let refuse = |what: &str| Err(Reason::new(what, [node.label()]));
    let (Some(q), Some(k), Some(v)) = (node.input(0), node.input(1), node.input(2)) else {
        return refuse("Attention without q, k or v");
    };
    if node.int("is_causal").unwrap_or(0) != 0 {
        return refuse("causal attention: not a diffusion transformer's self-attention");
    }
    if node.float("softcap").unwrap_or(0.0) != 0.0 {
        return refuse("Attention with softcap is not supported");
    }
    if node.input(4).is_some() || node.input(5).is_some() || node.input(6).is_some() {
        return refuse("Attention with a key/value cache or padding lengths is not supported");
    }
    if let Some(extra) = node
        .proto
        .output
        .iter()
        .skip(1)
        .find(|o| !graph.consumers(o).is_empty() || graph.is_output(o))
    {
        return Err(Reason::new(
            format!("its further output `{extra}` is used"),
            [node.label()],
        ));
    }
    let out = node.output(0);
    let rank = facts.of(q).rank().or_else(|| facts.of(out).rank());
    let heads = (node.int("q_num_heads"), node.int("kv_num_heads"));
    let operands = match (rank, heads) {
        (Some(3), (Some(h), Some(kv))) | (None, (Some(h), Some(kv))) => [
            Operand::packed(q, h),
            Operand::packed(k, kv),
            Operand::packed(v, kv),
            Operand::packed(out, h),
        ],
        (Some(4), _) => [q, k, v, out].map(|value| Operand::new(value, "BHSD")),
        _ => return refuse("the rank of q is unknown; expected 4, or 3 with q_num_heads"),
    };
    let [q, k, v, out] = operands;
    Ok(Core {
        anchor: index,
        q,
        k,
        v,
        out,
        scale: node.float("scale").map(f64::from),
        mask: node.input(3).map(str::to_owned),
        elem_type: 0,
        heads: None,
        head_dim: None,
        tokens: None,
    })
}
