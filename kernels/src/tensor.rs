//! Tensors that somebody else owns: element types, strides, pointers.

use std::marker::PhantomData;

use half::{bf16, f16};

/// Element type of a tensor. Arithmetic is float32 unless [`Products`](crate::Products) asks for less; these are storage
/// types.
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
    /// For every (batch, head, token, channel) inside the [`Shape`](crate::Shape) it is used with, the element at
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
    /// For every (batch, head, token, channel) inside the [`Shape`](crate::Shape) it is used with, the element at
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
