//! com.microsoft GroupQueryAttention, where it is proved to see all keys: not causal, and every length it is told is the
//! sequence's own.

use super::fused::{mask, refuse_further_outputs};
use super::{Core, known};
use crate::find::Reason;
use crate::find::operand::{Operand, Prep};
use crate::onnx::{Constant, Data, Graph};
use crate::shapes::{Dim, Facts, Value};

/// q [B, S, H·D] with k and v [B, S, KV·D], or all three side by side in q.
pub fn read(graph: &Graph, facts: &Facts, index: usize) -> Result<Core, Reason> {
    let node = &graph.nodes[index];
    let refuse = |what: String| Err(Reason::new(what, [node.label()]));
    let heads = |name| node.int(name).filter(|&h| h > 0);
    let (Some(h), Some(kv)) = (heads("num_heads"), heads("kv_num_heads")) else {
        return refuse("GroupQueryAttention without num_heads or kv_num_heads".into());
    };
    let Some(q) = node.input(0) else {
        return refuse("GroupQueryAttention without a query".into());
    };
    known::GROUP_QUERY.check(node)?;
    refuse_further_outputs(graph, node)?;
    let [q, k, v] = match (node.input(1), node.input(2)) {
        (Some(k), Some(v)) => [
            Operand::packed(q, h),
            Operand::packed(k, kv),
            Operand::packed(v, kv),
        ],
        (None, None) => side_by_side(facts, q, h, kv).ok_or_else(|| {
            let width = format!("a width that is a multiple of {h} + 2·{kv} heads");
            let text = format!("`{q}` is {}, expected {width}", facts.show(q));
            Reason::new(text, [node.label()])
        })?,
        _ => return refuse("GroupQueryAttention with a key but no value, or the reverse".into()),
    };
    let Some(tokens) = k.size(facts, 'S') else {
        return refuse(format!("the number of tokens of `{}` is unknown", k.value));
    };
    let said = |i: usize| node.input(i).and_then(|v| repeated(graph, facts, v));
    let total = said(6);
    if total.as_ref() != Some(&tokens) {
        return refuse(format!(
            "it is not known that total_sequence_length is the number of its keys, {}",
            facts.symbols.show(&tokens)
        ));
    }
    if !said(5).is_some_and(|last| facts.symbols.is_difference(&last, &tokens, &1.into())) {
        return refuse(format!(
            "it is not known that seqlens_k is one less than the number of its keys, {}, in every row",
            facts.symbols.show(&tokens)
        ));
    }
    let out = Operand::packed(node.output(0), h);
    let scale = node.float("scale").map(f64::from).filter(|&s| s != 0.0);
    let bias = mask(facts, node.input(10));
    Ok(Core::seen(index, [q, k, v, out], scale, bias))
}

/// q, k and v out of one tensor `[B, S, (H + 2·KV)·D]`.
fn side_by_side(facts: &Facts, value: &str, h: i64, kv: i64) -> Option<[Operand; 3]> {
    let width = facts.shape(value).filter(|s| s.len() == 3)?[2].known()?;
    let parts = kv.checked_mul(2)?.checked_add(h)?;
    let channels = (width > 0 && width % parts == 0).then_some(width / parts)?;
    let mut from = 0;
    Some([h, kv, kv].map(|heads| {
        let columns = Prep::Columns {
            from,
            to: from + heads * channels,
        };
        from += heads * channels;
        Operand {
            value: value.into(),
            prep: vec![columns, Prep::SplitHeads(heads)],
            layout: "BSHD".into(),
        }
    }))
}

/// The number that `value` consists of, however often.
fn repeated(graph: &Graph, facts: &Facts, value: &str) -> Option<Dim> {
    let mut at = value;
    loop {
        if let Some(Value::Ints(numbers)) = facts.of(at).value {
            let (first, rest) = numbers.split_first()?;
            return rest.iter().all(|n| n == first).then(|| first.clone());
        }
        let (node, _) = graph.producer(at)?;
        if !node.domain().is_empty() {
            return None;
        }
        match node.op() {
            "Cast" | "Identity" | "Expand" | "Tile" | "Reshape" | "Squeeze" | "Unsqueeze" => {
                at = node.input(0)?;
            }
            "ConstantOfShape" => {
                let Some(tensor) = node.attribute("value").and_then(|a| a.t.as_ref()) else {
                    return Some(0.into());
                };
                return match Constant::read(tensor)?.1.data? {
                    Data::Ints(numbers) => numbers.first().map(|&n| n.into()),
                    Data::Floats(_) => None,
                };
            }
            _ => return None,
        }
    }
}
