//! What kernels are launched with: the structs of `kernels/cuda/params.cuh`, field by field.

use std::ffi::c_void;

use crate::mask::{MaskStrides, MaskType};
use crate::tensor::{DType, Strides};

/// A tensor `[batch, heads, tokens, channels]` in device memory, strides in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    pub data: *mut c_void,
    pub batch: i64,
    pub head: i64,
    pub token: i64,
    pub channel: i64,
}

impl Operand {
    pub(super) fn new(data: *const u8, strides: Strides) -> Self {
        Operand {
            data: data.cast_mut().cast(),
            batch: strides.batch as i64,
            head: strides.head as i64,
            token: strides.token as i64,
            channel: strides.channel as i64,
        }
    }

    pub(super) const NONE: Operand = Operand {
        data: std::ptr::null_mut(),
        batch: 0,
        head: 0,
        token: 0,
        channel: 0,
    };
}

/// A mask `[batch, heads, q_tokens, kv_tokens]`, strides in elements.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct MaskOperand {
    pub data: *const c_void,
    pub batch: i64,
    pub head: i64,
    pub query: i64,
    pub key: i64,
    pub kind: i32,
    pub guarded: i32,
}

impl MaskOperand {
    pub(super) fn new(
        data: *const u8,
        strides: MaskStrides,
        kind: MaskType,
        guarded: bool,
    ) -> Self {
        MaskOperand {
            data: data.cast(),
            batch: strides.batch as i64,
            head: strides.head as i64,
            query: strides.query as i64,
            key: strides.key as i64,
            kind: match kind {
                MaskType::Boolean => 0,
                MaskType::Additive(DType::F32) => 1,
                MaskType::Additive(DType::F16) => 2,
                MaskType::Additive(DType::BF16) => 3,
            },
            guarded: i32::from(guarded),
        }
    }

    pub(super) const NONE: MaskOperand = MaskOperand {
        data: std::ptr::null(),
        batch: 0,
        head: 0,
        query: 0,
        key: 0,
        kind: 0,
        guarded: 0,
    };
}

/// One attention call. See `params.cuh` for what each field means.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams {
    pub q: Operand,
    pub k: Operand,
    pub v: Operand,
    pub out: Operand,
    pub residual: Operand,
    pub mask: MaskOperand,
    pub non_finite: *mut u32,
    pub heads: i32,
    pub group: i32,
    pub q_tokens: i32,
    pub kv_tokens: i32,
    pub half_width: i32,
    pub text_begin: i32,
    pub text_end: i32,
    pub scale_log2: f32,
    pub head_dim: i32,
    pub v_dim: i32,
}

/// Copies with a look for numbers that are not finite.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CopyParams {
    pub from: *const c_void,
    pub to: [*mut c_void; 3],
    pub count: u64,
    pub non_finite: *mut u32,
}

/// Structs that a kernel takes as its only parameter.
///
/// # Safety
/// `repr(C)`, without padding, and the same as the struct of that name in `params.cuh`.
pub unsafe trait Params: Copy {}
// SAFETY: without padding, and of the size that the emulator, which is C++, compares on every launch.
unsafe impl Params for AttentionParams {}
// SAFETY: as above.
unsafe impl Params for CopyParams {}
