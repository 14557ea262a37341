//! Asking for memory while something else is computed.
//!
//! Owns what is asked for and how fast; when, is the task's business. Nothing here reads or writes a tensor.

use std::ops::Range;

use super::pack::{Plane, offset};
use crate::api::{Input, Output};

/// Some tokens of some heads, asked for a few at a time.
pub(crate) struct Ahead {
    next: *const u8,
    token: isize,
    bytes: isize,
    /// Tokens left of this head.
    left: usize,
    /// From the end of a head to the start of the next.
    head: isize,
    tokens: usize,
    heads: usize,
}

impl Ahead {
    /// Of tokens `tokens` of some heads. Layouts whose channels are not neighbours are left to the hardware.
    pub fn new(
        t: &Input<'_>,
        batch: usize,
        heads: Range<usize>,
        tokens: Range<usize>,
        channels: usize,
    ) -> Self {
        let (s, size) = (t.strides, t.dtype.size() as isize);
        if heads.is_empty() || tokens.is_empty() || s.channel != 1 {
            return Self::nothing();
        }
        let first = Plane {
            batch,
            head: heads.start,
        };
        let next = (t.data).wrapping_offset(offset(s, first, tokens.start, 0) * size);
        let n = tokens.len();
        if s.head == channels as isize {
            let bytes = s.head * heads.len() as isize * size;
            return Self::lines(next, s.token * size, bytes, n);
        }
        Ahead {
            head: (s.head - n as isize * s.token) * size,
            heads: heads.len() - 1,
            ..Self::lines(next, s.token * size, channels as isize * size, n)
        }
    }

    /// Of `count` lines of `bytes`, the first at `next`, `distance` bytes apart.
    pub fn lines(next: *const u8, distance: isize, bytes: isize, count: usize) -> Self {
        Ahead {
            next,
            token: distance,
            bytes,
            left: count,
            head: 0,
            tokens: count,
            heads: 0,
        }
    }

    /// Of an output, which is written.
    pub fn output(
        t: &Output<'_>,
        batch: usize,
        heads: Range<usize>,
        tokens: Range<usize>,
        channels: usize,
    ) -> Self {
        // SAFETY: nothing is read through this input, only asked for.
        let t = unsafe { Input::from_raw(t.data, t.dtype, t.strides) };
        Self::new(&t, batch, heads, tokens, channels)
    }

    pub fn nothing() -> Self {
        Self::lines(std::ptr::null(), 0, 0, 0)
    }

    /// Tokens not yet asked for.
    fn left(&self) -> usize {
        self.left + self.heads * self.tokens
    }

    /// Asks for all of it now.
    #[inline(always)]
    pub fn all(mut self) {
        self.some(usize::MAX);
    }

    /// Asks for up to `n` more tokens; says how many of them there were not.
    ///
    /// Tight on purpose: with two more branches for each token all of this took 9 % of a window's time where the tensors were
    /// in the cache anyway, and now takes 3 %.
    #[inline(always)]
    fn some(&mut self, mut n: usize) -> usize {
        loop {
            let now = n.min(self.left);
            self.left -= now;
            n -= now;
            for _ in 0..now {
                let (mut at, end) = (self.next, self.next.wrapping_offset(self.bytes));
                while at < end {
                    prefetch(at);
                    at = at.wrapping_add(64);
                }
                self.next = self.next.wrapping_offset(self.token);
            }
            if n == 0 || self.heads == 0 {
                return n;
            }
            self.heads -= 1;
            self.left = self.tokens;
            self.next = self.next.wrapping_offset(self.head);
        }
    }
}

/// Asks for a cache line; on other machines than x86 that is left to the hardware.
#[inline(always)]
fn prefetch(_p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch is allowed on any address; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(_p.cast()) }
    }
}

/// What a task will need, most urgent first.
pub(crate) struct Prefetch {
    /// For the next query block: its queries if they are not packed yet, and the residual and output if it ends then.
    pub next: [Ahead; 3],
    pub mask: Ahead,
    /// The next block of keys, and its values.
    pub keys: [Ahead; 2],
    /// Tokens to ask for at a time.
    rate: usize,
}

impl Prefetch {
    pub fn nothing() -> Self {
        Prefetch {
            next: [(); 3].map(|()| Ahead::nothing()),
            mask: Ahead::nothing(),
            keys: [(); 2].map(|()| Ahead::nothing()),
            rate: 1,
        }
    }

    /// Sets the rate so that after so many pokes all but the keys is asked for, and one in `steps` of these.
    pub fn set_rate(&mut self, pokes: usize, steps: usize) {
        let soon = self.next.iter().chain([&self.mask]).map(Ahead::left);
        let keys: usize = self.keys.iter().map(Ahead::left).sum();
        self.rate = 1 + (soon.sum::<usize>() + keys / steps) / pokes;
    }

    #[inline(always)]
    pub fn poke(&mut self) {
        let [q, residual, out] = &mut self.next;
        let [k, v] = &mut self.keys;
        let mut n = self.rate;
        for list in [&mut self.mask, q, residual, out, k, v] {
            n = list.some(n);
            if n == 0 {
                return;
            }
        }
    }
}
