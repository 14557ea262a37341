//! The CUDA kernels, emulated on the CPU under sanitizers, against the definition in float64.

mod common;

use std::mem::offset_of;
use std::path::PathBuf;
use std::sync::LazyLock;

use common::*;
use ditfastattn_emulator::{Buffer, Process, Sources};
use ditfastattn_kernels::cuda::{self, AttentionMode, AttentionParams, Limits, Variant, choose};
use ditfastattn_kernels::*;
use half::{bf16, f16};

static PROGRAM: LazyLock<PathBuf> = LazyLock::new(|| Sources::new().program());

/// An A100's.
const LARGE: Limits = Limits {
    shared_bytes: 163 << 10,
    tensor_cores: true,
};

fn bytes<T>(values: &[T]) -> &[u8] {
    // SAFETY: elements are numbers without padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

fn numbers<T: Element>(bytes: &[u8]) -> Vec<T> {
    let chunks = bytes.chunks_exact(size_of::<T>());
    // SAFETY: every bit pattern is an element; the chunk has its size.
    chunks
        .map(|chunk| unsafe { chunk.as_ptr().cast::<T>().read_unaligned() })
        .collect()
}

/// What a kernel made of a problem.
struct Outcome {
    variant: Variant,
    out: Vec<f32>,
    residual: Option<Vec<f32>>,
    non_finite: bool,
}

/// Runs the kernel that the product would choose.
fn run<T: Element>(
    process: &mut Process,
    p: &mut Problem<T>,
    limits: &Limits,
    adjust: impl FnOnce(&mut cuda::Launch),
) -> Result<Outcome, String> {
    let capture = p.kind == Kind::Capture;
    let chosen = p.call(|a| choose(a, limits, std::ptr::null_mut()));
    let Some(mut launch) = chosen.map_err(|refusal| refusal.to_string())? else {
        return Err("nothing to launch".into());
    };
    adjust(&mut launch);
    let flag = 0u32;
    let mut buffers = vec![
        Buffer {
            pointer_at: offset_of!(AttentionParams, q),
            contents: bytes(&p.q.data),
            written: false,
        },
        Buffer {
            pointer_at: offset_of!(AttentionParams, k),
            contents: bytes(&p.k.data),
            written: false,
        },
        Buffer {
            pointer_at: offset_of!(AttentionParams, v),
            contents: bytes(&p.v.data),
            written: false,
        },
        Buffer {
            pointer_at: offset_of!(AttentionParams, out),
            contents: bytes(&p.out.data),
            written: true,
        },
        Buffer {
            pointer_at: offset_of!(AttentionParams, non_finite),
            contents: bytes(std::slice::from_ref(&flag)),
            written: true,
        },
    ];
    if matches!(p.kind, Kind::Capture | Kind::WindowResidual) {
        buffers.push(Buffer {
            pointer_at: offset_of!(AttentionParams, residual),
            contents: bytes(&p.residual.data),
            written: capture,
        });
    }
    if let Some(mask) = &p.mask {
        let contents = match &mask.data {
            MaskData::Boolean(data) => bytes(data),
            MaskData::Additive(data) => bytes(data),
        };
        buffers.push(Buffer {
            pointer_at: offset_of!(AttentionParams, mask),
            contents,
            written: false,
        });
    }
    let mut back = process.launch(&launch.variant, launch.blocks, &launch.params, &buffers)?;
    let mut tensor = |of: &Tensor<T>| {
        let mut of = of.clone();
        of.data = numbers(&back.remove(0));
        of.values()
    };
    let out = tensor(&p.out);
    let non_finite = back.remove(0) != [0; 4];
    let residual = capture.then(|| {
        let mut of = p.residual.clone();
        of.data = numbers(&back.remove(0));
        of.values()
    });
    Ok(Outcome {
        variant: launch.variant,
        out,
        residual,
        non_finite,
    })
}

/// Runs and compares; returns which kernel it was.
fn check<T: Element>(process: &mut Process, mut p: Problem<T>, limits: &Limits) -> Variant {
    let (want, naive) = (p.oracle(), p.naive());
    let what = format!("{:?} {:?} {:?}", p.kind, p.shape, p.band);
    let got =
        run(process, &mut p, limits, |_| {}).unwrap_or_else(|error| panic!("{what}: {error}"));
    let what = format!("{} {what}", got.variant.name());
    compare::<T>(&got.out, &naive.0, &want.out, &what);
    if let (Some(got), Some(naive), Some(want)) = (got.residual, naive.1, want.residual) {
        compare::<T>(&got, &naive, &want, &format!("residual, {what}"));
    }
    got.variant
}

/// Bands worth trying on a sequence of `tokens`.
fn bands(tokens: usize) -> Vec<Band> {
    let band = |half_width, text, text_at_start| Band {
        half_width,
        text,
        text_at_start,
    };
    let eighth = (tokens / 8).max(1);
    vec![
        band(eighth, 0, false),
        band(eighth, tokens / 3, false),
        band(0, 0, false),
        band(eighth, 1, true),
        band(tokens / 2, tokens / 5, true),
        band(usize::MAX, 0, false),
        band(1, tokens, false),
    ]
}

fn uses_tensor_cores(variant: &Variant) -> bool {
    matches!(variant, Variant::TensorCore { .. })
}

const TOKENS: [usize; 8] = [1, 2, 17, 63, 64, 65, 130, 257];

fn every_mode_and_size<T: Element>(dims: &[usize], queries: usize) {
    let mut process = Process::start(&PROGRAM);
    let mut turn = 0;
    for &dim in dims {
        for tokens in TOKENS {
            for kind in KINDS {
                turn += 1;
                let bands = bands(tokens);
                let band = bands[turn % bands.len()];
                let layout = [Layout::Bhsd, Layout::Bshd][turn % 2];
                let mut p = Problem::<T>::new(
                    kind,
                    shape(1, 2, tokens, dim),
                    band,
                    [layout; 4],
                    turn as u32,
                );
                let (want, naive) = (p.oracle(), p.naive());
                let got = run(&mut process, &mut p, &LARGE, |launch| {
                    widen(launch, queries)
                })
                .unwrap_or_else(|error| panic!("{kind:?} {tokens} {dim} {band:?}: {error}"));
                let what = format!("{} {kind:?} {tokens} {band:?}", got.variant.name());
                assert!(uses_tensor_cores(&got.variant), "{what}");
                assert_close::<T>(&got.out, &naive.0, &want.out, &what);
                if let (Some(got), Some(naive), Some(want)) = (got.residual, naive.1, want.residual)
                {
                    assert_close::<T>(&got, &naive, &want, &format!("residual, {what}"));
                }
                assert!(!got.non_finite, "{what}");
            }
        }
    }
}

/// Replaces blocks of 64 queries, which short sequences get, by those of long ones.
fn widen(launch: &mut cuda::Launch, wanted: usize) {
    if let Variant::TensorCore {
        queries,
        masked: false,
        ..
    } = &mut launch.variant
    {
        let planes = launch.blocks / (launch.params.q_tokens as usize).div_ceil(*queries) as u32;
        *queries = wanted;
        launch.blocks = (launch.params.q_tokens as usize).div_ceil(wanted) as u32 * planes;
    }
}

#[test]
fn every_mode_and_size_float16_in_blocks_of_64() {
    every_mode_and_size::<f16>(&cuda::DIMS, 64);
}

#[test]
fn every_mode_and_size_float16_in_blocks_of_128() {
    every_mode_and_size::<f16>(&cuda::DIMS, 128);
}

#[test]
fn every_mode_and_size_bfloat16_in_blocks_of_64() {
    every_mode_and_size::<bf16>(&cuda::DIMS, 64);
}

#[test]
fn every_mode_and_size_bfloat16_in_blocks_of_128() {
    every_mode_and_size::<bf16>(&cuda::DIMS, 128);
}

/// Several blocks of queries and keys, batch, groups, and a band as in the paper.
#[test]
fn longer_sequences_with_groups() {
    let mut process = Process::start(&PROGRAM);
    for (kind, dim) in KINDS.into_iter().zip([72, 64, 72, 128]) {
        for text in [0, 77] {
            let mut s = shape(2, 4, 500, dim);
            s.kv_heads = 2;
            let band = Band {
                half_width: 52,
                text,
                text_at_start: text % 2 == 0,
            };
            let p = Problem::<bf16>::new(kind, s, band, [Layout::Bshd; 4], 7);
            assert!(uses_tensor_cores(&check(&mut process, p, &LARGE)));
        }
    }
}

#[test]
fn every_mode_float32_and_odd_shapes_on_plain_cores() {
    let mut process = Process::start(&PROGRAM);
    let mut turn = 0;
    for dim in [1, 18, 64, 72, 130, 256] {
        for tokens in [1, 31, 33, 100] {
            for kind in KINDS {
                turn += 1;
                let bands = bands(tokens);
                let band = bands[turn % bands.len()];
                let mut s = shape(1, 2, tokens, dim);
                s.v_dim = (dim * 2 / 3).max(1);
                let layouts = [0, 1, 2, 3].map(|i| LAYOUTS[(turn + i) % 4]);
                check(
                    &mut process,
                    Problem::<f32>::new(kind, s, band, layouts, turn as u32),
                    &LARGE,
                );
            }
        }
    }
    for kind in KINDS {
        let s = shape(2, 2, 70, 20);
        check(
            &mut process,
            Problem::<f16>::new(kind, s, Band::new(9), LAYOUTS, 1),
            &LARGE,
        );
        check(
            &mut process,
            Problem::<bf16>::new(kind, s, Band::new(9), LAYOUTS, 2),
            &LARGE,
        );
    }
}

#[test]
fn cross_attention_of_any_lengths() {
    let mut process = Process::start(&PROGRAM);
    for (q_tokens, kv_tokens) in [(1, 300), (5, 77), (130, 1), (65, 129)] {
        let s = Shape {
            q_tokens,
            kv_tokens,
            ..shape(2, 2, 0, 64)
        };
        let p = |layout| Problem::<f16>::new(Kind::Full, s, Band::new(0), [layout; 4], 9);
        assert!(uses_tensor_cores(&check(
            &mut process,
            p(Layout::Bshd),
            &LARGE
        )));
        check(&mut process, p(Layout::Gaps), &LARGE);
    }
    let none = Shape {
        q_tokens: 3,
        ..shape(2, 2, 0, 64)
    };
    check(
        &mut process,
        Problem::<f16>::new(Kind::Full, none, Band::new(0), [Layout::Bshd; 4], 9),
        &LARGE,
    );
}

fn masks<T: Element>(dims: &[usize]) {
    let mut process = Process::start(&PROGRAM);
    let mut seed = 0;
    let (b, h, n) = (2, 2, 150);
    for &dim in dims {
        for kind in KINDS {
            for dims in [[b, h, n, n], [1, 1, n, n], [b, 1, 1, n], [b, h, n, 1]] {
                for boolean in [false, true] {
                    seed += 1;
                    let band = Band {
                        half_width: n / 8,
                        text: seed as usize % 3 * 10,
                        text_at_start: false,
                    };
                    let mut p =
                        Problem::<T>::new(kind, shape(b, h, n, dim), band, [Layout::Bshd; 4], seed);
                    let (mut x, mut y) = (noise(seed), noise(seed + 1));
                    let mut mask = TestMask::new(dims, 1 + seed as usize % 2, boolean, || {
                        if x() < -0.8 { f32::NEG_INFINITY } else { y() }
                    });
                    mask.guarded = seed % 4 < 2;
                    p.mask = Some(mask);
                    check(&mut process, p, &LARGE);
                }
            }
        }
    }
}

#[test]
fn masks_float16() {
    masks::<f16>(&[72]);
}

#[test]
fn masks_bfloat16() {
    masks::<bf16>(&[64]);
}

#[test]
fn masks_float32() {
    masks::<f32>(&[24]);
}

/// Large scores of either sign, which make the running maximum jump.
#[test]
fn large_and_drifting_scores() {
    let mut process = Process::start(&PROGRAM);
    for slope in [-3.0f32, 0.2, 3.0] {
        for kind in KINDS {
            let mut p = Problem::<f16>::new(
                kind,
                shape(1, 1, 300, 64),
                Band::new(40),
                [Layout::Bhsd; 4],
                4,
            );
            for (i, k) in p.k.data.iter_mut().enumerate() {
                *k = f16::from_f32(k.to_f32() * 0.5 + slope * (i / 64) as f32 * 0.02);
            }
            check(&mut process, p, &LARGE);
        }
    }
}

#[test]
fn a_residual_that_is_not_finite_is_reported() {
    let mut process = Process::start(&PROGRAM);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut p = Problem::<f16>::new(
            Kind::Capture,
            shape(1, 2, 100, 64),
            Band::new(10),
            [Layout::Bhsd; 4],
            1,
        );
        p.v.data[77 * 64] = f16::from_f32(bad);
        assert!(
            run(&mut process, &mut p, &LARGE, |_| {})
                .unwrap()
                .non_finite
        );
    }
}

/// Any multiple of 8 works, though only some are compiled ahead of time.
#[test]
fn other_head_dimensions() {
    let dims = [8, 24, 40, 48, 88, 112, 120];
    let variant = |dim, mode| Variant::TensorCore {
        dtype: DType::BF16,
        dim,
        queries: 64,
        mode,
        masked: false,
    };
    let variants = dims
        .into_iter()
        .flat_map(|dim| AttentionMode::ALL.map(|mode| variant(dim, mode)));
    let program = Sources::new().only(variants).program();
    let mut process = Process::start(&program);
    for dim in dims {
        for kind in KINDS {
            let p = Problem::<bf16>::new(
                kind,
                shape(1, 1, 90, dim),
                Band::new(11),
                [Layout::Bhsd; 4],
                3,
            );
            assert!(uses_tensor_cores(&check(&mut process, p, &LARGE)));
        }
    }
}

/// What mistakes are planted in: a ragged sequence in blocks of 64 queries.
fn victim(kind: Kind) -> Problem<f16> {
    Problem::new(
        kind,
        shape(1, 1, 100, 72),
        Band::new(12),
        [Layout::Bhsd; 4],
        1,
    )
}

/// Runs a kernel with `new` in place of `old`.
fn planted(mode: AttentionMode, file: &str, old: &str, new: &str) -> Result<Outcome, String> {
    let variant = Variant::TensorCore {
        dtype: DType::F16,
        dim: 72,
        queries: 64,
        mode,
        masked: false,
    };
    let program = Sources::new()
        .only([variant])
        .with(file, old, new)
        .program();
    let kind = match mode {
        AttentionMode::Full => Kind::Full,
        AttentionMode::Capture => Kind::Capture,
        AttentionMode::Window => Kind::WindowResidual,
    };
    run(
        &mut Process::start(&program),
        &mut victim(kind),
        &LARGE,
        |_| {},
    )
}

/// Whether the comparison of the other tests fails for what a capture kernel made of [`victim`].
fn is_wrong(got: &Outcome) -> bool {
    let mut p = victim(Kind::Capture);
    let (want, naive) = (p.oracle(), p.naive());
    let same = std::panic::catch_unwind(|| {
        assert_close::<f16>(&got.out, &naive.0, &want.out, "out");
        assert_close::<f16>(
            got.residual.as_ref().unwrap(),
            naive.1.as_ref().unwrap(),
            want.residual.as_ref().unwrap(),
            "residual",
        );
    });
    same.is_err()
}

#[test]
fn nothing_is_wrong_where_nothing_is_planted() {
    // The same text: what the tests below see comes from what they plant.
    let line = "apart <= half_width &&";
    let got =
        planted(AttentionMode::Capture, "band.cuh", line, line).expect("no sanitizer objects");
    assert!(!is_wrong(&got));
}

#[test]
fn a_wrong_index_is_caught() {
    for (file, old, new) in [
        (
            "attention.cuh",
            "(lane & 7) + (lane >> 4) * 8",
            "(lane & 7) + ((lane >> 4) ^ 1) * 8",
        ),
        (
            "band.cuh",
            "apart <= half_width &&",
            "apart < half_width &&",
        ),
    ] {
        let got = planted(AttentionMode::Capture, file, old, new).expect("it computes something");
        assert!(is_wrong(&got), "{new} was not caught");
    }
}

#[test]
fn a_store_out_of_bounds_is_caught() {
    let error = planted(
        AttentionMode::Capture,
        "attention.cuh",
        "if (query < p.q_tokens) {",
        "if (query <= p.q_tokens) {",
    )
    .err();
    let error = error.expect("the sanitizer ends the process");
    assert!(error.contains("heap-buffer-overflow"), "{error}");
}

#[test]
fn a_read_of_shared_memory_out_of_bounds_is_caught() {
    // V is the last thing in a full kernel's shared memory.
    let error = planted(
        AttentionMode::Full,
        "attention.cuh",
        "v_smem + (step * 16 + (lane & 15)) * ROW",
        "v_smem + (step * 64 + (lane & 15)) * ROW",
    )
    .err();
    let error = error.expect("the sanitizer ends the process");
    assert!(error.contains("heap-buffer-overflow"), "{error}");
}

#[test]
fn a_missing_wait_is_caught() {
    let got = planted(
        AttentionMode::Capture,
        "attention.cuh",
        "            copy_wait<0>();\n            sync_block();\n            load_tile_async(v_smem",
        "            sync_block();\n            load_tile_async(v_smem",
    );
    assert!(is_wrong(&got.expect("it computes something")));
}

/// Which kernel a call gets.
#[test]
fn the_choice_of_kernels() {
    let of = |p: &mut Problem<f16>, limits: &Limits| {
        p.call(|a| choose(a, limits, std::ptr::null_mut()))
            .unwrap()
            .unwrap()
            .variant
    };
    let problem = |kind, tokens, dim, layout| {
        Problem::<f16>::new(kind, shape(1, 1, tokens, dim), Band::new(3), [layout; 4], 1)
    };
    let queries = |variant: Variant| match variant {
        Variant::TensorCore { queries, .. } => Some(queries),
        _ => None,
    };
    assert_eq!(
        queries(of(&mut problem(Kind::Full, 2048, 72, Layout::Bshd), &LARGE)),
        Some(64)
    );
    assert_eq!(
        queries(of(&mut problem(Kind::Full, 2049, 72, Layout::Bshd), &LARGE)),
        Some(128)
    );
    // 99 KiB, as on devices of compute capability 8.6, hold no window output of 128 queries with 128 channels.
    let small = Limits {
        shared_bytes: 99 << 10,
        ..LARGE
    };
    assert_eq!(
        queries(of(
            &mut problem(Kind::Capture, 2049, 128, Layout::Bshd),
            &small
        )),
        Some(64)
    );
    assert_eq!(
        queries(of(&mut problem(Kind::Full, 100, 72, Layout::Bhds), &LARGE)),
        None
    );
    assert_eq!(
        queries(of(&mut problem(Kind::Full, 100, 36, Layout::Bshd), &LARGE)),
        None
    );
    let old = Limits {
        tensor_cores: false,
        ..LARGE
    };
    assert_eq!(
        queries(of(&mut problem(Kind::Full, 100, 72, Layout::Bshd), &old)),
        None
    );
    let mut negative = problem(Kind::Full, 100, 72, Layout::Bshd);
    negative.scale = -1.0;
    assert_eq!(queries(of(&mut negative, &LARGE)), None);
    let wide = problem(Kind::Full, 3, 264, Layout::Bshd)
        .call(|a| choose(a, &LARGE, std::ptr::null_mut()).err());
    assert_eq!(wide, Some(cuda::Refusal::Wide(264)));
}
