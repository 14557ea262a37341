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
