//! Masks and biases: every kind, dtype, broadcast, mode and instruction set against the definition in float64.

mod common;

use common::*;
use ditfastattn_kernels::*;
use half::{bf16, f16};
use proptest::prelude::*;

const HIDDEN: f32 = f32::NEG_INFINITY;

/// A mask of noise in which a part of the keys is hidden.
fn some(dims: [usize; 4], gap: usize, boolean: bool, hidden: f32, seed: u32) -> TestMask<f32> {
    let (mut x, mut y) = (noise(seed), noise(seed + 1));
    TestMask::new(dims, gap, boolean, || {
        if x() < 4.0 * hidden - 2.0 {
            HIDDEN
        } else {
            y()
        }
    })
}

fn band(tokens: usize, text: usize) -> Band {
    Band {
        half_width: tokens / 8,
        text,
        text_at_start: false,
    }
}

/// The shapes of masks that exporters make of `[b, h, n, n]`.
fn broadcasts([b, h, n]: [usize; 3]) -> [[usize; 4]; 7] {
    [
        [b, h, n, n],
        [b, 1, n, n],
        [1, h, n, n],
        [1, 1, n, n],
        [b, 1, 1, n],
        [1, 1, 1, n],
        [b, h, n, 1],
    ]
}

fn every_broadcast<T: Element>(tokens: usize, isas: &[Isa]) {
    let mut shape = shape(2, 4, tokens, 18);
    shape.kv_heads = 2;
    shape.v_dim = 7;
    let mut seed = 0;
    for &isa in isas {
        for kind in KINDS {
            for dims in broadcasts([2, 4, tokens]) {
                for boolean in [false, true] {
                    seed += 1;
                    let layouts = [0, 1, 2, 3].map(|i| LAYOUTS[(seed as usize + i) % 4]);
                    let text = if seed % 3 == 0 { tokens / 5 } else { 0 };
                    let gap = 1 + seed as usize % 2;
                    let mut p = Problem::<T>::new(kind, shape, band(tokens, text), layouts, seed);
                    let mut mask = some(dims, gap, boolean, 0.3, seed);
                    mask.guarded = seed % 4 < 2;
                    p.mask = Some(mask.convert());
                    check(p, isa);
                }
            }
        }
    }
}

#[test]
fn every_broadcast_float32() {
    every_broadcast::<f32>(70, &Isa::available());
    for tokens in [1, 2, 17, 64, 130, 257] {
        every_broadcast::<f32>(tokens, &[Isa::best()]);
    }
}

#[test]
fn every_broadcast_float16() {
    every_broadcast::<f16>(70, &Isa::available());
}

#[test]
fn every_broadcast_bfloat16() {
    every_broadcast::<bf16>(70, &Isa::available());
}

/// Masks that hide whole blocks: causal, blocks on the diagonal, padding at either end.
#[test]
fn masks_with_structure() {
    type Rule = fn(usize, usize) -> bool;
    let rules: [Rule; 5] = [
        |i, j| j <= i,
        |i, j| i / 60 == j / 60,
        |_, j| j < 100,
        |_, j| j >= 190,
        |i, j| i < 128 || j < 5,
    ];
    let tokens = 300;
    for isa in Isa::available() {
        for kind in KINDS {
            for rule in rules {
                for boolean in [false, true] {
                    for scale in [0.3, -0.3, 0.0] {
                        let mut p = Problem::<f32>::new(
                            kind,
                            shape(1, 1, tokens, 8),
                            band(tokens, 0),
                            [Layout::Bhsd; 4],
                            1,
                        );
                        let mut at = 0;
                        let next = || {
                            at += 1;
                            if rule((at - 1) / tokens, (at - 1) % tokens) {
                                0.0
                            } else {
                                HIDDEN
                            }
                        };
                        p.mask = Some(TestMask::new([1, 1, tokens, tokens], 1, boolean, next));
                        p.scale = scale;
                        check(p, isa);
                    }
                }
            }
        }
    }
}

fn same(x: &[f32], y: &[f32]) -> bool {
    x.len() == y.len() && x.iter().zip(y).all(|(x, y)| x.to_bits() == y.to_bits())
}

#[test]
fn a_mask_that_shows_everything_is_no_mask_bit_for_bit() {
    for isa in Isa::available() {
        for kind in KINDS {
            for boolean in [false, true] {
                for dims in [[1, 1, 1, 200], [1, 2, 200, 200]] {
                    let mut p = Problem::<f32>::new(
                        kind,
                        shape(1, 2, 200, 24),
                        band(200, 3),
                        [Layout::Bshd; 4],
                        1,
                    );
                    let plain = p.run(isa, &Sequential);
                    p.mask = Some(TestMask::new(dims, 1, boolean, || 0.0));
                    let masked = p.run(isa, &Sequential);
                    assert!(same(&plain.0, &masked.0));
                    assert!(same(
                        &plain.1.unwrap_or_default(),
                        &masked.1.unwrap_or_default()
                    ));
                }
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_the_pool() {
    for kind in KINDS {
        for dims in [[2, 1, 1, 300], [1, 3, 300, 300]] {
            let mut p = Problem::<f32>::new(
                kind,
                shape(2, 3, 300, 24),
                band(300, 7),
                [Layout::Bshd; 4],
                8,
            );
            p.mask = Some(some(dims, 1, false, 0.2, 3));
            let first = p.run(Isa::best(), &Sequential);
            for threads in [2, 5, 100] {
                let again = p.run(Isa::best(), &Threads(threads));
                assert!(same(&first.0, &again.0));
            }
        }
    }
}

/// Exporters hide with −10000, the smallest number of the dtype, and the like: those are numbers, not −∞. A row in
/// which all scores are pushed down as far is a row like any other.
#[test]
fn large_finite_numbers_are_added() {
    let tokens = 130;
    for isa in Isa::available() {
        for kind in KINDS {
            for low in [-1e4f32, -65504.0, -1e9, -1e30, f32::MIN] {
                let mut p = Problem::<f32>::new(
                    kind,
                    shape(1, 1, tokens, 8),
                    band(tokens, 0),
                    [Layout::Bhsd; 4],
                    7,
                );
                let mut at = 0;
                p.mask = Some(TestMask::new([1, 1, tokens, tokens], 1, false, || {
                    at += 1;
                    let (i, j) = ((at - 1) / tokens, (at - 1) % tokens);
                    // Row 3 is pushed down everywhere, row 100 in all of its band.
                    let pushed = i == 3 || j > 90 || (i == 100 && j > 50);
                    if pushed { low } else { 0.0 }
                }));
                check(p, isa);
            }
        }
    }
    let mut p = Problem::<f16>::new(
        Kind::Window,
        shape(1, 1, tokens, 8),
        band(tokens, 0),
        [Layout::Bhsd; 4],
        7,
    );
    p.mask = Some(TestMask::new([1, 1, 1, tokens], 1, false, || -65504.0));
    check(p, Isa::best());
}

/// What rows that see nothing give, spelt out: W is 0; O is 0 or, by definition, 0 / 0.
#[test]
fn rows_that_see_nothing() {
    let tokens = 150;
    for isa in Isa::available() {
        for (boolean, guarded) in [(true, false), (false, true), (false, false)] {
            for dims in [[1, 1, tokens, tokens], [1, 1, tokens, 1]] {
                let mut p = Problem::<f32>::new(
                    Kind::Capture,
                    shape(1, 1, tokens, 8),
                    Band::new(5),
                    [Layout::Bhsd; 4],
                    7,
                );
                let mut at = 0;
                let mut mask = TestMask::new(dims, 1, boolean, || {
                    at += 1;
                    let (i, j) = ((at - 1) / dims[3], (at - 1) % dims[3]);
                    // Row 70 sees nothing, row 71 nothing inside the band.
                    let hidden = i == 70 || (dims[3] > 1 && i == 71 && j.abs_diff(71) <= 5);
                    if hidden { HIDDEN } else { 0.0 }
                });
                mask.guarded = guarded;
                p.mask = Some(mask);
                let row = |x: &[f32], i: usize| x[i * 8..(i + 1) * 8].to_vec();
                let zero = boolean || guarded;
                let (o, r) = p.run(isa, &Sequential);
                let r = r.expect("captured");
                for x in [row(&o, 70), row(&r, 70)].concat() {
                    assert!(if zero { x == 0.0 } else { x.is_nan() }, "{x}");
                }
                p.kind = Kind::Window;
                let (w, _) = p.run(isa, &Sequential);
                assert_eq!(row(&w, 70), [0.0; 8]);
                if dims[3] > 1 {
                    assert_eq!(row(&w, 71), [0.0; 8]);
                    assert_eq!(row(&r, 71), row(&o, 71));
                    assert!(o[71 * 8].is_finite() && o[71 * 8] != 0.0);
                }
                for kind in KINDS {
                    p.kind = kind;
                    check(p.clone(), isa);
                }
            }
        }
    }
}

#[test]
fn hidden_keys_and_values_may_be_anything() {
    for isa in Isa::available() {
        hidden_numbers::<f32>(isa, Products::Float32, 1e-4);
    }
    hidden_numbers::<bf16>(Isa::best(), Products::Bfloat16, 0.03);
    hidden_numbers::<f16>(Isa::best(), Products::Bfloat16, 0.03);
}

fn hidden_numbers<T: Element>(isa: Isa, products: Products, tolerance: f64) {
    let tokens = 200;
    for kind in KINDS {
        for boolean in [false, true] {
            for query_axis in [1, tokens] {
                for bad in [f32::NAN, f32::INFINITY] {
                    let mut p = Problem::<T>::new(
                        kind,
                        shape(1, 1, tokens, 8),
                        band(tokens, 9),
                        [Layout::Bhsd; 4],
                        7,
                    );
                    p.products = products;
                    let mut at = 0;
                    p.mask = Some(TestMask::new(
                        [1, 1, query_axis, tokens],
                        1,
                        boolean,
                        || {
                            at += 1;
                            let (i, j) = ((at - 1) / tokens, (at - 1) % tokens);
                            if j % 50 == 7 && i != 130 { HIDDEN } else { 0.0 }
                        },
                    ));
                    for token in [7, 57, 107, 157] {
                        let at = [p.k.at([0, 0, token, 3]), p.v.at([0, 0, token, 3])];
                        p.k.data[at[0]] = T::from_f32(bad);
                        p.v.data[at[1]] = T::from_f32(bad);
                    }
                    let (want, got) = (p.oracle(), p.run(isa, &Sequential));
                    let pairs = got.0.iter().zip(&want.out).enumerate();
                    for (i, (x, y)) in pairs {
                        let close = (f64::from(*x) - y).abs() < tolerance;
                        assert!(
                            close || !(x.is_finite() || y.is_finite()),
                            "{i}: {x}, not {y}"
                        );
                        assert!(x.is_finite() || i / 8 == 130 && query_axis > 1);
                    }
                }
            }
        }
    }
}

#[test]
fn numbers_in_a_mask_that_are_not_finite_go_where_they_go_by_definition() {
    for isa in Isa::available() {
        for kind in KINDS {
            for bad in [f32::NAN, f32::INFINITY] {
                let mut p = Problem::<f32>::new(
                    kind,
                    shape(1, 1, 130, 8),
                    band(130, 0),
                    [Layout::Bhsd; 4],
                    7,
                );
                let mut at = 0;
                p.mask = Some(TestMask::new([1, 1, 130, 130], 1, false, || {
                    at += 1;
                    if at == 66 * 130 + 60 { bad } else { 0.5 }
                }));
                check(p, isa);
            }
        }
    }
}

/// A mask of another dtype than q's, and q of another length than k.
#[test]
fn cross_attention_with_a_mask_of_another_type() {
    for (q_tokens, kv_tokens) in [(1, 300), (65, 77), (130, 1), (200, 121)] {
        let s = Shape {
            q_tokens,
            kv_tokens,
            ..shape(1, 2, 0, 16)
        };
        let p = Problem::<f16>::new(Kind::Full, s, Band::new(0), LAYOUTS, 3);
        let mask = some([1, 1, q_tokens, kv_tokens], 1, false, 0.0, 3);
        let mut out = p.out.clone();
        let a = Attention {
            shape: s,
            scale: 0.25,
            q: p.q.input(),
            k: p.k.input(),
            v: p.v.input(),
            mask: Some(mask.mask()),
            out: out.output(),
            mode: Mode::Full,
        };
        let want = oracle::attention(&a).unwrap().out;
        attention(&a, &Sequential).unwrap();
        assert!(errors(&out.values(), &want).0 < 2e-3);
    }
}

#[test]
fn slices_that_are_too_short_are_refused() {
    let mut p = Problem::<f32>::new(
        Kind::Window,
        shape(2, 3, 6, 4),
        Band::new(1),
        [Layout::Bhsd; 4],
        1,
    );
    p.mask = Some(some([2, 1, 6, 6], 1, true, 0.5, 1));
    if let Some(TestMask {
        data: MaskData::Boolean(data),
        ..
    }) = &mut p.mask
    {
        data.truncate(71);
    }
    let before = p.out.data.clone();
    let error = p
        .call(|a| attention(a, &Sequential))
        .expect_err("too short");
    assert_eq!(
        p.call(oracle::attention).expect_err("by the oracle too"),
        error
    );
    assert_eq!(before, p.out.data);
    assert_eq!(
        error.to_string(),
        "attention: the mask tensor of [2, 3, 6, 6] (batch, heads, queries, keys) with strides [36, 0, 6, 1] \
         reaches elements 0..=71, its slice has 71"
    );
}

#[test]
fn empty_tensors_are_no_work() {
    for (q_tokens, kv_tokens) in [(0, 0), (0, 4), (4, 0)] {
        let s = Shape {
            q_tokens,
            kv_tokens,
            ..shape(1, 2, 0, 3)
        };
        let mut p = Problem::<f32>::new(Kind::Full, s, Band::new(1), [Layout::Bhsd; 4], 1);
        p.mask = Some(some([1, 1, q_tokens, kv_tokens], 1, false, 0.0, 1));
        let (out, _) = p.run(Isa::best(), &Sequential);
        assert!(out.iter().all(|&x| x == 0.0));
    }
}

fn problems() -> impl Strategy<Value = (Problem<f32>, u32)> {
    let layout = || prop::sample::select(&LAYOUTS[..]);
    (
        prop::sample::select(&KINDS[..]),
        (
            1..3usize,
            1..3usize,
            1..3usize,
            1..200usize,
            0..40usize,
            0..40usize,
        ),
        (0..220usize, 0..220usize, any::<bool>()),
        [layout(), layout(), layout(), layout()],
        (any::<[bool; 6]>(), 1..3usize, 0.0..1.0f32),
        0..u32::MAX - 1,
    )
        .prop_map(
            |(kind, (batch, group, kv_heads, tokens, head_dim, v_dim), b, layouts, m, seed)| {
                let mut s = shape(batch, group * kv_heads, tokens, head_dim);
                (s.kv_heads, s.v_dim) = (kv_heads, v_dim);
                let band = Band {
                    half_width: b.0,
                    text: b.1.min(tokens),
                    text_at_start: b.2,
                };
                let mut p = Problem::new(kind, s, band, layouts, seed);
                let (flags, gap, hidden) = m;
                let one = |flag: bool, n: usize| if flag { n } else { 1 };
                let dims = [
                    one(flags[0], batch),
                    one(flags[1], s.heads),
                    one(flags[2], tokens),
                    one(flags[3], tokens),
                ];
                let mut mask = some(dims, gap, flags[4], hidden, seed);
                mask.guarded = flags[5];
                p.mask = Some(mask);
                (p, seed)
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_masks((p, _) in problems()) {
        for isa in Isa::available() {
            check(p.clone(), isa);
        }
    }
}
