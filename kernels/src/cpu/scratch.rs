//! Memory a thread reuses from task to task and call to call, so that a call allocates nothing once warm.

use std::cell::RefCell;
use std::panic::resume_unwind;

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; 16]);

/// Cache lines of the smallest buffer, 32 KiB: threads keep theirs, and small requests may be served from a reserve that
/// is for what ends.
const MIN_LINES: usize = 512;

/// A growing buffer of floats on cache-line boundaries.
#[derive(Default)]
pub(crate) struct Scratch(Vec<Line>);

impl Scratch {
    /// Cuts the buffer into slices of `lens`, each on a cache line. Their contents are left from earlier use.
    ///
    /// # Panics
    /// If there is no memory for it, without a word on stderr: the caller reports it.
    pub fn cut<const N: usize>(&mut self, lens: [usize; N]) -> [&mut [f32]; N] {
        let lines: usize = lens.iter().map(|n| n.div_ceil(16)).sum();
        if lines > self.0.len() {
            let lines = lines.max(MIN_LINES);
            // Unwinding can become an error of the run; an allocation that fails ends the process. Not a panic: its hook may
            // want a backtrace, and memory for that.
            if self.0.try_reserve(lines - self.0.len()).is_err() {
                let bytes = lines * size_of::<Line>();
                resume_unwind(Box::new(format!("no memory for {bytes} bytes of scratch")));
            }
            self.0.resize(lines, Line([0.0; 16]));
        }
        let mut rest = &mut self.0[..];
        lens.map(|n| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(n.div_ceil(16));
            rest = tail;
            // SAFETY: `Line` is 16 floats without padding, and `head` has at least n of them.
            unsafe { std::slice::from_raw_parts_mut(head.as_mut_ptr().cast::<f32>(), n) }
        })
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static KV: RefCell<Scratch> = RefCell::default();
}

/// Lends the calling thread's memory for the keys and values of a call, which all of its tasks read.
pub(crate) fn with_kv<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    borrow(&KV, f)
}

/// Lends the calling thread's scratch. A task that runs inside another one (a pool that helps while it waits) gets
/// a fresh buffer.
pub(crate) fn with<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    borrow(&SCRATCH, f)
}

fn borrow<R>(
    scratch: &'static std::thread::LocalKey<RefCell<Scratch>>,
    f: impl FnOnce(&mut Scratch) -> R,
) -> R {
    scratch.with(|s| match s.try_borrow_mut() {
        Ok(mut s) => f(&mut s),
        Err(_) => f(&mut Scratch::default()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_separate_and_aligned() {
        let mut scratch = Scratch::default();
        for lens in [[1, 0, 17], [40, 16, 3]] {
            let cut = scratch.cut(lens);
            for (i, slice) in cut.into_iter().enumerate() {
                assert_eq!(slice.len(), lens[i]);
                assert_eq!(slice.as_ptr() as usize % 64, 0);
                slice.fill(i as f32);
            }
        }
        let [a, b, c] = scratch.cut([40, 16, 3]);
        assert!(
            a.iter().all(|&x| x == 0.0)
                && b.iter().all(|&x| x == 1.0)
                && c.iter().all(|&x| x == 2.0)
        );
    }

    #[test]
    fn a_task_inside_a_task_gets_its_own() {
        with(|outer| {
            let [a] = outer.cut([4]);
            a.fill(1.0);
            with(|inner| inner.cut([4])[0].fill(2.0));
            assert_eq!(a, [1.0; 4]);
        });
    }
}
