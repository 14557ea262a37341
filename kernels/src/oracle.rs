//! The reference: attention by its definition, one row at a time, in float64.
//!
//! Every other implementation in the project (CPU, CUDA, through ONNX Runtime) is tested against this one, so it
//! must stay obvious; speed does not matter here.

use half::{bf16, f16};

use crate::api::{Attention, Band, DType, Input, Mode, Shape};
use crate::check::check;
use crate::error::KernelError;

/// What the definition gives, as contiguous `[batch, heads, q_tokens, v_dim]` in float64.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    pub out: Vec<f64>,
    /// O − W, for [`Mode::FullCapture`] only.
    pub residual: Option<Vec<f64>>,
}

/// Computes what [`attention`](crate::attention) should for the same arguments; reads the inputs, writes nothing.
pub fn attention(a: &Attention<'_>) -> Result<Answer, KernelError> {
    check(a)?;
    let s = a.shape;
    let q = read(&a.q, [s.batch, s.heads, s.q_tokens, s.head_dim]);
    let k = read(&a.k, [s.batch, s.kv_heads, s.kv_tokens, s.head_dim]);
    let v = read(&a.v, [s.batch, s.kv_heads, s.kv_tokens, s.v_dim]);
    let scale = f64::from(a.scale);
    Ok(match &a.mode {
        Mode::Full => Answer {
            out: dense(&s, scale, &q, &k, &v, None),
            residual: None,
        },
        Mode::FullCapture { band, .. } => {
            let out = dense(&s, scale, &q, &k, &v, None);
            let window = dense(&s, scale, &q, &k, &v, Some(band));
            let residual = out.iter().zip(&window).map(|(o, w)| o - w).collect();
            Answer {
                out,
                residual: Some(residual),
            }
        }
        Mode::Window { band, residual } => {
            let mut out = dense(&s, scale, &q, &k, &v, Some(band));
            if let Some(residual) = residual {
                let r = read(residual, [s.batch, s.heads, s.q_tokens, s.v_dim]);
                out.iter_mut().zip(&r).for_each(|(o, r)| *o += r);
            }
            Answer {
                out,
                residual: None,
            }
        }
    })
}

/// softmax(scale · q kᵀ) v over the keys the band lets each query see (all of them without a band).
///
/// Tensors are contiguous, in the order of [`Shape`]'s documentation. A row without keys gives zeros.
pub fn dense(
    s: &Shape,
    scale: f64,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    band: Option<&Band>,
) -> Vec<f64> {
    let mut out = Vec::with_capacity(s.batch * s.heads * s.q_tokens * s.v_dim);
    let group = s.heads.checked_div(s.kv_heads).unwrap_or(1);
    for b in 0..s.batch {
        for h in 0..s.heads {
            let kv = (b * s.kv_heads + h / group) * s.kv_tokens;
            for i in 0..s.q_tokens {
                let at = ((b * s.heads + h) * s.q_tokens + i) * s.head_dim;
                let qi = &q[at..at + s.head_dim];
                let mut scores = Vec::new();
                for j in 0..s.kv_tokens {
                    if band.is_none_or(|band| band.sees(i, j, s.kv_tokens)) {
                        let kj = &k[(kv + j) * s.head_dim..][..s.head_dim];
                        let dot: f64 = qi.iter().zip(kj).map(|(x, y)| x * y).sum();
                        scores.push((j, dot * scale));
                    }
                }
                // `f64::max` drops NaN, but exp(NaN − max) brings it back into the sum.
                let max = scores.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
                let mut row = vec![0f64; s.v_dim];
                let mut sum = 0f64;
                for &(j, score) in &scores {
                    let p = (score - max).exp();
                    sum += p;
                    let vj = &v[(kv + j) * s.v_dim..][..s.v_dim];
                    row.iter_mut().zip(vj).for_each(|(o, x)| *o += p * x);
                }
                if !scores.is_empty() {
                    row.iter_mut().for_each(|o| *o /= sum);
                }
                out.extend_from_slice(&row);
            }
        }
    }
    out
}

/// All elements of a tensor of `dims` (batch, heads, tokens, channels), contiguous in that order.
fn read(t: &Input<'_>, dims: [usize; 4]) -> Vec<f64> {
    let mut all = Vec::with_capacity(dims.iter().product());
    for b in 0..dims[0] {
        for h in 0..dims[1] {
            for n in 0..dims[2] {
                for c in 0..dims[3] {
                    let s = t.strides;
                    let at = b as isize * s.batch
                        + h as isize * s.head
                        + n as isize * s.token
                        + c as isize * s.channel;
                    // SAFETY: `check` has compared every index with the slice; raw tensors were promised.
                    all.push(unsafe {
                        match t.dtype {
                            DType::F32 => f64::from(*t.data.cast::<f32>().offset(at)),
                            DType::F16 => (*t.data.cast::<f16>().offset(at)).to_f64(),
                            DType::BF16 => (*t.data.cast::<bf16>().offset(at)).to_f64(),
                        }
                    });
                }
            }
        }
    }
    all
}
