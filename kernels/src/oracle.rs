//! The reference: attention by its definition, one row at a time, in float64.
//!
//! Every other implementation in the project (CPU, CUDA, through ONNX Runtime) is tested against this one, so it
//! must stay obvious; speed does not matter here.

use half::{bf16, f16};

use crate::api::{Attention, Band, Mode, Shape};
use crate::check::check;
use crate::error::KernelError;
use crate::mask::{Mask, MaskType};
use crate::tensor::{DType, Input, Strides};

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
    let call = Call {
        shape: s,
        scale: f64::from(a.scale),
        q: read(&a.q, [s.batch, s.heads, s.q_tokens, s.head_dim]),
        k: read(&a.k, [s.batch, s.kv_heads, s.kv_tokens, s.head_dim]),
        v: read(&a.v, [s.batch, s.kv_heads, s.kv_tokens, s.v_dim]),
        mask: a.mask.as_ref().map(|mask| read_mask(mask, &s)),
        guarded: a.mask.is_some_and(|mask| mask.guarded),
    };
    Ok(match &a.mode {
        Mode::Full => Answer {
            out: call.full(),
            residual: None,
        },
        Mode::FullCapture { band, .. } => {
            let (out, window) = (call.full(), call.window(band));
            let residual = out.iter().zip(&window).map(|(o, w)| o - w).collect();
            Answer {
                out,
                residual: Some(residual),
            }
        }
        Mode::Window { band, residual } => {
            let mut out = call.window(band);
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

/// A call with its tensors in float64, contiguous, in the order of [`Shape`]'s documentation.
struct Call {
    shape: Shape,
    scale: f64,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    /// What is added to each score; −∞ hides the key.
    mask: Option<Vec<f64>>,
    guarded: bool,
}

impl Call {
    /// O: softmax(scale · q kᵀ + mask) v over all keys. A row without keys gives zeros.
    fn full(&self) -> Vec<f64> {
        self.rows(self.guarded, |_, _| true)
    }

    /// W: the same over the keys the band lets each query see.
    fn window(&self, band: &Band) -> Vec<f64> {
        self.rows(true, |i, j| band.sees(i, j, self.shape.kv_tokens))
    }

    /// `guarded`: a row to which the mask shows nothing is zero, else NaN.
    fn rows(&self, guarded: bool, sees: impl Fn(usize, usize) -> bool) -> Vec<f64> {
        let s = &self.shape;
        let mut out = Vec::with_capacity(s.batch * s.heads * s.q_tokens * s.v_dim);
        for row in 0..s.batch * s.heads * s.q_tokens {
            let (plane, i) = (row / s.q_tokens, row % s.q_tokens);
            let (b, h) = (plane / s.heads, plane % s.heads);
            let kv = (b * s.kv_heads + h / (s.heads / s.kv_heads)) * s.kv_tokens;
            let q = &self.q[row * s.head_dim..][..s.head_dim];
            let mut scores = Vec::new();
            for j in (0..s.kv_tokens).filter(|&j| sees(i, j)) {
                let mask = self.mask.as_ref().map_or(0.0, |m| m[row * s.kv_tokens + j]);
                if mask != f64::NEG_INFINITY {
                    let k = &self.k[(kv + j) * s.head_dim..][..s.head_dim];
                    let dot: f64 = q.iter().zip(k).map(|(x, y)| x * y).sum();
                    scores.push((j, dot * self.scale + mask));
                }
            }
            // `f64::max` drops NaN, but exp(NaN − max) brings it back into the sum.
            let max = scores.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
            let mut o = vec![0f64; s.v_dim];
            let mut sum = 0f64;
            for &(j, score) in &scores {
                let p = (score - max).exp();
                sum += p;
                let v = &self.v[(kv + j) * s.v_dim..][..s.v_dim];
                o.iter_mut().zip(v).for_each(|(o, x)| *o += p * x);
            }
            let empty = scores.is_empty() && (guarded || s.kv_tokens == 0);
            if !empty {
                o.iter_mut().for_each(|o| *o /= sum);
            }
            out.extend_from_slice(&o);
        }
        out
    }
}

/// The mask of every (batch, head, query, key) as a number to add: −∞ where it is false.
fn read_mask(mask: &Mask<'_>, s: &Shape) -> Vec<f64> {
    match mask.kind {
        MaskType::Additive(dtype) => {
            let m = mask.strides;
            let strides = Strides {
                batch: m.batch,
                head: m.head,
                token: m.query,
                channel: m.key,
            };
            // SAFETY: `check` has compared every index with the slice; raw masks were promised.
            let numbers = unsafe { Input::from_raw(mask.data, dtype, strides) };
            read(&numbers, [s.batch, s.heads, s.q_tokens, s.kv_tokens])
        }
        MaskType::Boolean => {
            let mut all = Vec::new();
            for row in 0..s.batch * s.heads * s.q_tokens {
                let (plane, i) = (row / s.q_tokens, row % s.q_tokens);
                for j in 0..s.kv_tokens {
                    let at = (plane / s.heads) as isize * mask.strides.batch
                        + (plane % s.heads) as isize * mask.strides.head
                        + i as isize * mask.strides.query
                        + j as isize * mask.strides.key;
                    // SAFETY: as above.
                    let shown = unsafe { *mask.data.offset(at) } != 0;
                    all.push(if shown { 0.0 } else { f64::NEG_INFINITY });
                }
            }
            all
        }
    }
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
