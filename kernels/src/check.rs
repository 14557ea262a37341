//! Refuses calls that do not make sense, so that the kernels need not look again.
//!
//! After [`check`] every element a kernel touches lies inside its slice, and no two output elements coincide: this
//! is what lets [`attention`](crate::attention) be a safe function over many threads.

use crate::api::{Attention, Band, Mode};
use crate::error::{KernelError, MASK};
use crate::tensor::Strides;

pub(crate) fn check(a: &Attention<'_>) -> Result<(), KernelError> {
    let s = &a.shape;
    if s.heads != 0 && (s.kv_heads == 0 || !s.heads.is_multiple_of(s.kv_heads)) {
        return Err(KernelError::Heads {
            heads: s.heads,
            kv_heads: s.kv_heads,
        });
    }
    let q = [s.batch, s.heads, s.q_tokens, s.head_dim];
    let k = [s.batch, s.kv_heads, s.kv_tokens, s.head_dim];
    let v = [s.batch, s.kv_heads, s.kv_tokens, s.v_dim];
    let o = [s.batch, s.heads, s.q_tokens, s.v_dim];
    bounds("query", q, a.q.strides, a.q.len)?;
    bounds("key", k, a.k.strides, a.k.len)?;
    bounds("value", v, a.v.strides, a.v.len)?;
    bounds("output", o, a.out.strides, a.out.len)?;
    overlap("output", o, a.out.strides)?;
    if let Some(mask) = &a.mask {
        let dims = [s.batch, s.heads, s.q_tokens, s.kv_tokens];
        let m = mask.strides;
        reach(MASK, dims, [m.batch, m.head, m.query, m.key], mask.len)?;
    }
    match &a.mode {
        Mode::Full => {}
        Mode::FullCapture { band, residual } => {
            check_band(band, a)?;
            bounds("residual", o, residual.strides, residual.len)?;
            overlap("residual", o, residual.strides)?;
        }
        Mode::Window { band, residual } => {
            check_band(band, a)?;
            if let Some(residual) = residual {
                bounds("residual", o, residual.strides, residual.len)?;
            }
        }
    }
    Ok(())
}

fn check_band(band: &Band, a: &Attention<'_>) -> Result<(), KernelError> {
    let s = &a.shape;
    if s.q_tokens != s.kv_tokens {
        return Err(KernelError::CrossBand {
            q_tokens: s.q_tokens,
            kv_tokens: s.kv_tokens,
        });
    }
    if band.text > s.q_tokens {
        return Err(KernelError::Text {
            text: band.text,
            tokens: s.q_tokens,
        });
    }
    Ok(())
}

fn array(s: Strides) -> [isize; 4] {
    [s.batch, s.head, s.token, s.channel]
}

fn bounds(
    tensor: &'static str,
    dims: [usize; 4],
    strides: Strides,
    len: Option<usize>,
) -> Result<(), KernelError> {
    reach(tensor, dims, array(strides), len)
}

/// Every offset fits an `isize` of bytes, and lies inside the slice if there is one.
fn reach(
    tensor: &'static str,
    dims: [usize; 4],
    strides: [isize; 4],
    len: Option<usize>,
) -> Result<(), KernelError> {
    if dims.contains(&0) {
        return Ok(());
    }
    let (mut first, mut last) = (0i128, 0i128);
    for (&n, &stride) in dims.iter().zip(&strides) {
        // usize · isize: below 2^127, and four of them are checked one by one.
        let span = (n as i128 - 1) * stride as i128;
        if span < 0 {
            first += span
        } else {
            last += span
        }
        if first < -(isize::MAX as i128 / 8) || last > isize::MAX as i128 / 8 {
            return Err(KernelError::Overflow {
                tensor,
                dims,
                strides,
            });
        }
    }
    match len {
        Some(len) if first < 0 || last >= len as i128 => Err(KernelError::OutOfBounds {
            tensor,
            dims,
            strides,
            first: first as isize,
            last: last as isize,
            len,
        }),
        _ => Ok(()),
    }
}

/// Refuses layouts in which a larger stride does not step over everything the smaller ones span. This is stricter
/// than "no two elements coincide", but every layout that is a permutation (with gaps) of a dense one passes.
fn overlap(tensor: &'static str, dims: [usize; 4], strides: Strides) -> Result<(), KernelError> {
    if dims.contains(&0) {
        return Ok(());
    }
    let strides = array(strides);
    let mut order: Vec<(u128, u128)> = dims
        .iter()
        .zip(&strides)
        .filter(|&(&n, _)| n > 1)
        .map(|(&n, &stride)| (stride.unsigned_abs() as u128, n as u128))
        .collect();
    order.sort_unstable();
    let mut reach = 0u128;
    for (stride, n) in order {
        if stride <= reach {
            return Err(KernelError::Overlap {
                tensor,
                dims,
                strides,
            });
        }
        reach += stride * (n - 1);
    }
    Ok(())
}
