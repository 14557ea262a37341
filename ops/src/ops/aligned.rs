//! Numbers that begin on a cache line, as those of ONNX Runtime's allocator do.
//!
//! A vector's begin 16 bytes behind one as soon as they come from pages of their own; then most loads of 64 bytes touch two
//! lines, and window attention that adds such a residual took some 2 % longer.

use std::ops::{Deref, DerefMut, Range};

use bytemuck::Zeroable;

use crate::abi::allocator;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Memory for a tensor.
#[derive(Debug)]
pub(super) struct Aligned<T> {
    memory: Box<[T]>,
    /// Where the tensor is in it.
    tensor: Range<usize>,
}

impl<T: Zeroable> Aligned<T> {
    /// Of `len` zeros; `None` if the system has no memory for them. Whoever writes it first touches its pages.
    pub fn new(len: usize) -> Option<Self> {
        let room = len.checked_add(LINE / size_of::<T>())?;
        let memory = bytemuck::allocation::try_zeroed_slice_box::<T>(room).ok()?;
        allocator::in_large_pages(&memory);
        let start = memory.as_ptr().align_offset(LINE);
        Some(Aligned {
            memory,
            tensor: start..start + len,
        })
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[self.tensor.clone()]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.tensor.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begins_on_a_line<T: Zeroable + Default + PartialEq>() {
        for len in [0, 1, 7, 100_000, 5_000_000] {
            let numbers = Aligned::<T>::new(len).expect("memory");
            assert_eq!(numbers.as_ptr() as usize % LINE, 0, "{len}");
            assert_eq!(numbers.len(), len);
            assert!(numbers.iter().all(|x| *x == T::default()));
        }
    }

    #[test]
    fn tensors_begin_on_a_cache_line() {
        begins_on_a_line::<f32>();
        begins_on_a_line::<half::f16>();
    }

    #[test]
    fn what_no_machine_has_is_none() {
        assert!(Aligned::<f32>::new(usize::MAX / 8).is_none());
        assert!(Aligned::<f32>::new(usize::MAX).is_none());
    }
}
