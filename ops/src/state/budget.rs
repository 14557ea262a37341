//! How many bytes of tensors may be cached, and how many are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The bytes cached in the whole process.
#[derive(Debug, Default)]
pub struct Budget {
    used: AtomicU64,
    peak: AtomicU64,
}

impl Budget {
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    /// Forgets the peak so far.
    pub fn reset_peak(&self) {
        self.peak.store(self.used(), Ordering::Relaxed);
    }

    /// Takes `bytes` of the first `limit`; `None` if they are not left.
    pub fn take(self: &Arc<Self>, bytes: u64, limit: u64) -> Option<Lease> {
        let taken = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(bytes).filter(|&total| total <= limit)
            })
            .ok()?;
        self.peak.fetch_max(taken + bytes, Ordering::Relaxed);
        Some(Lease {
            budget: Arc::clone(self),
            bytes,
        })
    }
}

/// Bytes of the budget that a cached tensor holds; dropping it gives them back.
#[derive(Debug)]
pub struct Lease {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_never_exceed_the_limit_and_come_back() {
        let budget = Arc::new(Budget::default());
        let first = budget.take(60, 100).expect("60 of 100");
        assert!(budget.take(41, 100).is_none());
        let second = budget.take(40, 100).expect("the other 40");
        assert_eq!((budget.used(), budget.peak()), (100, 100));
        drop(first);
        assert!(budget.take(u64::MAX, 100).is_none());
        drop(second);
        assert_eq!((budget.used(), budget.peak()), (0, 100));
    }
}
