//! Attention operators: ONNX's own, and those of ONNX Runtime's optimizers.

use super::Core;
use super::mask::{Mask, Term};
use crate::find::Reason;
use crate::find::operand::{Operand, Prep};
use crate::onnx::{Graph, Node, elem_type};
use crate::shapes::Facts;

/// Refuses `node` if it has one of these inputs.
fn refuse_inputs(node: &Node, inputs: &[(usize, &str)]) -> Result<(), Reason> {
    match inputs.iter().find(|(i, _)| node.input(*i).is_some()) {
        Some((_, name)) => Err(Reason::new(
            format!("{} with {name} is not supported", node.op()),
            [node.label()],
        )),
        None => Ok(()),
    }
}

fn refuse_causal(node: &Node, attribute: &str) -> Result<(), Reason> {
    if node.int(attribute).unwrap_or(0) != 0 {
        let text = "causal attention: not a diffusion transformer's self-attention";
        return Err(Reason::new(text, [node.label()]));
    }
    Ok(())
}

fn refuse_further_outputs(graph: &Graph, node: &Node) -> Result<(), Reason> {
    let used = |o: &&String| !graph.consumers(o).is_empty() || graph.is_output(o);
    match node.proto.output.iter().skip(1).find(used) {
        Some(extra) => Err(Reason::new(
            format!("its further output `{extra}` is used"),
            [node.label()],
        )),
        None => Ok(()),
    }
}

/// An additive mask, or a boolean one that is true where a key may be seen.
fn mask(facts: &Facts, value: Option<&str>) -> Mask {
    let terms = value.map(|value| match facts.of(value).elem_type {
        elem_type::BOOL => Term::Show {
            value: value.into(),
            inverted: false,
            fill: f64::NEG_INFINITY,
        },
        _ => Mask::added(value, 1.0),
    });
    // ONNX Runtime's operators give 0 for rows that see nothing.
    Mask {
        terms: terms.into_iter().collect(),
        guard: value.is_some(),
    }
}

/// ai.onnx Attention (opset 23): 4-D [B, H, S, D], or 3-D with the heads side by side.
pub fn attention(graph: &Graph, facts: &Facts, index: usize) -> Result<Core, Reason> {
    let node = &graph.nodes[index];
    let refuse = |what: &str| Err(Reason::new(what, [node.label()]));
    let (Some(q), Some(k), Some(v)) = (node.input(0), node.input(1), node.input(2)) else {
        return refuse("Attention without q, k or v");
    };
    refuse_causal(node, "is_causal")?;
    if node.float("softcap").unwrap_or(0.0) != 0.0 {
        return refuse("Attention with softcap is not supported");
    }
    refuse_inputs(
        node,
        &[
            (4, "a key cache"),
            (5, "a value cache"),
            (6, "padding lengths"),
        ],
    )?;
    refuse_further_outputs(graph, node)?;
    if let Some(mask) = node.input(3).filter(|m| facts.of(m).elem_type == 0) {
        return refuse(&format!("the type of the mask `{mask}` is unknown"));
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
    let scale = node.float("scale").map(f64::from);
    Ok(Core::seen(
        index,
        operands,
        scale,
        mask(facts, node.input(3)),
    ))
}

/// com.microsoft MultiHeadAttention: q [B, S, H·D] with k and v of that shape or [B, H, S, D]; q and packed k, v
/// [B, S, H, 2, D]; or everything packed [B, S, H, 3, D].
pub fn multi_head(graph: &Graph, facts: &Facts, index: usize) -> Result<Core, Reason> {
    let node = &graph.nodes[index];
    let refuse = |what: String| Err(Reason::new(what, [node.label()]));
    let Some(heads) = node.int("num_heads").filter(|&h| h > 0) else {
        return refuse("MultiHeadAttention without num_heads".into());
    };
    let Some(q) = node.input(0) else {
        return refuse("MultiHeadAttention without a query".into());
    };
    refuse_causal(node, "unidirectional")?;
    refuse_inputs(
        node,
        &[
            (4, "a key padding mask"),
            (6, "a key cache"),
            (7, "a value cache"),
            (8, "past lengths"),
            (9, "beam search"),
        ],
    )?;
    refuse_further_outputs(graph, node)?;
    let picked = |value: &str, index: i64| Operand {
        value: value.into(),
        prep: vec![Prep::Pick { axis: 3, index }],
        layout: "BSHD".into(),
    };
    let plain = |value: &str| match facts.of(value).rank() {
        Some(3) => Ok(Operand::packed(value, heads)),
        Some(4) => Ok(Operand::new(value, "BHSD")),
        rank => Err(Reason::new(
            match rank {
                Some(rank) => format!("`{value}` has rank {rank}, expected 3 or 4"),
                None => format!("the rank of `{value}` is unknown, expected 3 or 4"),
            },
            [node.label()],
        )),
    };
    let [mut q, mut k, mut v] = match (node.input(1), node.input(2)) {
        (None, None) => [picked(q, 0), picked(q, 1), picked(q, 2)],
        (Some(kv), None) => [plain(q)?, picked(kv, 0), picked(kv, 1)],
        (Some(k), Some(v)) => [plain(q)?, plain(k)?, plain(v)?],
        (None, Some(_)) => return refuse("MultiHeadAttention with a value but no key".into()),
    };
    if let Some(bias) = node.input(3) {
        let mut from = 0;
        for operand in [&mut q, &mut k, &mut v] {
            let width = facts
                .shape(&operand.value)
                .filter(|s| s.len() == 3)
                .and_then(|s| s[2].known());
            let Some(width) = width else {
                return refuse(format!(
                    "MultiHeadAttention adds the bias `{bias}` to `{}`, whose width is unknown",
                    operand.value
                ));
            };
            let bias = Prep::AddBias {
                bias: bias.into(),
                from,
                to: from + width,
            };
            operand.prep.insert(0, bias);
            from += width;
        }
    }
    let out = Operand::packed(node.output(0), heads);
    let scale = node.float("scale").map(f64::from).filter(|&s| s != 0.0);
    let bias = mask(facts, node.input(5));
    Ok(Core::seen(index, [q, k, v, out], scale, bias))
}

/// com.microsoft Attention: x [B, S, C] with the weights of q, k and v side by side [C, widths].
pub fn with_weights(graph: &Graph, facts: &Facts, index: usize) -> Result<Core, Reason> {
    let node = &graph.nodes[index];
    let refuse = |what: String| Err(Reason::new(what, [node.label()]));
    let Some(heads) = node.int("num_heads").filter(|&h| h > 0) else {
        return refuse("Attention without num_heads".into());
    };
    let (Some(x), Some(weights)) = (node.input(0), node.input(1)) else {
        return refuse("Attention without an input or weights".into());
    };
    refuse_causal(node, "unidirectional")?;
    if node.int("do_rotary").unwrap_or(0) != 0 {
        return refuse("Attention with rotary embeddings inside is not supported".into());
    }
    refuse_inputs(
        node,
        &[(3, "a mask index"), (4, "a cache"), (6, "past lengths")],
    )?;
    refuse_further_outputs(graph, node)?;
    let total = facts
        .shape(weights)
        .filter(|s| s.len() == 2)
        .and_then(|s| s[1].known());
    let widths = match (node.ints("qkv_hidden_sizes"), total) {
        (Some(&[q, k, v]), _) => [q, k, v],
        (_, Some(total)) if total % 3 == 0 => [total / 3; 3],
        _ => {
            return refuse(format!(
                "the width of the weights `{weights}` is unknown, expected [channels, q + k + v]"
            ));
        }
    };
    let project = Prep::Project {
        weights: weights.into(),
        bias: node.input(2).map(str::to_owned),
    };
    let mut from = 0;
    let operands = widths.map(|width| {
        let columns = Prep::Columns {
            from,
            to: from + width,
        };
        from += width;
        Operand {
            value: x.into(),
            prep: vec![project.clone(), columns, Prep::SplitHeads(heads)],
            layout: "BSHD".into(),
        }
    });
    let [q, k, v] = operands;
    let out = Operand::packed(node.output(0), heads);
    let scale = node.float("scale").map(f64::from).filter(|&s| s != 0.0);
    let bias = mask(facts, node.input(5));
    Ok(Core::seen(index, [q, k, v, out], scale, bias))
}
