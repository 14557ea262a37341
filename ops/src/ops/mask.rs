//! The optional mask of `DiTFastAttn`: how it broadcasts, and which of its rows belong to the rows at hand.

use ditfastattn_kernels::{Mask, MaskStrides};
use half::{bf16, f16};

use crate::abi::error::Error;
use crate::abi::tensor::{ElementType, Tensor};

use super::layout::View;

/// A mask seen as `[batch, heads, queries, keys]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct MaskInput<'a> {
    values: MaskValues<'a>,
    strides: MaskStrides,
    /// The row of the mask at which the rows at hand start.
    row: usize,
    guarded: bool,
}

#[derive(Clone, Copy, Debug)]
enum MaskValues<'a> {
    Bool(&'a [u8]),
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

/// What a mask is broadcast to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scores {
    /// `[batch, heads, queries, keys]` of the rows at hand.
    pub dims: [usize; 4],
    /// Batch and heads are one axis of q, and of masks of rank 3.
    pub folded: bool,
    /// `Some` if only half of the batch is at hand, which the mask need not know; true: the first half.
    pub half: Option<bool>,
}

impl Scores {
    /// `folded` and `half` as in the fields.
    pub fn new(q: &View, k: &View, folded: bool, half: Option<bool>) -> Scores {
        Scores {
            dims: [q.batch, q.heads, q.tokens, k.tokens],
            folded,
            half,
        }
    }

    /// The axes of a mask of shape `dims`, and the row at which the rows at hand start in it; `None` if it does not
    /// broadcast.
    fn axes(&self, dims: &[usize]) -> Option<([usize; 4], usize)> {
        let [batch, heads, ..] = self.dims;
        let mut axes = [1; 4];
        match *dims {
            [rows, queries, keys] if self.folded && rows != 1 => {
                // One row of the batch cannot stand for others: numpy would not repeat it either.
                if heads == 0 || !rows.is_multiple_of(heads) || (rows == heads && batch != 1) {
                    return None;
                }
                axes = [rows / heads, heads, queries, keys];
            }
            _ if (1..=4).contains(&dims.len()) => axes[4 - dims.len()..].copy_from_slice(dims),
            _ => return None,
        }
        let row = match self.half {
            Some(first) if batch != 0 && axes[0] == 2 * batch => usize::from(!first) * batch,
            _ if axes[0] == 1 || axes[0] == batch => 0,
            _ => return None,
        };
        let mut others = axes.iter().zip(self.dims).skip(1);
        others
            .all(|(&axis, full)| axis == 1 || axis == full)
            .then_some((axes, row))
    }

    /// How a contiguous mask of shape `dims` repeats, and the row at which the rows at hand start in it.
    ///
    /// # Errors
    /// If it does not broadcast.
    pub fn broadcast(&self, dims: &[usize]) -> Result<(MaskStrides, usize), Error> {
        let (axes, row) = self.axes(dims).ok_or_else(|| {
            Error::invalid(format!(
                "the mask has shape {dims:?}, which does not broadcast to {:?} (batch, heads, queries, keys)",
                self.dims
            ))
        })?;
        let mut strides = [0isize; 4];
        let mut stride = 1usize;
        for axis in (0..4).rev() {
            if axes[axis] != 1 {
                strides[axis] = stride as isize;
            }
            // No overflow: the tensor exists, and an empty one has no strides to speak of.
            stride = stride.saturating_mul(axes[axis]);
        }
        let [batch, head, query, key] = strides;
        let strides = MaskStrides {
            batch,
            head,
            query,
            key,
        };
        Ok((strides, row))
    }
}

/// A mask of a type that is none.
pub(super) fn unknown_type(element: ElementType) -> Error {
    Error::invalid(format!(
        "the mask is of type {element}, expected float, float16, bfloat16 or bool"
    ))
}

impl<'a> MaskInput<'a> {
    /// # Errors
    /// If the mask's type is none of float, float16, bfloat16 and bool, or its shape does not broadcast.
    pub fn read(tensor: &Tensor<'a>, scores: &Scores, guarded: bool) -> Result<Self, Error> {
        let values = match tensor.element() {
            ElementType::Bool => tensor.bytes().map(MaskValues::Bool),
            ElementType::F32 => tensor.as_slice().map(MaskValues::F32),
            ElementType::F16 => tensor.as_slice().map(MaskValues::F16),
            ElementType::BF16 => tensor.as_slice().map(MaskValues::BF16),
            _ => None,
        };
        let values = values.ok_or_else(|| unknown_type(tensor.element()))?;
        let (strides, row) = scores.broadcast(tensor.dims())?;
        Ok(MaskInput {
            values,
            strides,
            row,
            guarded,
        })
    }

    /// The mask of the rows at hand from `start` on; the kernel checks that what it needs is there.
    pub fn starting_at(&self, start: usize) -> Mask<'a> {
        let first = (self.row + start) * self.strides.batch.unsigned_abs();
        let strides = self.strides;
        let mask = match self.values {
            MaskValues::Bool(values) => Mask::boolean(rest(values, first), strides),
            MaskValues::F32(values) => Mask::additive(rest(values, first), strides),
            MaskValues::F16(values) => Mask::additive(rest(values, first), strides),
            MaskValues::BF16(values) => Mask::additive(rest(values, first), strides),
        };
        mask.guarded(self.guarded)
    }
}

fn rest<T>(values: &[T], first: usize) -> &[T] {
    values.get(first..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCORES: Scores = Scores {
        dims: [2, 3, 5, 7],
        folded: false,
        half: None,
    };

    #[test]
    fn masks_broadcast_as_in_numpy() {
        for (dims, axes) in [
            (&[7][..], [1, 1, 1, 7]),
            (&[5, 7], [1, 1, 5, 7]),
            (&[5, 1], [1, 1, 5, 1]),
            (&[3, 1, 7], [1, 3, 1, 7]),
            (&[2, 1, 1, 7], [2, 1, 1, 7]),
            (&[2, 3, 5, 7], [2, 3, 5, 7]),
        ] {
            assert_eq!(SCORES.axes(dims), Some((axes, 0)), "{dims:?}");
        }
        for dims in [
            &[][..],
            &[5],
            &[2, 7],
            &[2, 5, 7],
            &[4, 1, 1, 7],
            &[1, 2, 1, 7],
            &[1, 2, 3, 5, 7],
            &[6, 5, 7],
        ] {
            assert_eq!(SCORES.axes(dims), None, "{dims:?}");
        }
    }

    #[test]
    fn heads_folded_into_the_batch_are_in_the_mask_too() {
        let scores = Scores {
            folded: true,
            ..SCORES
        };
        assert_eq!(scores.axes(&[6, 5, 7]), Some(([2, 3, 5, 7], 0)));
        assert_eq!(scores.axes(&[1, 5, 7]), Some(([1, 1, 5, 7], 0)));
        assert_eq!(scores.axes(&[3, 5, 7]), None);
        assert_eq!(scores.axes(&[12, 5, 7]), None);
        let half = Scores {
            half: Some(false),
            ..scores
        };
        assert_eq!(half.axes(&[12, 5, 7]), Some(([4, 3, 5, 7], 2)));
    }

    #[test]
    fn of_a_whole_batch_the_half_at_hand_is_taken() {
        for (first, row) in [(true, 0), (false, 2)] {
            let half = Scores {
                half: Some(first),
                ..SCORES
            };
            assert_eq!(half.axes(&[4, 1, 1, 7]), Some(([4, 1, 1, 7], row)));
            assert_eq!(half.axes(&[2, 1, 1, 7]), Some(([2, 1, 1, 7], 0)));
            assert_eq!(half.axes(&[1, 1, 1, 7]), Some(([1, 1, 1, 7], 0)));
            assert_eq!(half.axes(&[8, 1, 1, 7]), None);
        }
    }
}
