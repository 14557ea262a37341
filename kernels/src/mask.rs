//! What a caller says about the mask of an attention call. Checking it is `check`, applying it `cpu::mask`.

use std::marker::PhantomData;

use crate::tensor::{DType, Element};

/// Distances, in elements, between neighbours of a mask `[batch, heads, q_tokens, kv_tokens]`; 0 repeats it along that
/// dimension.
///
/// The stride of a dimension of size 1 is never used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaskStrides {
    pub batch: isize,
    pub head: isize,
    pub query: isize,
    pub key: isize,
}

/// What the elements of a mask mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MaskType {
    /// One byte each: 0 hides the key from the query, anything else shows it.
    Boolean,
    /// Added to `scale` · q kᵀ; −∞ hides the key, as false does.
    Additive(DType),
}

impl MaskType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            MaskType::Boolean => 1,
            MaskType::Additive(dtype) => dtype.size(),
        }
    }
}

/// Which keys a query sees, or a bias on its scores.
///
/// A hidden key takes no part, whatever its key and value are. A query to which all keys are hidden gives 0 if the mask
/// is boolean or [guarded](Mask::guarded), else NaN: 0 / 0, the definition. If only the keys inside a band are hidden, W
/// is 0 in any case.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    pub(crate) data: *const u8,
    pub(crate) kind: MaskType,
    pub(crate) strides: MaskStrides,
    /// As in [`Input`](crate::Input).
    pub(crate) len: Option<usize>,
    pub(crate) guarded: bool,
    lifetime: PhantomData<&'a [u8]>,
}

impl<'a> Mask<'a> {
    /// A bias inside a slice, added in float32. That the shape fits is checked by [`attention`](crate::attention).
    pub fn additive<T: Element>(data: &'a [T], strides: MaskStrides) -> Self {
        Mask {
            data: data.as_ptr().cast(),
            kind: MaskType::Additive(T::DTYPE),
            strides,
            len: Some(data.len()),
            guarded: false,
            lifetime: PhantomData,
        }
    }

    /// Truth values inside a slice: 0 hides. That the shape fits is checked by [`attention`](crate::attention).
    pub fn boolean(data: &'a [u8], strides: MaskStrides) -> Self {
        Mask {
            data: data.as_ptr(),
            kind: MaskType::Boolean,
            strides,
            len: Some(data.len()),
            guarded: true,
            lifetime: PhantomData,
        }
    }

    /// A mask somebody else owns, such as ONNX Runtime.
    ///
    /// # Safety
    /// For every (batch, head, query, key) inside the [`Shape`](crate::Shape) it is used with, the element at
    /// `data + Σ index·stride` must be readable, initialised, aligned for `kind`, and not written during `'a` (the
    /// attention call itself included). `data` may be anything if the shape has no such element.
    pub unsafe fn from_raw(data: *const u8, kind: MaskType, strides: MaskStrides) -> Self {
        Mask {
            data,
            kind,
            strides,
            len: None,
            guarded: kind == MaskType::Boolean,
            lifetime: PhantomData,
        }
    }

    /// Says whether queries that see nothing give 0 rather than NaN. Those of a boolean mask always do.
    #[must_use]
    pub fn guarded(mut self, guarded: bool) -> Self {
        self.guarded = guarded || self.kind == MaskType::Boolean;
        self
    }

    pub fn kind(&self) -> MaskType {
        self.kind
    }

    pub fn strides(&self) -> MaskStrides {
        self.strides
    }
}
