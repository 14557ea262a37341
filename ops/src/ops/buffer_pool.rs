//! Memory of tensors that are no longer cached, for the next that are: a layer's new residual takes the place of the
//! last layer's old one. New memory costs a fault for each of its pages, and has to be filled before it can be lent.
//!
//! Numbers of whoever had it before are still in it, so it must only go where all of it is overwritten before anybody
//! reads. What is in the pool and what is cached stay inside the budget together.

use std::sync::{Mutex, PoisonError};

use crate::state::Lease;

use super::aligned::Aligned;
use super::process::PROCESS;
use super::tensor_data::{Data, Real};

/// Tensors in the pool at most: one for the next residual, one for the next output.
const CAPACITY: usize = 2;

/// The memory of at most [`CAPACITY`] tensors, the oldest first.
static POOL: Mutex<Vec<Data>> = Mutex::new(Vec::new());

/// Pooled memory of just this length, with old numbers in it, for a tensor that has its part of the budget already.
pub(super) fn acquire<T: Real>(len: usize) -> Option<Aligned<T>> {
    change(|pool| {
        let fits = |data: &Data| T::unwrap(data).is_some_and(|values| values.len() == len);
        let at = pool.iter().position(fits)?;
        T::into_inner(pool.remove(at))
    })
}

/// Takes in the memory of a tensor that is no longer cached.
pub(super) fn release(data: Data, lease: Option<Lease>) {
    change(|pool| {
        // Inside the lock, so that of tensors dropped at the same time one is the last.
        drop(lease);
        if data.bytes() > 0 {
            pool.push(data);
        }
    });
}

/// Changes what is in the pool, and then gives back what is too much.
fn change<R>(f: impl FnOnce(&mut Vec<Data>) -> R) -> R {
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let result = f(&mut pool);
    let newest_first = pool.iter().rev().map(Data::bytes);
    let kept = fitting(newest_first, PROCESS.bytes(), PROCESS.limits.bytes);
    let unwanted = pool.len() - kept;
    let unwanted: Vec<Data> = pool.drain(..unwanted).collect();
    // To free memory takes a while, which others need not wait for.
    drop(pool);
    drop(unwanted);
    result
}

/// How many of these tensors may stay beside `cached` bytes. None once nothing is cached: an idle process holds nothing.
fn fitting(sizes: impl Iterator<Item = u64>, cached: u64, limit: u64) -> usize {
    if cached == 0 {
        return 0;
    }
    let mut total = cached;
    let fits = |size: u64| {
        total = total.saturating_add(size);
        total <= limit
    };
    sizes
        .take(CAPACITY)
        .map(fits)
        .take_while(|&fits| fits)
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pooled_fits_the_budget_beside_what_is_cached() {
        let fitting = |sizes: &[u64], cached, limit| fitting(sizes.iter().copied(), cached, limit);
        assert_eq!(fitting(&[10, 10, 10], 50, 100), CAPACITY);
        assert_eq!(fitting(&[10, 10], 80, 100), 2);
        assert_eq!(fitting(&[10, 10], 81, 100), 1);
        assert_eq!(fitting(&[10, 10], 91, 100), 0);
        // The newest stay; an older one that would still fit does not matter.
        assert_eq!(fitting(&[60, 10], 50, 100), 0);
        assert_eq!(fitting(&[10, 10], 0, 100), 0);
        assert_eq!(fitting(&[u64::MAX, 10], 1, 100), 0);
    }
}
