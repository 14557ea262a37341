//! Every mode, dtype, layout, size, instruction set and arithmetic against the definition in float64.

mod common;

use common::*;
use ditfastattn_kernels::*;
use half::{bf16, f16};
use proptest::prelude::*;

/// Bands worth trying on a sequence of `tokens`: narrow, wide, everything, with text at either end.
fn bands(tokens: usize) -> Vec<Band> {
    let mut bands = vec![
        Band::new(0),
        Band::new((tokens / 8).max(1)),
        Band::new(tokens),
        Band::new(usize::MAX),
    ];
    for text in [1, tokens / 3, tokens] {
        for text_at_start in [false, true] {
            bands.push(Band {
                half_width: (tokens / 8).max(1),
                text,
                text_at_start,
            });
        }
    }
    bands
}

const DIMS: [usize; 9] = [1, 8, 18, 32, 33, 64, 72, 128, 256];
const TOKENS: [usize; 9] = [1, 2, 3, 17, 63, 64, 65, 130, 257];

#[test]
fn every_mode_width_and_band_at_every_level() {
    for isa in Isa::available() {
        let mut seed = 0;
        for dim in DIMS {
            for tokens in TOKENS {
                // Each size sees every mode; bands take turns, so that all of them meet all sizes somewhere.
                for (turn, kind) in KINDS.into_iter().enumerate() {
                    let bands = bands(tokens);
                    for i in 0..2 {
                        seed += 1;
                        let band = bands[(seed as usize + turn + 3 * i) % bands.len()];
                        let layout = LAYOUTS[(seed as usize / 3) % 4];
                        let p =
                            Problem::new(kind, shape(1, 1, tokens, dim), band, [layout; 4], seed);
                        check::<f32>(p, isa);
                    }
                }
            }
        }
    }
}

#[test]
fn every_band_of_every_length() {
    for tokens in TOKENS {
        for band in bands(tokens) {
            for kind in [Kind::Capture, Kind::WindowResidual] {
                check::<f32>(
                    Problem::new(kind, shape(1, 1, tokens, 8), band, [Layout::Bhsd; 4], 5),
                    Isa::best(),
                );
            }
        }
    }
}

fn every_layout<T: Element>() {
    let mut shape = shape(2, 4, 70, 20);
    shape.kv_heads = 2;
    shape.v_dim = 9;
    let band = Band {
        half_width: 9,
        text: 5,
        text_at_start: true,
    };
    for isa in Isa::available() {
        for (i, kind) in KINDS.into_iter().enumerate() {
            for n in 0..16 {
                // All pairs of layouts for K and V; Q and the outputs go along.
                let layouts = [
                    LAYOUTS[(n + i) % 4],
                    LAYOUTS[n / 4],
                    LAYOUTS[n % 4],
                    LAYOUTS[(n / 4 + i) % 4],
                ];
                check::<T>(Problem::new(kind, shape, band, layouts, n as u32), isa);
            }
        }
    }
}

/// So long that keys and values are copied in advance.
#[test]
fn long_sequences_in_every_layout() {
    let mut shape = shape(2, 2, 1400, 9);
    shape.kv_heads = 1;
    shape.v_dim = 5;
    let wide = Band::new(650);
    for (n, layout) in LAYOUTS.into_iter().enumerate() {
        for kind in [Kind::Capture, Kind::WindowResidual] {
            let layouts = [layout, layout, LAYOUTS[(n + 1) % 4], layout];
            check::<f32>(
                Problem::new(kind, shape, wide, layouts, n as u32),
                Isa::best(),
            );
            check::<f16>(
                Problem::new(kind, shape, wide, layouts, n as u32),
                Isa::best(),
            );
        }
    }
}

#[test]
fn every_layout_float32() {
    every_layout::<f32>();
}

#[test]
fn every_layout_float16() {
    every_layout::<f16>();
}

#[test]
fn every_layout_bfloat16() {
    every_layout::<bf16>();
}

#[test]
fn half_precision_at_real_widths() {
    for dim in [64, 72] {
        for kind in KINDS {
            let (shape, band) = (shape(1, 2, 257, dim), Band::new(32));
            check::<f16>(
                Problem::new(kind, shape, band, [Layout::Bshd; 4], 1),
                Isa::best(),
            );
            check::<bf16>(
                Problem::new(kind, shape, band, [Layout::Bshd; 4], 2),
                Isa::best(),
            );
        }
    }
}

/// Inputs of one dtype and outputs of another are allowed: each tensor says what it is.
#[test]
fn dtypes_may_differ_between_tensors() {
    let s = shape(1, 2, 33, 16);
    let p = Problem::<f32>::new(Kind::Full, s, Band::new(1), [Layout::Bhsd; 4], 3);
    let k = p.k.convert::<bf16>();
    let mut out: Tensor<f16> = Tensor::new(p.out.dims, Layout::Bshd, || 0.0);
    let a = Attention {
        shape: s,
        scale: 0.25,
        q: p.q.input(),
        k: k.input(),
        v: p.v.input(),
        mask: None,
        out: out.output(),
        mode: Mode::Full,
    };
    let want = oracle::attention(&a).unwrap().out;
    attention(&a, &Sequential).unwrap();
    assert!(errors(&out.values(), &want).0 < 2e-3);
}

#[test]
fn cross_attention_of_any_lengths() {
    for (q_tokens, kv_tokens) in [
        (1, 300),
        (5, 77),
        (130, 1),
        (64, 120),
        (65, 121),
        (200, 333),
    ] {
        for isa in Isa::available() {
            let s = Shape {
                q_tokens,
                kv_tokens,
                ..shape(2, 2, 0, 24)
            };
            check::<f32>(Problem::new(Kind::Full, s, Band::new(0), LAYOUTS, 9), isa);
        }
    }
}

/// Scores that rise along the keys make every block raise the reference; scores that fall never do.
#[test]
fn large_and_drifting_scores() {
    for slope in [-3.0f32, -0.2, 0.2, 3.0] {
        for kind in KINDS {
            let mut p = Problem::<f32>::new(
                kind,
                shape(1, 1, 300, 8),
                Band::new(40),
                [Layout::Bhsd; 4],
                4,
            );
            for (i, k) in p.k.data.iter_mut().enumerate() {
                *k = *k * 0.5 + slope * (i / 8) as f32 * 0.1;
            }
            p.q.data.iter_mut().for_each(|q| *q = q.abs());
            for isa in Isa::available() {
                check(p.clone(), isa);
            }
        }
    }
}

#[test]
fn scales_of_any_sign_and_none() {
    for scale in [-0.5, 0.0, -0.0, 1e-30, 3.0] {
        for kind in KINDS {
            let mut p =
                Problem::<f32>::new(kind, shape(1, 1, 70, 8), Band::new(9), [Layout::Bhsd; 4], 6);
            p.scale = scale;
            for isa in Isa::available() {
                check(p.clone(), isa);
            }
        }
    }
}

fn shapes() -> impl Strategy<Value = (Kind, Shape, Band, [Layout; 4], u32)> {
    let layout = || prop::sample::select(&LAYOUTS[..]);
    (
        prop::sample::select(&KINDS[..]),
        (
            1..3usize,
            1..3usize,
            1..3usize,
            1..200usize,
            0..90usize,
            0..90usize,
        ),
        (0..220usize, 0..220usize, any::<bool>()),
        [layout(), layout(), layout(), layout()],
        any::<u32>(),
    )
        .prop_map(
            |(kind, (batch, group, kv_heads, tokens, head_dim, v_dim), band, layouts, seed)| {
                let shape = Shape {
                    batch,
                    heads: group * kv_heads,
                    kv_heads,
                    q_tokens: tokens,
                    kv_tokens: tokens,
                    head_dim,
                    v_dim,
                };
                let band = Band {
                    half_width: band.0,
                    text: band.1.min(tokens),
                    text_at_start: band.2,
                };
                (kind, shape, band, layouts, seed)
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_shapes((kind, shape, band, layouts, seed) in shapes()) {
        for isa in Isa::available() {
            check::<f32>(Problem::new(kind, shape, band, layouts, seed), isa);
        }
        check::<f16>(Problem::new(kind, shape, band, layouts, seed), Isa::best());
    }
}
