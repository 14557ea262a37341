//! Attention on the CPU (first, simple version: one row at a time).

use half::{bf16, f16};

use crate::api::{Attention, DType, Input, Mode, Output};
use crate::parallel::Parallel;

/// Shares the raw pointers of a call between tasks.
struct Shared<'a, 'b>(&'a Attention<'b>);
// SAFETY: tasks only read the inputs and write disjoint output rows (`check` refuses overlapping layouts).
unsafe impl Sync for Shared<'_, '_> {}

impl<'a, 'b> Shared<'a, 'b> {
    fn get(&self) -> &'a Attention<'b> {
        self.0
    }
}

pub(crate) fn attention(a: &Attention<'_>, pool: &dyn Parallel) {
    let s = a.shape;
    let shared = Shared(a);
    pool.run(s.batch * s.heads, &|task| {
        let a = shared.get();
        let (b, h) = (task / s.heads, task % s.heads);
        for i in 0..s.q_tokens {
            row(a, b, h, i);
        }
    });
}

fn row(a: &Attention<'_>, b: usize, h: usize, i: usize) {
    let s = a.shape;
    let g = h / (s.heads / s.kv_heads);
    let scores: Vec<f32> = (0..s.kv_tokens)
        .map(|j| {
            let dot: f32 = (0..s.head_dim)
                .map(|c| load(&a.q, b, h, i, c) * load(&a.k, b, g, j, c))
                .sum();
            dot * a.scale
        })
        .collect();
    let over = |sees: &dyn Fn(usize) -> bool| -> Vec<f32> {
        let keys: Vec<usize> = (0..s.kv_tokens).filter(|&j| sees(j)).collect();
        let max = keys
            .iter()
            .map(|&j| scores[j])
            .fold(f32::NEG_INFINITY, f32::max);
        let p: Vec<f32> = keys.iter().map(|&j| (scores[j] - max).exp()).collect();
        let sum: f32 = p.iter().sum();
        (0..s.v_dim)
            .map(|c| {
                let dot: f32 = keys
                    .iter()
                    .zip(&p)
                    .map(|(&j, p)| p * load(&a.v, b, g, j, c))
                    .sum();
                if keys.is_empty() { 0.0 } else { dot / sum }
            })
            .collect()
    };
    match &a.mode {
        Mode::Full => {
            for (c, o) in over(&|_| true).into_iter().enumerate() {
                store(&a.out, b, h, i, c, o);
            }
        }
        Mode::FullCapture { band, residual } => {
            let o = over(&|_| true);
            let w = over(&|j| band.sees(i, j, s.kv_tokens));
            for c in 0..s.v_dim {
                store(&a.out, b, h, i, c, o[c]);
                store(residual, b, h, i, c, o[c] - w[c]);
            }
        }
        Mode::Window { band, residual } => {
            for (c, w) in over(&|j| band.sees(i, j, s.kv_tokens))
                .into_iter()
                .enumerate()
            {
                let r = residual.as_ref().map_or(0.0, |r| load(r, b, h, i, c));
                store(&a.out, b, h, i, c, w + r);
            }
        }
    }
}

fn load(t: &Input<'_>, b: usize, h: usize, n: usize, c: usize) -> f32 {
    let s = t.strides;
    let at =
        b as isize * s.batch + h as isize * s.head + n as isize * s.token + c as isize * s.channel;
    // SAFETY: `check` has compared every index of the shape with the slice; raw tensors were promised.
    unsafe {
        match t.dtype {
            DType::F32 => *t.data.cast::<f32>().offset(at),
            DType::F16 => (*t.data.cast::<f16>().offset(at)).to_f32(),
            DType::BF16 => (*t.data.cast::<bf16>().offset(at)).to_f32(),
        }
    }
}

fn store(t: &Output<'_>, b: usize, h: usize, n: usize, c: usize, x: f32) {
    let s = t.strides;
    let at =
        b as isize * s.batch + h as isize * s.head + n as isize * s.token + c as isize * s.channel;
    // SAFETY: as in `load`; each element is written by one task only.
    unsafe {
        match t.dtype {
            DType::F32 => t.data.cast::<f32>().offset(at).write(x),
            DType::F16 => t.data.cast::<f16>().offset(at).write(f16::from_f32(x)),
            DType::BF16 => t.data.cast::<bf16>().offset(at).write(bf16::from_f32(x)),
        }
    }
}
