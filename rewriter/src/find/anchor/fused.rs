//! Attention operators: ONNX's own, and those of ONNX Runtime's optimizers.

use super::Core;
use super::known;
use super::mask::{Mask, Term};
use crate::find::Reason;
use crate::find::operand::{Operand, Prep};
use crate::onnx::{Graph, Node, elem_type};
use crate::shapes::Facts;

/// Only the first output is computed.
pub(super) fn refuse_further_outputs(graph: &Graph, node: &Node) -> Result<(), Reason> {
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
pub(super) fn mask(facts: &Facts, value: Option<&str>) -> Mask {
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
    known::ATTENTION.check(node)?;
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
    if let Some(mask) = node.input(3) {
        // The operator hides the keys that a mask is too short for; elsewhere a size of 1 stands for all.
        let size = facts.shape(mask).and_then(|s| s.last()?.known());
        let keys = operands[1].size(facts, 'S').and_then(|d| d.known());
        if let Some(size) = size
            && keys.map_or(size == 1, |keys| keys != size)
        {
            let keys = keys.map_or("another number".into(), |k| k.to_string());
            return refuse(&format!(
                "the mask `{mask}` is {size} keys wide and there are {keys}: the rest is hidden, which is not supported"
            ));
        }
    }
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
    known::MULTI_HEAD.check(node)?;
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
    known::WITH_WEIGHTS.check(node)?;
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

#[cfg(test)]
mod tests {
    use crate::find::{Choice, InputsRequest, Kind, survey};
    use crate::onnx::testing::model;

    /// A denoiser with one layer, whose attention is `attention` of `q`, `k` and `v`, as what `inspect` says of it.
    fn site(attention: &str) -> Kind {
        site_of(&around(attention))
    }

    fn around(attention: &str) -> String {
        format!(
            "opset 25
             opset com.microsoft 1
             input x float [b, 64, 32]
             input t float [b]
             input n float [b, n, 32]
             weight w [32, 32]
             weight w3 [32, 96]
             weight m1 [64, 1]
             weight m40 [64, 40]
             weight m64 [64, 64]
             weight w2 [32, 64]
             weight f [1, 32]
             ints s [0, 0, 4, 8]
             ints last [63]
             ints total [64]
             ints short [40]
             ints axes [1]
             t1 = Unsqueeze(t, axes)
             tf = Mul(t1, f)
             ts = Sin(tf)
             te = Unsqueeze(ts, axes)
             y = Add(x, te)
             q = MatMul(y, w)
             k = MatMul(y, w)
             v = MatMul(y, w)
             qkv = MatMul(y, w3)
             qkv2 = MatMul(y, w2)
             k2 = Unsqueeze(last, axes)
             {attention}
             out = MatMul(a, w)
             output out float [b, 64, 32]"
        )
    }

    fn site_of(text: &str) -> Kind {
        let graph = model(text).graph;
        let found = survey(&graph, &InputsRequest::default(), &Choice::default()).unwrap();
        let site = found.sites.into_iter().find(|s| s.op.contains("Attention"));
        site.unwrap().kind
    }

    fn is_layer(attention: &str) {
        let kind = site(attention);
        assert!(matches!(kind, Kind::Layer(_)), "{attention}: {kind:?}");
    }

    fn is_refused(attention: &str, words: &[&str]) {
        match site(attention) {
            Kind::Unknown(reason) | Kind::Unsupported(reason) => {
                let text = reason.text;
                assert!(
                    words.iter().all(|w| text.contains(w)),
                    "{attention}: {text}"
                );
            }
            kind => panic!("{attention}: {kind:?}"),
        }
    }

    #[test]
    fn attributes_that_mean_nothing_are_accepted() {
        for neutral in [
            "",
            "left_window_size=-1 right_window_size=-1",
            "softcap=0.0 is_causal=0 qk_matmul_output_mode=3",
            "softmax_precision=1 scale=0.5",
        ] {
            is_layer(&format!(
                "a = Attention(q, k, v) q_num_heads=4 kv_num_heads=4 {neutral}"
            ));
        }
        is_layer(
            "a = com.microsoft::MultiHeadAttention(q, k, v) num_heads=4 mask_filter_value=-1.0",
        );
        is_layer("a = com.microsoft::Attention(y, w3) num_heads=4 past_present_share_buffer=0");
    }

    #[test]
    fn what_changes_the_result_or_is_not_known_is_refused_by_name_and_value() {
        let onnx = "a = Attention(q, k, v) q_num_heads=4 kv_num_heads=4";
        for (more, words) in [
            (
                "left_window_size=4",
                &["left_window_size = 4", "a window", "expected -1"][..],
            ),
            (
                "right_window_size=0",
                &["right_window_size = 0", "expected -1"],
            ),
            ("softcap=2.5", &["softcap = 2.5", "expected 0"]),
            ("is_causal=1", &["is_causal = 1", "causal attention"]),
            ("softmax_precision=3", &["softmax_precision = 3"]),
            ("sinks=7", &["sinks = 7", "not known", "ai.onnx 25"]),
            ("kinds=\"a\"", &["kinds = \"a\"", "not known"]),
        ] {
            is_refused(&format!("{onnx} {more}"), words);
        }
        is_refused(
            "a = Attention(q, k, v, _, _, _, last) q_num_heads=4 kv_num_heads=4",
            &["padding lengths", "`last`"],
        );
        is_refused(
            "a = Attention(q, k, v, _, _, _, _, last) q_num_heads=4 kv_num_heads=4",
            &["input 7", "`last`", "not known"],
        );
        is_layer("a = Attention(q, k, v, m64) q_num_heads=4 kv_num_heads=4");
        for mask in ["m1", "m40"] {
            is_refused(
                &format!("a = Attention(q, k, v, {mask}) q_num_heads=4 kv_num_heads=4"),
                &[mask, "keys wide", "64"],
            );
        }
        let microsoft = "a = com.microsoft::MultiHeadAttention(q, k, v) num_heads=4";
        is_refused(
            &format!("{microsoft} unidirectional=1"),
            &["unidirectional = 1"],
        );
        is_refused(
            &format!("{microsoft} window=8"),
            &["window = 8", "not known"],
        );
        is_refused(
            "a = com.microsoft::Attention(y, w3) num_heads=4 do_rotary=1",
            &["do_rotary = 1", "rotary"],
        );
    }

    #[test]
    fn group_query_attention_is_a_layer_where_it_sees_all_keys() {
        let all = "kv_num_heads=4 num_heads=4 causal=0";
        let op = "a = com.microsoft::GroupQueryAttention";
        is_layer(&format!("{op}(q, k, v, _, _, last, total) {all}"));
        is_layer(&format!(
            "{op}(q, k, v, _, _, k2, total) {all} local_window_size=-1 softcap=0.0"
        ));
        is_layer(&format!(
            "{op}(qkv2, _, _, _, _, last, total) num_heads=4 kv_num_heads=2 causal=0"
        ));
        for (inputs, attributes, words) in [
            (
                "q, k, v, _, _, last, total",
                "num_heads=4 kv_num_heads=4",
                &["without causal", "causal = 0"][..],
            ),
            (
                "q, k, v, _, _, last, total",
                "num_heads=4 kv_num_heads=4 causal=1",
                &["causal = 1"],
            ),
            (
                "q, k, v, _, _, last, total",
                "num_heads=4 kv_num_heads=4 causal=0 local_window_size=8",
                &["local_window_size = 8"],
            ),
            (
                "q, k, v, _, _, last, total",
                "num_heads=4 kv_num_heads=4 causal=0 smooth_softmax=1",
                &["smooth_softmax = 1"],
            ),
            (
                "q, k, v, _, _, last, total",
                "num_heads=4 kv_num_heads=4 causal=0 do_rotary=1",
                &["do_rotary = 1"],
            ),
            ("q, k, v, _, _, short, total", all, &["seqlens_k", "64"]),
            (
                "q, k, v, _, _, last, short",
                all,
                &["total_sequence_length", "64"],
            ),
            ("q, k, v, k, v, last, total", all, &["a key cache", "`k`"]),
            (
                "q, k, v, _, _, last, total, _, _, _, _, w",
                all,
                &["a sink per head"],
            ),
        ] {
            is_refused(&format!("{op}({inputs}) {attributes}"), words);
        }
    }

    #[test]
    fn lengths_that_are_computed_from_the_sequence_are_those_of_the_sequence() {
        let lengths = |less: &str| {
            let attention = format!(
                "sizes = Shape(x)
                 n = Gather(sizes, second)
                 n32 = Cast(n) to=6
                 m = Sub(n32, {less})
                 rows = Slice(sizes, first, second)
                 all = Expand(m, rows)
                 a = com.microsoft::GroupQueryAttention(q, k, v, _, _, all, n32) num_heads=4 kv_num_heads=4 causal=0"
            );
            let text = around(&attention).replace("[b, 64, 32]", "[b, n, 32]");
            site_of(&format!(
                "ints first [0]\nints second [1]\nints two [2]\n{text}"
            ))
        };
        assert!(
            matches!(lengths("second"), Kind::Layer(_)),
            "{:?}",
            lengths("second")
        );
        let Kind::Unknown(reason) = lengths("two") else {
            panic!("{:?}", lengths("two"));
        };
        assert!(reason.text.contains("seqlens_k"), "{reason}");
    }
}
