//! Calls that do not make sense are refused before anything is written, by messages that name what is wrong.

mod common;

use common::*;
use ditfastattn_kernels::*;

fn refuse(change: impl FnOnce(&mut Problem<f32>)) -> KernelError {
    let mut p = Problem::<f32>::new(
        Kind::Window,
        shape(1, 4, 6, 3),
        Band::new(1),
        [Layout::Bhsd; 4],
        1,
    );
    change(&mut p);
    let before = p.out.data.clone();
    let error = p
        .call(|a| attention(a, &Sequential))
        .expect_err("should be refused");
    assert_eq!(
        p.call(oracle::attention).expect_err("by the oracle too"),
        error
    );
    assert_eq!(before, p.out.data);
    error
}

#[test]
fn heads_that_cannot_be_shared() {
    let e = refuse(|p| p.shape.kv_heads = 3);
    assert_eq!(
        e,
        KernelError::Heads {
            heads: 4,
            kv_heads: 3
        }
    );
    assert!(
        e.to_string()
            .contains("4 query heads cannot share 3 key/value heads"),
        "{e}"
    );
    assert!(matches!(
        refuse(|p| p.shape.kv_heads = 0),
        KernelError::Heads { .. }
    ));
}

#[test]
fn a_band_across_two_sequences() {
    let e = refuse(|p| p.shape.q_tokens = 5);
    assert_eq!(
        e,
        KernelError::CrossBand {
            q_tokens: 5,
            kv_tokens: 6
        }
    );
}

#[test]
fn more_text_than_tokens() {
    let e = refuse(|p| p.band.text = 7);
    assert_eq!(e, KernelError::Text { text: 7, tokens: 6 });
}

#[test]
fn slices_that_are_too_short() {
    let tensor = |e: &KernelError| match e {
        KernelError::OutOfBounds { tensor, len, .. } => (*tensor, *len),
        _ => panic!("{e}"),
    };
    assert_eq!(tensor(&refuse(|p| p.q.data.truncate(71))), ("query", 71));
    assert_eq!(tensor(&refuse(|p| p.k.data.truncate(71))), ("key", 71));
    assert_eq!(tensor(&refuse(|p| p.v.data.truncate(71))), ("value", 71));
    assert_eq!(tensor(&refuse(|p| p.out.data.truncate(71))), ("output", 71));
    let e = refuse(|p| {
        p.kind = Kind::WindowResidual;
        p.residual.data.truncate(71);
    });
    assert_eq!(tensor(&e), ("residual", 71));
    assert!(
        e.to_string()
            .contains("reaches elements 0..=71, its slice has 71"),
        "{e}"
    );
}

#[test]
fn strides_that_run_before_the_slice() {
    let e = refuse(|p| p.k.strides.token = -3);
    assert!(
        matches!(
            e,
            KernelError::OutOfBounds {
                tensor: "key",
                first: -15,
                ..
            }
        ),
        "{e}"
    );
}

#[test]
fn sizes_that_overflow() {
    let e = refuse(|p| p.q.strides.head = isize::MAX / 2);
    assert!(
        matches!(
            e,
            KernelError::Overflow {
                tensor: "query",
                ..
            }
        ),
        "{e}"
    );
}

#[test]
fn outputs_that_overlap_themselves() {
    let e = refuse(|p| p.out.strides.token = 0);
    assert!(
        matches!(
            e,
            KernelError::Overlap {
                tensor: "output",
                ..
            }
        ),
        "{e}"
    );
    let e = refuse(|p| p.out.strides.token = 2);
    assert!(
        matches!(
            e,
            KernelError::Overlap {
                tensor: "output",
                ..
            }
        ),
        "{e}"
    );
    let e = refuse(|p| {
        p.kind = Kind::Capture;
        p.residual.strides.head = 17;
    });
    assert!(
        matches!(
            e,
            KernelError::Overlap {
                tensor: "residual",
                ..
            }
        ),
        "{e}"
    );
}

/// Broadcast keys are read through a stride of 0; only outputs must be injective.
#[test]
fn inputs_may_repeat() {
    let mut p = Problem::<f32>::new(
        Kind::Window,
        shape(1, 4, 6, 3),
        Band::new(1),
        [Layout::Bhsd; 4],
        1,
    );
    p.k.strides.head = 0;
    p.call(|a| attention(a, &Sequential)).unwrap();
}
