//! Attention that an exporter computes in blocks: of heads or rows (q, k and v are cut alike) or of queries (q is cut, each
//! block sees all keys), with the blocks' results put together by a Concat. That is one attention of the whole tensors.
//!
//! What looks like such blocks and cannot be shown to be them stays apart, with the reason.

use super::mask::{Mask, Term};
use super::{Core, finish, part};
use crate::find::Reason;
use crate::find::operand::{Operand, Prep};
use crate::onnx::{Graph, Node};
use crate::shapes::{self, Facts};
use std::collections::{HashMap, HashSet};

/// A core's result as a Concat reads it: the op's own, or with the heads side by side.
struct Block {
    core: usize,
    out: Operand,
}

/// Puts together what belongs together in `cores`, which are by their anchors.
pub fn join(graph: &Graph, facts: &Facts, cores: &mut Vec<(usize, Result<Core, Reason>)>) {
    let mut results: HashMap<String, Block> = HashMap::new();
    for (index, (_, core)) in cores.iter().enumerate() {
        if let Ok(core) = core {
            enter(graph, facts, index, core, &mut results);
        }
    }
    let mut gone = HashSet::new();
    // Nodes are in the order of computation, so blocks of blocks come after the blocks.
    for concat in graph.nodes.iter().filter(|n| n.is("Concat")) {
        let inputs = concat.proto.input.iter();
        let found: Vec<Option<&Block>> = inputs.map(|v| results.get(v)).collect();
        let blocks: Vec<&Block> = found.iter().copied().flatten().collect();
        let parts: Vec<(&Core, &Operand)> = blocks
            .iter()
            .filter_map(|b| Some((cores[b.core].1.as_ref().ok()?, &b.out)))
            .collect();
        if parts.len() < 2 {
            continue;
        }
        let complete = found.iter().all(Option::is_some);
        let members: Vec<usize> = blocks.iter().map(|b| b.core).collect();
        match joined(graph, facts, concat, &parts, complete) {
            Ok(core) => {
                enter(graph, facts, members[0], &core, &mut results);
                cores[members[0]] = (core.anchor, Ok(core));
                gone.extend(members[1..].iter().map(|&m| cores[m].0));
            }
            Err(Some(why)) => {
                let text = format!(
                    "one of several attentions whose results are joined, which are not known to be blocks of one: {why}"
                );
                let reason = Reason::new(text, [concat.label()]);
                for member in members {
                    if let Ok(core) = &mut cores[member].1 {
                        core.apart = Some(reason.clone());
                    }
                }
            }
            Err(None) => {}
        }
    }
    cores.retain(|(anchor, _)| !gone.contains(anchor));
}

/// Notes the result of core `index`, in each form that a Concat may read.
fn enter(
    graph: &Graph,
    facts: &Facts,
    index: usize,
    core: &Core,
    results: &mut HashMap<String, Block>,
) {
    let merged = graph
        .only_consumer(&core.out.value)
        .map(|user| &graph.nodes[user])
        .filter(|_| core.out.layout == "BSHD" && core.out.prep.is_empty())
        .and_then(|node| side_by_side(facts, node, core.out.value.as_str(), node.output(0)));
    for out in [Some(core.out.clone()), merged].into_iter().flatten() {
        results.insert(out.value.clone(), Block { core: index, out });
    }
}

/// `[B, S, H·D]` on the other side of the Reshape `node` from `[B, S, H, D]`.
fn side_by_side(facts: &Facts, node: &Node, apart: &str, merged: &str) -> Option<Operand> {
    let (heads, flat) = (facts.shape(apart)?, facts.shape(merged)?);
    let ([b, s, h, d], [b2, s2, c]) = (heads, flat) else {
        return None;
    };
    let is_split = node.is("Reshape") && (b, s) == (b2, s2) && h.times(d).as_ref() == Some(c);
    is_split.then(|| Some(Operand::packed(merged, h.known()?)))?
}

/// The attention whose blocks `parts` are, with their results as `concat` reads them. `complete`: it reads nothing else.
///
/// # Errors
/// Why they are no blocks of one attention; `None` where they do not look like it.
fn joined(
    graph: &Graph,
    facts: &Facts,
    concat: &Node,
    parts: &[(&Core, &Operand)],
    complete: bool,
) -> Result<Core, Option<String>> {
    let outs: Vec<&Operand> = parts.iter().map(|(_, out)| *out).collect();
    let cores: Vec<&Core> = parts.iter().map(|(core, _)| *core).collect();
    let letter = axis_letter(facts, concat, &outs).ok_or(None)?;
    let blocks = Blocks {
        graph,
        facts,
        letter,
    };
    // Casts to a common type come again with the whole.
    let uncast = |operand: &Operand| {
        let mut operand = operand.clone();
        operand.prep.retain(|p| !matches!(p, Prep::Cast(_)));
        operand
    };
    let of = |role: fn(&Core) -> &Operand| -> Vec<Operand> {
        cores.iter().map(|c| uncast(role(c))).collect()
    };
    let cut = blocks.cut(of(|c| &c.q)).ok_or(None)?;
    let refuse = |why: &str| Err(Some(why.to_owned()));
    if !complete {
        return refuse("other values are joined with theirs");
    }
    if outs.iter().any(|o| graph.only_consumer(&o.value).is_none()) {
        return refuse("the result of one is used elsewhere too");
    }
    let Some(q) = blocks.whole(&cut) else {
        return refuse("their q are not the parts of one tensor, all of them and in order");
    };
    let (k, v) = if letter == 'S' {
        match (same(of(|c| &c.k)), same(of(|c| &c.v))) {
            (Some(k), Some(v)) => (k, v),
            _ => return refuse("they do not see the same keys and values"),
        }
    } else {
        match (blocks.along(of(|c| &c.k)), blocks.along(of(|c| &c.v))) {
            (Some(k), Some(v)) if blocks.share_alike(&cores) => (k, v),
            _ => {
                return refuse(
                    "their k and v are not the parts of one tensor, all of them, in order and as those of q",
                );
            }
        }
    };
    let first = cores[0];
    if cores.iter().any(|c| c.scale != first.scale) {
        return refuse("their scales differ");
    }
    if cores.iter().any(|c| c.elem_type != first.elem_type) {
        return refuse("their types differ");
    }
    let Some(mask) = blocks.mask(&cores) else {
        return refuse("their masks are not known to be that of one attention");
    };
    let out = match blocks.prep(&outs) {
        Some(prep) => Operand {
            value: concat.output(0).to_owned(),
            prep,
            layout: outs[0].layout.clone(),
        },
        None => return refuse("their results differ in layout"),
    };
    let whole = Core::seen(first.anchor, [q, k, v, out], first.scale, mask);
    finish(graph, facts, whole).map_err(|reason| Some(reason.text))
}

/// What the axis that `concat` joins is in all of `outs`: rows, heads or queries.
fn axis_letter(facts: &Facts, concat: &Node, outs: &[&Operand]) -> Option<char> {
    let rank = facts.of(concat.output(0)).rank()?;
    let axis = shapes::axis(concat.int("axis")?, rank)?;
    let is_joined = |letter: &char| {
        let found = |o: &&Operand| axis_of(o, *letter) == Some(axis) && o.layout == outs[0].layout;
        outs.iter().all(found)
    };
    "BHS".chars().find(is_joined)
}

/// The axis of the operand's value that holds `letter`, if `prep` leaves that to be seen.
fn axis_of(operand: &Operand, letter: char) -> Option<usize> {
    match operand.prep.as_slice() {
        [] => operand.layout.find(letter),
        // Heads side by side in [B, S, H·D].
        [Prep::SplitHeads(_)] => "BSH".find(letter),
        _ => None,
    }
}

/// The one operand that all of `operands` are.
fn same(operands: Vec<Operand>) -> Option<Operand> {
    let mut all = operands.into_iter();
    let first = all.next()?;
    all.all(|o| o == first).then_some(first)
}

/// Blocks along the axis called `letter`.
struct Blocks<'g> {
    graph: &'g Graph,
    facts: &'g Facts,
    letter: char,
}

impl Blocks<'_> {
    /// `operands`, in the form in which they are parts of one tensor; `None` if there is none.
    fn cut(&self, operands: Vec<Operand>) -> Option<Vec<Operand>> {
        if self.are_cut(&operands) {
            return Some(operands);
        }
        // Cut before the heads were told apart.
        let merged: Option<Vec<Operand>> = operands.iter().map(|o| self.merged(o)).collect();
        merged.filter(|merged| self.are_cut(merged))
    }

    fn are_cut(&self, operands: &[Operand]) -> bool {
        let values: Vec<&str> = operands.iter().map(|o| o.value.as_str()).collect();
        let axis = operands.first().and_then(|o| axis_of(o, self.letter));
        axis.is_some_and(|axis| part::common(self.graph, self.facts, &values, axis).is_some())
    }

    /// The operand before the Reshape that told its heads apart.
    fn merged(&self, operand: &Operand) -> Option<Operand> {
        let (node, _) = self.graph.producer(&operand.value)?;
        let plain = operand.layout == "BSHD" && operand.prep.is_empty();
        let merged = node.input(0).filter(|_| plain)?;
        side_by_side(self.facts, node, &operand.value, merged)
    }

    /// The operand that `operands` are the parts of, all of them and in order.
    fn whole(&self, operands: &[Operand]) -> Option<Operand> {
        let all: Vec<&Operand> = operands.iter().collect();
        let values: Vec<&str> = operands.iter().map(|o| o.value.as_str()).collect();
        let axis = axis_of(&operands[0], self.letter)?;
        let value = part::whole(self.graph, self.facts, &values, axis)?;
        Some(Operand {
            value: value.to_owned(),
            prep: self.prep(&all)?,
            layout: operands[0].layout.clone(),
        })
    }

    /// What has to be done to the whole of `operands`, if that is the same in all.
    fn prep(&self, operands: &[&Operand]) -> Option<Vec<Prep>> {
        let first = operands.first()?;
        if operands.iter().any(|o| o.layout != first.layout) {
            return None;
        }
        let heads = |o: &&Operand| match o.prep.as_slice() {
            [Prep::SplitHeads(heads)] => Some(*heads),
            _ => None,
        };
        if self.letter == 'H' && !first.prep.is_empty() {
            let all: Option<Vec<i64>> = operands.iter().map(heads).collect();
            return Some(vec![Prep::SplitHeads(all?.iter().sum())]);
        }
        let alike = operands.iter().all(|o| o.prep == first.prep);
        alike.then(|| first.prep.clone())
    }

    /// k or v of blocks of heads or rows: cut as q is, or a single head that all of them see.
    fn along(&self, operands: Vec<Operand>) -> Option<Operand> {
        if let Some(cut) = self.cut(operands.clone()) {
            return self.whole(&cut);
        }
        let shared = same(operands)?;
        let size = shared.size(self.facts, self.letter)?;
        (self.letter == 'H' && size.known() == Some(1)).then_some(shared)
    }

    /// Whether each head of k and v is seen by as many heads of q in all blocks.
    fn share_alike(&self, cores: &[&Core]) -> bool {
        let ratio = |core: &Core| {
            let [q, k, v] = [&core.q, &core.k, &core.v].map(|o| o.size(self.facts, self.letter));
            let (q, k, v) = (q?, k?, v?);
            if k == v { q.over(&k) } else { None }
        };
        // A single head of keys may be seen by any number.
        let single = |core: &&Core| core.kv_heads == Some(1);
        let shared = cores.iter().all(single) && same_key(cores);
        let first = ratio(cores[0]);
        shared || (first.is_some() && cores.iter().all(|c| ratio(c) == first))
    }

    /// The mask of the whole: one that does not tell the blocks apart, or whose parts the blocks have.
    fn mask(&self, cores: &[&Core]) -> Option<Mask> {
        let first = &cores[0].mask;
        let rank = cores[0].q.layout.len();
        let from_end = match self.letter {
            'S' => 2,
            'H' => 3,
            _ => rank,
        };
        let alike = |m: &Mask| m.guard == first.guard && m.terms.len() == first.terms.len();
        if !cores.iter().all(|c| alike(&c.mask)) {
            return None;
        }
        let mut terms = Vec::new();
        for (place, term) in first.terms.iter().enumerate() {
            let all: Vec<&Term> = cores.iter().map(|c| &c.mask.terms[place]).collect();
            if !all.iter().all(|t| t.with_value("") == term.with_value("")) {
                return None;
            }
            let values: Vec<&str> = all.iter().map(|t| t.value()).collect();
            let axis = self.facts.shape(values[0])?.len().checked_sub(from_end);
            let is_one = |axis: usize| {
                let size = self.facts.shape(values[0]).and_then(|s| s[axis].known());
                size == Some(1)
            };
            if values.iter().all(|v| *v == values[0]) && axis.is_none_or(is_one) {
                terms.push(term.clone());
            } else {
                terms.push(term.with_value(part::whole(self.graph, self.facts, &values, axis?)?));
            }
        }
        let guard = first.guard;
        Some(Mask { terms, guard })
    }
}

fn same_key(cores: &[&Core]) -> bool {
    cores.iter().all(|c| c.k == cores[0].k && c.v == cores[0].v)
}

#[cfg(test)]
mod tests {
    use crate::find::{Choice, InputsRequest, Kind, Layer, Survey, survey};
    use crate::onnx::testing::model;

    /// A denoiser with one layer: `attention` makes `o` of `q`, `k` and `v`, all [b, 4, 64, 8].
    fn around(attention: &str) -> Survey {
        let text = format!(
            "opset 17
             input x float [b, 64, 32]
             input t float [b]
             weight w [32, 32]
             weight w1 [32, 8]
             weight f [1, 32]
             weight m [64, 64]
             weight mh [4, 64, 64]
             ints axes [1]
             ints heads [0, 0, -1, 8]
             ints merge [0, 0, 32]
             ints zero [0]
             ints one [1]
             ints two [2]
             ints half [32]
             ints end [9223372036854775807]
             t1 = Unsqueeze(t, axes)
             tf = Mul(t1, f)
             ts = Sin(tf)
             te = Unsqueeze(ts, axes)
             n = Add(x, te)
             qf = MatMul(n, w)
             kf = MatMul(n, w)
             vf = MatMul(n, w)
             qh = Reshape(qf, heads)
             kh = Reshape(kf, heads)
             vh = Reshape(vf, heads)
             q = Transpose(qh) perm=[0, 2, 1, 3]
             k = Transpose(kh) perm=[0, 2, 1, 3]
             v = Transpose(vh) perm=[0, 2, 1, 3]
             k1f = MatMul(n, w1)
             k1h = Reshape(k1f, heads)
             k1 = Transpose(k1h) perm=[0, 2, 1, 3]
             {attention}
             ot = Transpose(o) perm=[0, 2, 1, 3]
             oj = Reshape(ot, merge)
             a = MatMul(oj, w)
             out = Add(x, a)
             output out float [b, 64, 32]"
        );
        let graph = model(&text).graph;
        survey(&graph, &InputsRequest::default(), &Choice::default()).unwrap()
    }

    fn layers(survey: &Survey) -> Vec<&Layer> {
        survey.layers().collect()
    }

    /// softmax(q·kᵀ)·v into `o{name}`.
    fn attend(name: &str, q: &str, k: &str, v: &str) -> String {
        masked(name, q, k, v, "")
    }

    fn masked(name: &str, q: &str, k: &str, v: &str, mask: &str) -> String {
        let (masking, scores) = match mask {
            "" => (String::new(), format!("s{name}")),
            mask => (
                format!("sm{name} = Add(s{name}, {mask})"),
                format!("sm{name}"),
            ),
        };
        format!(
            "turned{name} = Transpose({k}) perm=[0, 1, 3, 2]
             s{name} = MatMul({q}, turned{name})
             {masking}
             p{name} = Softmax({scores}) axis=-1
             o{name} = MatMul(p{name}, {v})\n"
        )
    }

    const SPLIT: &str = "q0, q1 = Split(q) axis=1
        k0, k1_ = Split(k) axis=1
        v0, v1 = Split(v) axis=1\n";

    fn head_blocks(concat: &str) -> String {
        let (a, b) = (
            attend("0", "q0", "k0", "v0"),
            attend("1", "q1", "k1_", "v1"),
        );
        format!("{SPLIT}{a}{b}{concat}")
    }

    #[test]
    fn blocks_of_heads_are_one_layer() {
        let found = around(&head_blocks("o = Concat(o0, o1) axis=1"));
        let [layer] = layers(&found)[..] else {
            panic!("{:?}", found.sites);
        };
        let core = &layer.core;
        assert_eq!((core.heads, core.kv_heads), (Some(4), Some(4)));
        assert_eq!(
            (core.q.value.as_str(), core.q.layout.as_str()),
            ("qh", "BSHD")
        );
        assert_eq!(core.out.value, "ot");
        assert!(layer.module.is_ok(), "{:?}", layer.module);
        assert_eq!(found.sites.len(), 1);
    }

    /// Several layers in the core form, with the reason.
    fn stay_apart(attention: &str, count: usize, why: &str) {
        let found = around(attention);
        let layers = layers(&found);
        assert_eq!(layers.len(), count, "{:?}", found.sites);
        for layer in layers {
            let reason = layer.module.as_ref().unwrap_err();
            assert!(reason.text.contains(why), "{reason}");
            assert_eq!(reason.nodes, ["node_o"]);
        }
    }

    #[test]
    fn what_is_not_shown_to_be_blocks_stays_apart() {
        stay_apart(
            &head_blocks("o = Concat(o1, o0) axis=1"),
            2,
            "q are not the parts of one tensor",
        );
        let (a, b) = (
            attend("0", "q0", "k1_", "v0"),
            attend("1", "q1", "k0", "v1"),
        );
        stay_apart(
            &format!("{SPLIT}{a}{b}o = Concat(o0, o1) axis=1"),
            2,
            "k and v are not the parts",
        );
        // One of four parts is missing, and of the values something else is in its place.
        let split = "q0, q1, q2, q3 = Split(q) axis=1
            k0, k1_, k2, k3 = Split(k) axis=1
            v0, v1, v2, v3 = Split(v) axis=1\n";
        let parts = ["0", "1_", "2"].map(|i| {
            let n = i.trim_end_matches('_');
            attend(n, &format!("q{n}"), &format!("k{i}"), &format!("v{n}"))
        });
        let parts = parts.concat();
        stay_apart(
            &format!("{split}{parts}o = Concat(o0, o1, o2, v3) axis=1"),
            3,
            "other values are joined",
        );
        stay_apart(
            &format!("{split}{parts}o = Concat(o0, o1, o2) axis=1"),
            3,
            "q are not the parts of one tensor",
        );
        // One is scaled.
        let scaled = "half_ = Constant() value_float=0.5
            q1s = Mul(q1, half_)\n";
        let (a, b) = (
            attend("0", "q0", "k0", "v0"),
            attend("1", "q1s", "k1_", "v1"),
        );
        stay_apart(
            &format!("{SPLIT}{scaled}{a}{b}o = Concat(o0, o1) axis=1"),
            2,
            "scales differ",
        );
        // One is masked.
        let (a, b) = (
            attend("0", "q0", "k0", "v0"),
            masked("1", "q1", "k1_", "v1", "m"),
        );
        stay_apart(
            &format!("{SPLIT}{a}{b}o = Concat(o0, o1) axis=1"),
            2,
            "masks",
        );
        let used = "more = Identity(o0)
            sum = Add(more, o1)
            o = Concat(o0, o1) axis=1";
        stay_apart(&head_blocks(used), 2, "used elsewhere");
    }

    #[test]
    fn slices_are_parts_and_masks_are_cut_with_the_heads() {
        let slices = |x: &str, axis: &str, at: &str| {
            format!(
                "{x}0 = Slice({x}, zero, {at}, {axis})
                 {x}1 = Slice({x}, {at}, end, {axis})\n"
            )
        };
        let cuts = ["q", "k", "v"].map(|x| slices(x, "one", "two")).concat();
        let cuts = cuts.replace("k1 =", "k1_ =");
        let mask = slices("mh", "zero", "two");
        let blocks = |m0: &str, m1: &str| {
            let (a, b) = (
                masked("0", "q0", "k0", "v0", m0),
                masked("1", "q1", "k1_", "v1", m1),
            );
            format!("{cuts}{mask}{a}{b}o = Concat(o0, o1) axis=1")
        };
        for (m0, m1, whole) in [("m", "m", "m"), ("mh0", "mh1", "mh")] {
            let found = around(&blocks(m0, m1));
            let [layer] = layers(&found)[..] else {
                panic!("{:?}", found.sites);
            };
            let values: Vec<&str> = layer.core.mask.values().collect();
            assert_eq!(values, [whole]);
        }
        stay_apart(&blocks("mh1", "mh0"), 2, "masks");
        stay_apart(&blocks("mh0", "mh0"), 2, "masks");
        // A gap between the slices, and a part twice.
        let gap = cuts.replacen("Slice(q, two, end", "Slice(q, three, end", 1);
        let gap = format!("ints three [3]\n{gap}");
        let rest = blocks("m", "m").replace(&cuts, "");
        stay_apart(&format!("{gap}{rest}"), 2, "q are not the parts");
    }

    #[test]
    fn a_head_that_all_blocks_share_is_seen_by_all() {
        let text = |k: &str| {
            let (a, b) = (attend("0", "q0", k, k), attend("1", "q1", k, k));
            format!("{SPLIT}{a}{b}o = Concat(o0, o1) axis=1")
        };
        let found = around(&text("k1"));
        let [layer] = layers(&found)[..] else {
            panic!("{:?}", found.sites);
        };
        assert_eq!((layer.core.heads, layer.core.kv_heads), (Some(4), Some(1)));
        // Two heads that both blocks see are not seen in turn.
        stay_apart(&text("k0"), 2, "k and v are not the parts");
    }

    #[test]
    fn blocks_cut_before_the_heads_are_told_apart() {
        let mut text = String::new();
        for i in ["0", "1"] {
            for x in ["q", "k", "v"] {
                text += &format!(
                    "{x}h{i} = Reshape({x}s{i}, heads)
                     {x}t{i} = Transpose({x}h{i}) perm=[0, 2, 1, 3]\n"
                );
            }
            text += &attend(i, &format!("qt{i}"), &format!("kt{i}"), &format!("vt{i}"));
            text += &format!(
                "ob{i} = Transpose(o{i}) perm=[0, 2, 1, 3]
                 of{i} = Reshape(ob{i}, merge_)\n"
            );
        }
        let found = around(&format!(
            "ints merge_ [0, 0, 16]
             qg = MatMul(n, w)
             kg = MatMul(n, w)
             vg = MatMul(n, w)
             qs0, qs1 = Split(qg) axis=2
             ks0, ks1 = Split(kg) axis=-1
             vs0, vs1 = Split(vg) axis=2
             {text}
             of = Concat(of0, of1) axis=2
             oh = Reshape(of, heads)
             o = Transpose(oh) perm=[0, 2, 1, 3]"
        ));
        let [layer] = layers(&found)[..] else {
            panic!("{:?}", found.sites);
        };
        assert_eq!(layer.core.heads, Some(4));
        assert_eq!(
            (layer.core.q.value.as_str(), layer.core.out.value.as_str()),
            ("qg", "of")
        );
        assert!(layer.module.is_ok(), "{:?}", layer.module);
    }

    fn query_blocks(k: [&str; 2], concat: &str) -> String {
        let (a, b) = (attend("0", "q0", k[0], "v"), attend("1", "q1", k[1], "v"));
        format!("q0, q1 = Split(q) axis=2\n{a}{b}{concat}")
    }

    #[test]
    fn blocks_of_queries_are_one_layer() {
        let found = around(&query_blocks(["k", "k"], "o = Concat(o0, o1) axis=2"));
        let [layer] = layers(&found)[..] else {
            panic!("{:?}", found.sites);
        };
        assert_eq!(layer.core.tokens, Some(64.into()));
        assert_eq!(layer.core.keys, Some(64.into()));
        assert!(layer.module.is_ok(), "{:?}", layer.module);
        stay_apart(
            &query_blocks(["k", "k"], "o = Concat(o1, o0) axis=2"),
            2,
            "q are not the parts",
        );
        let other = query_blocks(["k", "other"], "o = Concat(o0, o1) axis=2");
        stay_apart(
            &format!("other = Sqrt(k)\n{other}"),
            2,
            "do not see the same keys",
        );
        // Along another axis they are no attention of all heads.
        let found = around(&query_blocks(
            ["k", "k"],
            "oo = Concat(o0, o1) axis=3\no = Identity(q)",
        ));
        assert!(layers(&found).len() != 1);
    }

    #[test]
    fn a_mask_is_cut_with_the_queries() {
        let blocks = |m0: &str, m1: &str| {
            let (a, b) = (
                masked("0", "q0", "k", "v", m0),
                masked("1", "q1", "k", "v", m1),
            );
            format!(
                "ints first [0]
                 m0 = Slice(m, zero, half, first)
                 m1 = Slice(m, half, end, first)
                 q0, q1 = Split(q) axis=2
                 {a}{b}o = Concat(o0, o1) axis=2"
            )
        };
        let found = around(&blocks("m0", "m1"));
        let [layer] = layers(&found)[..] else {
            panic!("{:?}", found.sites);
        };
        assert_eq!(layer.core.mask.values().collect::<Vec<_>>(), ["m"]);
        stay_apart(&blocks("m0", "m0"), 2, "masks");
    }

    #[test]
    fn blocks_of_blocks_are_one_layer() {
        let mut text = String::from(SPLIT);
        for (h, k) in [("0", "k0"), ("1", "k1_")] {
            text += &format!("q{h}a, q{h}b = Split(q{h}) axis=2\n");
            for s in ["a", "b"] {
                let name = format!("{h}{s}");
                text += &attend(&name, &format!("q{name}"), k, &format!("v{h}"));
            }
            text += &format!("o{h} = Concat(o{h}a, o{h}b) axis=2\n");
        }
        let found = around(&format!("{text}o = Concat(o0, o1) axis=1"));
        let [layer] = layers(&found)[..] else {
            panic!("{:?}", found.sites);
        };
        assert_eq!(
            (layer.core.heads, layer.core.tokens.clone()),
            (Some(4), Some(64.into()))
        );
        assert!(layer.module.is_ok(), "{:?}", layer.module);
    }

    #[test]
    fn blocks_of_cross_attention_are_one_site() {
        let text = "input prompt float [b, 64, 32]
            pk = MatMul(prompt, w)
            ph = Reshape(pk, heads)
            pt = Transpose(ph) perm=[0, 2, 1, 3]\n";
        let (a, b) = (attend("0", "q0", "pt", "pt"), attend("1", "q1", "pt", "pt"));
        let found = around(&format!(
            "{text}q0, q1 = Split(q) axis=2\n{a}{b}o = Concat(o0, o1) axis=2"
        ));
        assert_eq!(found.sites.len(), 1);
        assert!(matches!(found.sites[0].kind, Kind::Cross { .. }));
    }
}
