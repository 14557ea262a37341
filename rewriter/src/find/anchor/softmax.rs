//! Attention spelled out: product, scale, mask, softmax, product.

use super::mask::{self, Mask};
use super::{Core, product};
use crate::find::Reason;
use crate::find::operand::{self, Prep};
use crate::find::source::{Dependence, is_weight};
use crate::onnx::{Data, Graph, Node};
use crate::shapes::{self, COPY, Dim, Facts, QUANTIZE, SCALE, SUM};

/// A softmax, however it is written; its result is the first output of `node`.
pub struct Softmax<'g> {
    node: &'g Node,
    scores: &'g str,
    /// `None`: not known.
    axis: Option<i64>,
}

/// exp(x) / sum(exp(x)), with or without the maximum subtracted from x first, as ONNX Runtime writes Softmax in float16
/// for the CPU and people write it by hand.
pub fn spelled_out<'g>(graph: &'g Graph, div: &'g Node) -> Option<Softmax<'g>> {
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

/// Attention in QDQ form has ranges that were calibrated on dense attention: windows and residuals would be clipped to them.
const QUANTIZED: &str = "the attention's own products are quantised (QDQ), in ranges calibrated on dense attention; quantise the projections only";

/// The attention around the softmax at `index`.
pub fn around(
    graph: &Graph,
    facts: &Facts,
    dependence: &Dependence,
    index: usize,
) -> Result<Core, Reason> {
    let node = &graph.nodes[index];
    let softmax = match node.op() {
        "Softmax" => Softmax {
            node,
            scores: node
                .input(0)
                .ok_or_else(|| Reason::new("the Softmax has no input", [node.label()]))?,
            // Before opset 13 the default was axis 1, with all later axes flattened into it.
            axis: Some(
                node.int("axis")
                    .unwrap_or(if graph.opset < 13 { 1 } else { -1 }),
            ),
        },
        _ => {
            spelled_out(graph, node).ok_or_else(|| Reason::new("not a softmax", [node.label()]))?
        }
    };
    let upstream = walk_scores(graph, facts, dependence, &softmax)?;
    let Some(rank) = facts
        .of(softmax.scores)
        .rank()
        .or_else(|| product::rank(facts, upstream.product))
    else {
        let lost = facts.lost_at(graph, softmax.scores);
        let at = lost.map_or(String::new(), |n| {
            format!(
                ": it is lost at {} `{}` ({})",
                n.op(),
                n.label(),
                shapes::why_unknown(n)
            )
        });
        return Err(Reason::new(
            format!(
                "the shape of the scores `{}` is unknown{at}; run shape inference on the model first",
                softmax.scores
            ),
            [node.label()],
        ));
    };
    if softmax.axis != Some(-1) && softmax.axis != Some(rank as i64 - 1) {
        let axis = softmax
            .axis
            .map_or("an unknown axis".into(), |a| format!("axis {a}"));
        return Err(Reason::new(
            format!("the softmax runs over {axis}, not over the keys (the last axis)"),
            [node.label()],
        ));
    }
    let scores = product::scores(upstream.product, rank)?;
    let downstream = walk_weights(graph, facts, node)?;
    let weighted = product::weighted(downstream.product, &downstream.probabilities, rank)?;
    for (name, operand) in [("q", &scores.q), ("k", &scores.k), ("v", &weighted.v)] {
        if let Some(r) = facts.of(&operand.value).rank().filter(|&r| r != rank) {
            return Err(Reason::new(
                format!("{name} has rank {r} but the scores have rank {rank}"),
                [node.label()],
            ));
        }
    }
    let mask = Mask {
        guard: downstream.guard,
        ..upstream.mask
    };
    let mut q = scores.q;
    if !upstream.times.is_empty() && q.layout != "BHSD" {
        return Err(Reason::new(
            "the scores are multiplied head by head, and q is not [B, H, S, D]",
            [node.label()],
        ));
    }
    q.prep.extend(upstream.times.into_iter().map(Prep::Times));
    let operands = [q, scores.k, weighted.v, weighted.out];
    let scale = Some(upstream.scale * scores.factor);
    Ok(Core::seen(index, operands, scale, mask))
}

struct Upstream<'g> {
    product: &'g Node,
    scale: f64,
    /// Tensors of one number per head.
    times: Vec<String>,
    mask: Mask,
}

/// From the Softmax's input back to q·kᵀ, over casts, scalar factors and masks.
fn walk_scores<'g>(
    graph: &'g Graph,
    facts: &Facts,
    dependence: &Dependence,
    softmax: &Softmax<'g>,
) -> Result<Upstream<'g>, Reason> {
    let mut at = softmax.scores;
    let mut scale = 1.0;
    let mut mask = Mask::default();
    let mut times = Vec::new();
    let label = softmax.node.label();
    loop {
        let Some((node, _)) = graph.producer(at) else {
            return Err(Reason::new(
                format!("not attention: the Softmax's input `{at}` is not computed"),
                [label],
            ));
        };
        let refuse = |what: String| Err(Reason::new(what, [label, node.label()]));
        if product::is_product(node) && !is_projection(graph, node) {
            return Ok(Upstream {
                product: node,
                scale,
                times,
                mask,
            });
        }
        let (a, b) = (node.input(0), node.input(1));
        match (node.domain(), node.op()) {
            _ if shapes::is(node, COPY) => at = a.unwrap_or_default(),
            ("", op @ ("Mul" | "Div")) => match operand::scalar_factor(facts, op, a, b) {
                Some((value, factor)) => {
                    scale *= factor;
                    at = value;
                }
                None => match per_head(graph, facts, node) {
                    Some((value, factor)) => {
                        times.push(factor.to_owned());
                        at = value;
                    }
                    None => {
                        let what = if op == "Mul" { "multiplied" } else { "divided" };
                        return refuse(format!(
                            "the scores are {what} by something that is neither a known number nor one number per head"
                        ));
                    }
                },
            },
            ("", "Add" | "Sub" | "Where") if !times.is_empty() => {
                return refuse(
                    "the scores are masked before they are multiplied head by head".into(),
                );
            }
            ("", op @ ("Add" | "Sub")) => {
                let (Some(a), Some(b)) = (a, b) else {
                    return refuse(format!("{op} without operands"));
                };
                // The scores are the operand that leads to a product of two activations; the other is the mask.
                let (next, other) = match op {
                    "Add" if !leads_to_product(graph, a) => (b, a),
                    _ => (a, b),
                };
                if !mask::is_zero(graph, facts, other) {
                    let sign = if op == "Sub" { -1.0 } else { 1.0 };
                    mask.terms.push(Mask::added(other, sign * scale));
                }
                at = next;
            }
            ("", "Where") => match mask::hidden_by_where(facts, node) {
                Some((scores, term)) => {
                    mask.terms.push(term);
                    at = scores;
                }
                None => {
                    return refuse(
                        "the scores go through a Where that does not set them to −∞".into(),
                    );
                }
            },
            ("", "DequantizeLinear") => return refuse(QUANTIZED.into()),
            (_, op) => {
                return refuse(format!(
                    "not attention that is known: the Softmax's input comes from {op}, expected q·kᵀ (MatMul)"
                ));
            }
        }
        if !dependence.on_anything(at) {
            return refuse("not attention: the softmax is over a constant".into());
        }
    }
}

/// `(scores, factor)` of a multiplication by [H, 1, 1] or [1, H, 1, 1]: the same as multiplying q.
fn per_head<'g>(graph: &'g Graph, facts: &Facts, node: &'g Node) -> Option<(&'g str, &'g str)> {
    let (a, b) = (node.input(0)?, node.input(1)?);
    let is_factor = |v: &str| {
        let shape = facts.shape(v).unwrap_or_default();
        let n = shape.len();
        let ones = |dims: &[Dim]| dims.iter().all(|d| d.known() == Some(1));
        (n == 3 && ones(&shape[1..])) || (n == 4 && ones(&shape[..1]) && ones(&shape[2..]))
    };
    match (is_factor(a), is_factor(b)) {
        _ if !node.is("Mul") => None,
        (false, true) if leads_to_product(graph, a) => Some((a, b)),
        (true, false) if leads_to_product(graph, b) => Some((b, a)),
        _ => None,
    }
}

/// A product with a weight is no q·kᵀ.
fn is_projection(graph: &Graph, node: &Node) -> bool {
    let mut inputs = node.proto.input.iter();
    inputs.any(|i| is_weight(graph, i))
}

/// Whether `value` is a product of two activations, scaled, shifted or masked.
pub fn leads_to_product(graph: &Graph, value: &str) -> bool {
    let mut at = value;
    loop {
        match graph.producer(at) {
            Some((node, _)) if product::is_product(node) => return !is_projection(graph, node),
            Some((node, _)) if shapes::is(node, COPY | SCALE | SUM | QUANTIZE) => {
                match node.input(0) {
                    Some(input) => at = input,
                    None => return false,
                }
            }
            Some((node, _)) if node.is("Where") => {
                // Where(cond, scores, −∞)
                match node.input(1) {
                    Some(input) => at = input,
                    None => return false,
                }
            }
            _ => return false,
        }
    }
}

struct Downstream<'g> {
    product: &'g Node,
    /// What the product reads: the softmax's result behind casts and guards.
    probabilities: String,
    guard: bool,
}

/// From the Softmax's result to the product with v.
fn walk_weights<'g>(
    graph: &'g Graph,
    facts: &Facts,
    softmax: &'g Node,
) -> Result<Downstream<'g>, Reason> {
    let mut at = softmax.output(0);
    let mut guard = false;
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
            [nan, chosen] if is_guard(graph, facts, at, *nan, *chosen) => {
                guard = true;
                &graph.nodes[*chosen]
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
            _ if shapes::is(next, COPY) => at = next.output(0),
            ("", "QuantizeLinear") => {
                return Err(Reason::new(QUANTIZED, [softmax.label(), next.label()]));
            }
            ("", "Where") if consumers.len() == 2 => at = next.output(0),
            _ if product::is_product(next) => {
                return Ok(Downstream {
                    product: next,
                    probabilities: at.to_owned(),
                    guard,
                });
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

fn is_guard(graph: &Graph, facts: &Facts, p: &str, nan: usize, chosen: usize) -> bool {
    let (nan, chosen) = (&graph.nodes[nan], &graph.nodes[chosen]);
    nan.is("IsNaN")
        && chosen.is("Where")
        && chosen.input(0) == Some(nan.output(0))
        && chosen.input(2) == Some(p)
        && chosen
            .input(1)
            .is_some_and(|v| mask::is_zero(graph, facts, v))
}
