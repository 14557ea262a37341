//! From a call to a kernel and its parameters.

use crate::api::{Attention, Mode};
use crate::check::check;
use crate::error::KernelError;
use crate::tensor::{DType, Strides};

use super::params::{AttentionParams, MaskOperand, Operand};
use super::variant::{AttentionMode, SIMPLE_DIMS, Variant};

/// What a device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shared memory that a block may ask for, in bytes.
    pub shared_bytes: usize,
    /// Whether it has the instructions of compute capability 8.0.
    pub tensor_cores: bool,
}

/// Why a call cannot run on a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Call(#[from] KernelError),
    #[error("attention on CUDA: tensors are of types {0:?}, expected one type for all")]
    Types(Vec<DType>),
    #[error("attention on CUDA: a head dimension is {0}, expected at most {max}", max = SIMPLE_DIMS[2])]
    Wide(usize),
    #[error("attention on CUDA: {what} is {size}, which is too large to launch")]
    Large { what: &'static str, size: usize },
    #[error(
        "attention on CUDA: the device has {have} bytes of shared memory per block, {need} are needed"
    )]
    SharedMemory { have: usize, need: usize },
}

/// A kernel and what to call it with.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub variant: Variant,
    pub blocks: u32,
    pub params: AttentionParams,
}

/// The kernel for a call whose tensors are in device memory, which may not be touched here; `None` if there is nothing
/// to compute. `non_finite` is set to 1 if a captured residual has a number that is not finite.
///
/// # Errors
/// [`Refusal`] if the call makes no sense or no kernel can take it.
pub fn choose(
    a: &Attention<'_>,
    limits: &Limits,
    non_finite: *mut u32,
) -> Result<Option<Launch>, Refusal> {
    check(a)?;
    let dtype = one_type(a)?;
    let s = a.shape;
    let widest = s.head_dim.max(s.v_dim);
    if widest > SIMPLE_DIMS[2] {
        return Err(Refusal::Wide(widest));
    }
    let small = |what, size: usize| {
        i32::try_from(size)
            .ok()
            .filter(|&size| size < i32::MAX / 2)
            .ok_or(Refusal::Large { what, size })
    };
    let (q_tokens, kv_tokens) = (
        small("the number of queries", s.q_tokens)?,
        small("the number of keys", s.kv_tokens)?,
    );
    let planes = s.batch.saturating_mul(s.heads);
    if planes == 0 || s.q_tokens == 0 || s.v_dim == 0 {
        return Ok(None);
    }
    let variant = variant(a, dtype, limits)?;
    let blocks = s
        .q_tokens
        .div_ceil(variant.queries())
        .saturating_mul(planes);
    let blocks = small("the number of blocks", blocks)? as u32;
    let (residual, band) = match &a.mode {
        Mode::Full => (Operand::NONE, None),
        Mode::FullCapture { band, residual } => {
            (Operand::new(residual.data, residual.strides), Some(band))
        }
        Mode::Window { band, residual } => (
            residual.map_or(Operand::NONE, |r| Operand::new(r.data, r.strides)),
            Some(band),
        ),
    };
    let text = band.map_or(0..0, |band| band.text_range(s.kv_tokens));
    Ok(Some(Launch {
        variant,
        blocks,
        params: AttentionParams {
            q: Operand::new(a.q.data, a.q.strides),
            k: Operand::new(a.k.data, a.k.strides),
            v: Operand::new(a.v.data, a.v.strides),
            out: Operand::new(a.out.data, a.out.strides),
            residual,
            mask: a.mask.map_or(MaskOperand::NONE, |m| {
                MaskOperand::new(m.data, m.strides, m.kind, m.guarded)
            }),
            non_finite,
            heads: small("the number of heads", s.heads)?,
            group: (s.heads / s.kv_heads) as i32,
            q_tokens,
            kv_tokens,
            // Wider than the sequence is as good as infinite.
            half_width: band.map_or(0, |band| band.half_width.min(s.kv_tokens) as i32),
            text_begin: text.start as i32,
            text_end: text.end as i32,
            scale_log2: a.scale * std::f32::consts::LOG2_E,
            head_dim: s.head_dim as i32,
            v_dim: s.v_dim as i32,
        },
    }))
}

fn one_type(a: &Attention<'_>) -> Result<DType, Refusal> {
    let mut types = vec![a.q.dtype, a.k.dtype, a.v.dtype, a.out.dtype];
    match &a.mode {
        Mode::FullCapture { residual, .. } => types.push(residual.dtype),
        Mode::Window {
            residual: Some(residual),
            ..
        } => types.push(residual.dtype),
        _ => {}
    }
    if types.iter().all(|dtype| *dtype == types[0]) {
        Ok(types[0])
    } else {
        Err(Refusal::Types(types))
    }
}

/// Sequences up to this length get blocks of 64 queries: wider blocks visit more of what a narrow band hides (at 1024
/// tokens and the paper's window 34 % of the keys instead of 29 %), and there are too few of them for a large device.
const SHORT: usize = 2048;

fn variant(a: &Attention<'_>, dtype: DType, limits: &Limits) -> Result<Variant, Refusal> {
    let (s, mode) = (a.shape, attention_mode(&a.mode));
    let masked = a.mask.is_some();
    let mut candidates = Vec::new();
    if limits.tensor_cores && suits_tensor_cores(a, dtype) {
        let of = |queries| Variant::TensorCore {
            dtype,
            dim: s.head_dim,
            queries,
            mode,
            masked,
        };
        if s.q_tokens > SHORT && !masked {
            candidates.push(of(128));
        }
        candidates.push(of(64));
    }
    let widest = s.head_dim.max(s.v_dim);
    candidates.extend(
        SIMPLE_DIMS
            .into_iter()
            .find(|&max_dim| widest <= max_dim)
            .map(|max_dim| Variant::Simple {
                dtype,
                max_dim,
                mode,
            }),
    );
    let fits = |variant: &Variant| variant.shared_bytes() <= limits.shared_bytes;
    candidates
        .iter()
        .copied()
        .find(fits)
        .ok_or_else(|| Refusal::SharedMemory {
            have: limits.shared_bytes,
            need: candidates.last().map_or(0, Variant::shared_bytes),
        })
}

fn attention_mode(mode: &Mode<'_>) -> AttentionMode {
    match mode {
        Mode::Full => AttentionMode::Full,
        Mode::FullCapture { .. } => AttentionMode::Capture,
        Mode::Window { .. } => AttentionMode::Window,
    }
}

/// Whether all rows are made of 16-byte pieces, and the running maximum may be that of unscaled scores.
fn suits_tensor_cores(a: &Attention<'_>, dtype: DType) -> bool {
    let s = a.shape;
    let aligned = |data: *const u8, strides: Strides, heads: usize, tokens: usize| {
        let whole = |stride: isize, size: usize| size <= 1 || stride % 8 == 0;
        data.addr().is_multiple_of(16)
            && strides.channel == 1
            && whole(strides.batch, s.batch)
            && whole(strides.head, heads)
            && whole(strides.token, tokens)
    };
    let residual = match &a.mode {
        Mode::Full => true,
        Mode::FullCapture { residual, .. } => {
            aligned(residual.data, residual.strides, s.heads, s.q_tokens)
        }
        Mode::Window { residual, .. } => {
            residual.is_none_or(|r| aligned(r.data, r.strides, s.heads, s.q_tokens))
        }
    };
    dtype != DType::F32
        && s.head_dim == s.v_dim
        && s.head_dim.is_multiple_of(8)
        && (8..=128).contains(&s.head_dim)
        && a.scale > 0.0
        && a.scale.is_finite()
        && aligned(a.q.data, a.q.strides, s.heads, s.q_tokens)
        && aligned(a.k.data, a.k.strides, s.kv_heads, s.kv_tokens)
        && aligned(a.v.data, a.v.strides, s.kv_heads, s.kv_tokens)
        && aligned(a.out.data, a.out.strides, s.heads, s.q_tokens)
        && residual
}
