//! What a caller says about one attention call: tensors, shape, band, mode.
//!
//! Owns the public types and nothing else: checking them is `check`, computing is `cpu`.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::mask::Mask;

/// Element type of a tensor. Arithmetic is float32 unless [`Products`] asks for less; these are storage types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F16,
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The largest finite number.
    pub(crate) const fn largest(self) -> f32 {
        match self {
            DType::F32 => f32::MAX,
            DType::F16 => f16::MAX.to_f32_const(),
            DType::BF16 => bf16::MAX.to_f32_const(),
        }
    }
}

/// How the two products of a call, q kᵀ and probabilities times v, multiply. Sums, softmax and residuals are float32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// In float32, whatever the type of the tensors.
    #[default]
    Float32,
    /// In bfloat16 where q, k and v are bfloat16 or float16 and the machine has AVX-512 BF16; else in float32. Up to
    /// twice as fast there.
    ///
    /// Probabilities are rounded to bfloat16, and float16 inputs too, which have three bits more: the result is as close
    /// as that of a plain implementation that rounds the same, not as float16 could be. Values of float16 above 65408 are
    /// rounded to 65536, which is not finite in a float16 output.
    Bfloat16,
}

/// A Rust type that is one of [`DType`]. Sealed: [`f32`], [`half::f16`], [`half::bf16`].
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    const DTYPE: DType;
    fn from_f32(x: f32) -> Self;
    fn to_f32(self) -> f32;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    fn from_f32(x: f32) -> Self {
        x
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    fn from_f32(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
    fn from_f32(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// Distances, in elements, between neighbours along (batch, head, token, channel).
///
/// The stride of a dimension of size 1 is never used. Inputs may repeat elements (stride 0) or run backwards
/// (raw tensors only); outputs may not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Strides {
    pub batch: isize,
    pub head: isize,
    pub token: isize,
    pub channel: isize,
}

impl Strides {
    /// Contiguous `[batch, heads, tokens, channels]`.
    pub fn bhsd(heads: usize, tokens: usize, channels: usize) -> Self {
        Strides {
            batch: (heads * tokens * channels) as isize,
            head: (tokens * channels) as isize,
            token: channels as isize,
            channel: 1,
        }
    }

    /// Contiguous `[batch, tokens, heads, channels]`: what a fused projection yields before any transposition.
    pub fn bshd(heads: usize, tokens: usize, channels: usize) -> Self {
        Strides {
            batch: (heads * tokens * channels) as isize,
            head: channels as isize,
            token: (heads * channels) as isize,
            channel: 1,
        }
    }

    /// Contiguous `[batch, heads, channels, tokens]`: K already transposed for `Q·Kᵀ`.
    pub fn bhds(heads: usize, tokens: usize, channels: usize) -> Self {
        Strides {
            batch: (heads * tokens * channels) as isize,
            head: (tokens * channels) as isize,
            token: 1,
            channel: tokens as isize,
        }
    }
}

/// A tensor that is read.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a> {
    pub(crate) data: *const u8,
    pub(crate) dtype: DType,
    pub(crate) strides: Strides,
    /// Elements that may be touched, counted from `data`; `None` for a raw tensor, whose maker promised.
    pub(crate) len: Option<usize>,
    lifetime: PhantomData<&'a [u8]>,
}

impl<'a> Input<'a> {
    /// A tensor inside a slice. That the shape fits is checked by [`attention`](crate::attention).
    pub fn from_slice<T: Element>(data: &'a [T], strides: Strides) -> Self {
        Input {
            data: data.as_ptr().cast(),
            dtype: T::DTYPE,
            strides,
            len: Some(data.len()),
            lifetime: PhantomData,
        }
    }

    /// A tensor somebody else owns, such as ONNX Runtime.
    ///
    /// # Safety
    /// For every (batch, head, token, channel) inside the [`Shape`] it is used with, the element at
    /// `data + Σ index·stride` must be readable, initialised, aligned for `dtype`, and not written during `'a`
    /// (the attention call itself included). `data` may be anything if the shape has no such element.
    pub unsafe fn from_raw(data: *const u8, dtype: DType, strides: Strides) -> Self {
        Input {
            data,
            dtype,
            strides,
            len: None,
            lifetime: PhantomData,
        }
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn strides(&self) -> Strides {
        self.strides
    }
}

/// A tensor that is written: every element of the shape, nothing between them.
#[derive(Debug)]
pub struct Output<'a> {
    pub(crate) data: *mut u8,
    pub(crate) dtype: DType,
    pub(crate) strides: Strides,
    /// As in [`Input`].
    pub(crate) len: Option<usize>,
    lifetime: PhantomData<&'a mut [u8]>,
}

impl<'a> Output<'a> {
    /// A tensor inside a slice. That the shape fits is checked by [`attention`](crate::attention).
    pub fn from_slice<T: Element>(data: &'a mut [T], strides: Strides) -> Self {
        Output {
            data: data.as_mut_ptr().cast(),
            dtype: T::DTYPE,
            strides,
            len: Some(data.len()),
            lifetime: PhantomData,
        }
    }

    /// A tensor somebody else owns, such as ONNX Runtime. Its contents may be uninitialised.
    ///
    /// # Safety
    /// For every (batch, head, token, channel) inside the [`Shape`] it is used with, the element at
    /// `data + Σ index·stride` must be writable, aligned for `dtype`, and neither read nor written by anybody else
    /// during `'a`. `data` may be anything if the shape has no such element.
    pub unsafe fn from_raw(data: *mut u8, dtype: DType, strides: Strides) -> Self {
        Output {
            data,
            dtype,
            strides,
            len: None,
            lifetime: PhantomData,
        }
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn strides(&self) -> Strides {
        self.strides
    }
}

/// Sizes of one attention call.
///
/// q is `[batch, heads, q_tokens, head_dim]`, k `[batch, kv_heads, kv_tokens, head_dim]`,
/// v `[batch, kv_heads, kv_tokens, v_dim]`, output and residual `[batch, heads, q_tokens, v_dim]`, each laid out
/// by its own [`Strides`]. Query head `h` reads key/value head `h / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub batch: usize,
    pub heads: usize,
    /// Divides `heads`; equal to it except under grouped-query attention.
    pub kv_heads: usize,
    pub q_tokens: usize,
    /// May differ from `q_tokens` in [`Mode::Full`] only.
    pub kv_tokens: usize,
    pub head_dim: usize,
    pub v_dim: usize,
}

/// Which keys a query sees in window attention: token i sees j iff |i − j| ≤ `half_width`, or i or j is text.
///
/// Indices count all tokens, text included (DiTFastAttn, arXiv 2406.08552, §3.2, widened by the text tokens of
/// joint attention). Every token sees itself, so no row is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band {
    pub half_width: usize,
    /// How many tokens are text; they lie together at one end of the sequence.
    pub text: usize,
    pub text_at_start: bool,
}

impl Band {
    /// A band without text tokens.
    pub fn new(half_width: usize) -> Self {
        Band {
            half_width,
            text: 0,
            text_at_start: false,
        }
    }

    /// The half-open range of text tokens in a sequence of `tokens`.
    pub fn text_range(&self, tokens: usize) -> std::ops::Range<usize> {
        let text = self.text.min(tokens);
        if self.text_at_start {
            0..text
        } else {
            tokens - text..tokens
        }
    }

    /// Whether query `i` sees key `j` in a sequence of `tokens`.
    pub fn sees(&self, i: usize, j: usize, tokens: usize) -> bool {
        let text = self.text_range(tokens);
        i.abs_diff(j) <= self.half_width || text.contains(&i) || text.contains(&j)
    }

    /// Whether every query sees every key of a sequence of `tokens`: then W is O, and R is zero.
    pub fn covers(&self, tokens: usize) -> bool {
        self.half_width >= tokens.saturating_sub(self.text).saturating_sub(1)
    }
}

/// What is computed. O is attention over all keys, W attention over the band with the softmax renormalised there. A mask
/// stays in force in both.
#[derive(Debug)]
pub enum Mode<'a> {
    /// out = O.
    Full,
    /// out = O and residual = O − W, in one pass over the keys. The subtraction happens in float32, before
    /// rounding to the residual's dtype.
    FullCapture { band: Band, residual: Output<'a> },
    /// out = W, plus the residual if there is one (added in float32, before rounding to the output's dtype).
    Window {
        band: Band,
        residual: Option<Input<'a>>,
    },
}

/// One attention call: softmax(`scale` · q kᵀ + `mask`) v for every batch row and head.
#[derive(Debug)]
pub struct Attention<'a> {
    pub shape: Shape,
    pub scale: f32,
    pub q: Input<'a>,
    pub k: Input<'a>,
    pub v: Input<'a>,
    /// `[batch, heads, q_tokens, kv_tokens]`; `None` is as good as one that shows everything, and faster.
    pub mask: Option<Mask<'a>>,
    pub out: Output<'a>,
    pub mode: Mode<'a>,
}
