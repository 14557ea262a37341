//! What holds between results: across pools, modes and steps, for odd sizes and for numbers that are not finite.

mod common;

use std::sync::Mutex;

use common::*;
use ditfastattn_kernels::*;
use half::{bf16, f16};

/// Runs tasks last to first.
struct Backwards;

impl Parallel for Backwards {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).rev().for_each(task);
    }
}

/// Counts tasks while running them.
struct Counting(Mutex<usize>);

impl Parallel for Counting {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        *self.0.lock().unwrap() += tasks;
        Sequential.run(tasks, task);
    }
}

/// Whether two results are the same, bit for bit.
fn same(x: &[f32], y: &[f32]) -> bool {
    x.len() == y.len() && x.iter().zip(y).all(|(x, y)| x.to_bits() == y.to_bits())
}

fn any_pool<T: Element>(isa: Isa, products: Products) {
    for kind in KINDS {
        let band = Band {
            half_width: 20,
            text: 7,
            text_at_start: false,
        };
        let mut p = Problem::<T>::new(kind, shape(2, 3, 300, 24), band, [Layout::Bshd; 4], 8);
        p.products = products;
        let first = p.run(isa, &Sequential);
        for pool in [
            &Backwards as &dyn Parallel,
            &Threads(2),
            &Threads(5),
            &Threads(1000),
        ] {
            // A residual that is read was made before; one that is written is overwritten.
            let again = p.run(isa, pool);
            assert!(same(&first.0, &again.0));
            assert!(same(
                &first.1.clone().unwrap_or_default(),
                &again.1.unwrap_or_default()
            ));
        }
    }
}

#[test]
fn results_do_not_depend_on_the_pool() {
    for isa in Isa::available() {
        any_pool::<f32>(isa, Products::Float32);
    }
    any_pool::<f16>(Isa::best(), Products::Bfloat16);
    any_pool::<bf16>(Isa::best(), Products::Bfloat16);
}

#[test]
fn products_in_bfloat16_are_for_half_precision_and_machines_that_have_them() {
    fn differ<T: Element>(isa: Isa) -> bool {
        let s = shape(1, 2, 150, 24);
        let mut p = Problem::<T>::new(Kind::Full, s, Band::new(9), [Layout::Bshd; 4], 8);
        let plain = p.run(isa, &Sequential).0;
        p.products = Products::Bfloat16;
        !same(&plain, &p.run(isa, &Sequential).0)
    }
    for isa in Isa::available() {
        let there = matrix_kernels()
            .iter()
            .any(|kernel| kernel.isa == isa && kernel.precision == "bf16");
        assert!(!differ::<f32>(isa));
        assert_eq!(differ::<f16>(isa), there, "{isa:?}");
        assert_eq!(differ::<bf16>(isa), there, "{isa:?}");
    }
    // One input in float32 is enough.
    let s = shape(1, 2, 150, 24);
    let p = Problem::<bf16>::new(Kind::Full, s, Band::new(9), [Layout::Bshd; 4], 8);
    let k = p.k.convert::<f32>();
    let [plain, other] = [Products::Float32, Products::Bfloat16].map(|products| {
        let mut out = p.out.clone();
        let a = Attention {
            shape: s,
            scale: p.scale,
            q: p.q.input(),
            k: k.input(),
            v: p.v.input(),
            mask: None,
            out: out.output(),
            mode: Mode::Full,
        };
        attention_in(&a, &Sequential, products).unwrap();
        out.values()
    });
    assert!(same(&plain, &other));
}

#[test]
fn work_is_split_into_independent_tasks() {
    let mut p = Problem::<f32>::new(
        Kind::Full,
        shape(2, 4, 256, 8),
        Band::new(1),
        [Layout::Bhsd; 4],
        8,
    );
    let pool = Counting(Mutex::new(0));
    p.run(Isa::best(), &pool);
    let tasks = pool.0.into_inner().unwrap();
    assert!(
        (8..=32).contains(&tasks),
        "{tasks} tasks for 8 planes of 4 blocks"
    );
}

/// R = O − W: adding the window back gives O again, within one rounding of each.
fn capture_then_window<T: Element>(step: f32, isas: &[Isa], products: Products) {
    for band in [
        Band::new(31),
        Band {
            half_width: 25,
            text: 40,
            text_at_start: true,
        },
    ] {
        for &isa in isas {
            let mut p = Problem::<T>::new(
                Kind::Capture,
                shape(1, 2, 250, 72),
                band,
                [Layout::Bshd; 4],
                2,
            );
            p.products = products;
            let (full, residual) = p.run(isa, &Sequential);
            p.kind = Kind::Window;
            let (window, _) = p.run(isa, &Sequential);
            p.kind = Kind::WindowResidual;
            let (shared, _) = p.run(isa, &Sequential);
            p.kind = Kind::Full;
            let (plain, _) = p.run(isa, &Sequential);
            let residual = residual.unwrap();
            assert!(
                residual.iter().any(|r| r.abs() > 0.01),
                "a residual of nothing shows nothing"
            );
            for i in 0..full.len() {
                let size = full[i]
                    .abs()
                    .max(window[i].abs())
                    .max(residual[i].abs())
                    .max(0.25);
                assert!((window[i] + residual[i] - full[i]).abs() <= 2.0 * step * size);
                assert!((shared[i] - full[i]).abs() <= 2.0 * step * size);
                assert!((plain[i] - full[i]).abs() <= 2.0 * step * size);
            }
        }
    }
}

#[test]
fn window_and_residual_give_full_attention_float32() {
    // Sums in another order differ by a few roundings.
    capture_then_window::<f32>(8.0 * f32::EPSILON, &Isa::available(), Products::Float32);
}

#[test]
fn window_and_residual_give_full_attention_float16() {
    capture_then_window::<f16>(1.0 / 1024.0, &Isa::available(), Products::Float32);
}

#[test]
fn window_and_residual_give_full_attention_bfloat16() {
    capture_then_window::<bf16>(1.0 / 128.0, &Isa::available(), Products::Float32);
}

#[test]
fn window_and_residual_give_full_attention_with_products_in_bfloat16() {
    // Probabilities are rounded alike in each mode, so this is no worse than with products in float32.
    capture_then_window::<f16>(1.0 / 1024.0, &[Isa::best()], Products::Bfloat16);
    capture_then_window::<bf16>(1.0 / 128.0, &[Isa::best()], Products::Bfloat16);
}

#[test]
fn a_band_over_everything_is_full_attention_without_residual() {
    for band in [
        Band::new(199),
        Band {
            half_width: 1,
            text: 200,
            text_at_start: true,
        },
    ] {
        let mut p = Problem::<f32>::new(
            Kind::Capture,
            shape(1, 2, 200, 40),
            band,
            [Layout::Bhsd; 4],
            2,
        );
        let (full, residual) = p.run(Isa::best(), &Sequential);
        p.kind = Kind::Window;
        assert!(same(&full, &p.run(Isa::best(), &Sequential).0));
        assert!(residual.unwrap().iter().all(|&r| r == 0.0));
    }
}

#[test]
fn a_query_that_sees_one_key_returns_its_value() {
    for isa in Isa::available() {
        let mut p = Problem::<f32>::new(
            Kind::Window,
            shape(1, 1, 150, 20),
            Band::new(0),
            [Layout::Bhsd; 4],
            1,
        );
        let (out, _) = p.run(isa, &Sequential);
        for (x, v) in out.iter().zip(p.v.values()) {
            assert!((x - v).abs() <= 2.0 * f32::EPSILON * v.abs(), "{x} {v}");
        }
    }
    // Rounded probabilities add up to 1 too: what is summed is what is multiplied.
    let s = shape(1, 1, 150, 20);
    let mut p = Problem::<bf16>::new(Kind::Window, s, Band::new(0), [Layout::Bhsd; 4], 1);
    p.products = Products::Bfloat16;
    assert_eq!(p.run(Isa::best(), &Sequential).0, p.v.values());
    (p.kind, p.v.data) = (Kind::Full, vec![bf16::from_f32(1.7); 150 * 20]);
    assert_eq!(p.run(Isa::best(), &Sequential).0, p.v.values());
}

#[test]
fn gaps_between_elements_stay_untouched() {
    for kind in KINDS {
        let mut p =
            Problem::<f32>::new(kind, shape(2, 2, 70, 9), Band::new(5), [Layout::Gaps; 4], 1);
        let mut own = vec![false; p.out.data.len()];
        for b in 0..2 {
            for h in 0..2 {
                for n in 0..70 {
                    for c in 0..9 {
                        own[p.out.at([b, h, n, c])] = true;
                    }
                }
            }
        }
        for t in [&mut p.out, &mut p.residual] {
            t.data
                .iter_mut()
                .zip(&own)
                .filter(|(_, own)| !**own)
                .for_each(|(x, _)| *x = 123.0);
        }
        p.run(Isa::best(), &Threads(3));
        for t in [&p.out, &p.residual] {
            assert!(t.data.iter().zip(&own).all(|(x, own)| *own || *x == 123.0));
        }
    }
}

#[test]
fn empty_tensors_are_no_work() {
    let base = shape(2, 2, 4, 3);
    let empty = [
        Shape { batch: 0, ..base },
        Shape {
            heads: 0,
            kv_heads: 0,
            ..base
        },
        Shape {
            q_tokens: 0,
            kv_tokens: 0,
            ..base
        },
        Shape { v_dim: 0, ..base },
    ];
    for s in empty {
        for kind in KINDS {
            let (out, _) = Problem::<f32>::new(kind, s, Band::new(1), [Layout::Bhsd; 4], 1)
                .run(Isa::best(), &Sequential);
            assert!(out.is_empty());
        }
    }
}

#[test]
fn no_keys_give_zeros_and_no_channels_give_the_mean() {
    let s = Shape {
        kv_tokens: 0,
        ..shape(1, 2, 5, 3)
    };
    let (out, _) = Problem::<f32>::new(Kind::Full, s, Band::new(1), [Layout::Bhsd; 4], 1)
        .run(Isa::best(), &Sequential);
    assert_eq!(out, [0.0; 30]);

    let s = Shape {
        head_dim: 0,
        ..shape(1, 1, 4, 2)
    };
    let mut p = Problem::<f32>::new(Kind::Full, s, Band::new(1), [Layout::Bhsd; 4], 1);
    p.v.data = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
    assert_eq!(p.run(Isa::best(), &Sequential).0, [4.0, 5.0].repeat(4));
}

/// Puts `bad` at one element of one input and compares which results are not finite with the definition.
fn spoil<T: Element>(
    kind: Kind,
    band: Band,
    isa: Isa,
    products: Products,
    bad: f32,
    which: usize,
    token: usize,
) {
    let mut p = Problem::<T>::new(kind, shape(1, 1, 200, 8), band, [Layout::Bhsd; 4], 3);
    p.products = products;
    let tolerance = if T::DTYPE == DType::F32 { 1e-4 } else { 0.05 };
    let t = match which {
        0 => &mut p.q,
        1 => &mut p.k,
        _ => &mut p.v,
    };
    let at = t.at([0, 0, token, 5]);
    t.data[at] = T::from_f32(bad);
    let want = p.oracle();
    let got = p.run(isa, &Sequential);
    let compare = |got: &[f32], want: &[f64], what: &str| {
        for (i, (x, y)) in got.iter().zip(want).enumerate() {
            let same = (x.is_nan() && y.is_nan())
                || f64::from(*x) == *y
                || (x.is_finite() && y.is_finite() && (f64::from(*x) - y).abs() < tolerance);
            assert!(
                same,
                "{what} [{}, {}] is {x}, by definition {y}: {kind:?} {band:?} {isa:?} {bad} in {which} at {token}",
                i / 8,
                i % 8
            );
        }
    };
    compare(&got.0, &want.out, "output");
    if let (Some(got), Some(want)) = (&got.1, &want.residual) {
        compare(got, want, "residual");
    }
}

#[test]
fn numbers_that_are_not_finite_go_where_they_go_by_definition() {
    let text = Band {
        half_width: 20,
        text: 11,
        text_at_start: false,
    };
    for isa in Isa::available() {
        for kind in KINDS {
            for band in [Band::new(20), text] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    for which in 0..3 {
                        for token in [0, 63, 64, 90, 130, 199] {
                            spoil::<f32>(kind, band, isa, Products::Float32, bad, which, token);
                        }
                    }
                }
            }
        }
    }
    let isa = Isa::best();
    for kind in KINDS {
        for band in [Band::new(20), Band::new(21), text] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for which in 0..3 {
                    // Even and odd ones, which share a pair with a key that others see; 189 is the first of the text.
                    for token in [0, 63, 64, 90, 131, 188, 199] {
                        let products = Products::Bfloat16;
                        spoil::<bf16>(kind, band, isa, products, bad, which, token);
                        spoil::<f16>(kind, band, isa, products, bad, which, token);
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_of_nothing_but_minus_infinity_is_nan() {
    for isa in Isa::available() {
        let mut p = Problem::<f32>::new(
            Kind::Full,
            shape(1, 1, 130, 1),
            Band::new(1),
            [Layout::Bhsd; 4],
            3,
        );
        p.k.data.fill(f32::NEG_INFINITY);
        p.q.data.fill(1.0);
        let (out, _) = p.run(isa, &Sequential);
        assert!(
            out.iter().all(|x| x.is_nan()),
            "−∞ − −∞ is NaN in the definition"
        );
    }
}

#[test]
fn a_residual_that_is_read_may_be_the_output() {
    // The product keeps residuals apart, but a raw caller may reuse memory: each block reads before it writes, once, also
    // where a value that is not finite makes it compute a block again.
    for spoilt in [false, true] {
        residual_in_place(spoilt, shape(1, 2, 200, 24));
        // Several blocks to a task, of which one is computed again.
        residual_in_place(spoilt, shape(2, 16, 400, 8));
    }
}

fn residual_in_place(spoilt: bool, shape: Shape) {
    let mut p = Problem::<f32>::new(
        Kind::WindowResidual,
        shape,
        Band::new(9),
        [Layout::Bhsd; 4],
        3,
    );
    if spoilt {
        p.v.data[0] = f32::INFINITY;
    }
    let want = p.run(Isa::selected(), &Sequential).0;
    assert!(want.iter().any(|x| x.is_finite()));
    let mut both = p.residual.clone();
    let data = both.data.as_mut_ptr().cast::<u8>();
    let a = Attention {
        shape: p.shape,
        scale: p.scale,
        q: p.q.input(),
        k: p.k.input(),
        v: p.v.input(),
        mask: None,
        // SAFETY: the tensor has the shape's elements; each is read and then written by the same task.
        out: unsafe { Output::from_raw(data, DType::F32, both.strides) },
        mode: Mode::Window {
            band: p.band,
            // SAFETY: as above.
            residual: Some(unsafe { Input::from_raw(data, DType::F32, both.strides) }),
        },
    };
    attention(&a, &Threads(2)).unwrap();
    assert!(same(&want, &both.values()));
}

#[test]
fn a_band_covers_a_sequence_if_every_query_sees_every_key() {
    for tokens in 0..9 {
        for half_width in [0, 1, 2, 3, 7, 8, usize::MAX] {
            for text in 0..=tokens {
                for text_at_start in [false, true] {
                    let band = Band {
                        half_width,
                        text,
                        text_at_start,
                    };
                    let all =
                        (0..tokens * tokens).all(|at| band.sees(at / tokens, at % tokens, tokens));
                    assert_eq!(band.covers(tokens), all, "{band:?} {tokens}");
                }
            }
        }
    }
}

#[test]
fn a_residual_that_is_not_finite_is_reported() {
    const N: usize = 300;
    let strides = Strides::bhsd(1, N, 8);
    let zeros = vec![f16::ZERO; N * 8];
    // Beyond the band of query 0 is one value; it reaches O, not W.
    let report = |value: f32, mode: fn(Band, Output<'static>) -> Mode<'static>| {
        let mut v = vec![0f32; N * 8];
        v[200 * 8] = value;
        let (mut out, residual) = (vec![0f32; N * 8], vec![f16::ZERO; N * 8].leak());
        let residual = Output::from_slice(residual, strides);
        let call = Attention {
            shape: Shape {
                batch: 1,
                heads: 1,
                kv_heads: 1,
                q_tokens: N,
                kv_tokens: N,
                head_dim: 8,
                v_dim: 8,
            },
            scale: 1.0,
            q: Input::from_slice(&zeros, strides),
            k: Input::from_slice(&zeros, strides),
            v: Input::from_slice(&v, strides),
            mask: None,
            out: Output::from_slice(&mut out, strides),
            mode: mode(Band::new(10), residual),
        };
        (attention(&call, &Threads(2)).unwrap()).residual_is_finite
    };
    let capture: fn(Band, Output<'static>) -> Mode<'static> =
        |band, residual| Mode::FullCapture { band, residual };
    assert!(report(1.0, capture));
    assert!(!report(f32::INFINITY, capture));
    assert!(!report(f32::NAN, capture));
    // Finite in float32, but not in the residual's float16.
    assert!(!report(1e9, capture));
    assert!(report(f32::INFINITY, |_, _| Mode::Full));
}
