//! Numbers that begin on a cache line, as those of ONNX Runtime's allocator do.
//!
//! A vector's begin 16 bytes behind one as soon as they come from pages of their own; then most loads of 64 bytes touch two
//! lines, and window attention that adds such a residual took some 2 % longer.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Memory for a tensor.
#[derive(Debug)]
pub(super) struct Aligned<T> {
    /// Never grows, so that it stays where it is.
    memory: Vec<T>,
    /// Where the tensor begins.
    start: usize,
}

impl<T: Clone + Default> Aligned<T> {
    /// Of `len` zeros; `None` if the system has no memory for them.
    pub fn new(len: usize) -> Option<Self> {
        let room = len.checked_add(LINE / size_of::<T>())?;
        let mut memory: Vec<T> = Vec::new();
        memory.try_reserve_exact(room).ok()?;
        let start = memory.as_ptr().align_offset(LINE);
        memory.resize(start.checked_add(len)?, T::default());
        Some(Aligned { memory, start })
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[self.start..]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begins_on_a_line<T: Clone + Default + PartialEq>() {
        for len in [0, 1, 7, 100_000] {
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
