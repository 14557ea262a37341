//! Software prefetch: which cache lines a task will need next, issued from inside the matrix kernel's loop.
//!
//! Owns what is prefetched and at what rate. The task decides when. Nothing here reads or writes a tensor.

use std::ops::Range;

use super::isa::{Backend, Native};
use super::load_store::{BatchHead, offset};
use crate::tensor::{Input, Output};

/// The cache lines of some tokens of some heads: the first line of each token, then the second, so that many addresses in
/// a row are a constant distance apart.
pub(crate) struct LineStream {
    /// Line 0 of token 0 of this head.
    first: *const u8,
    /// Bytes from token to token.
    distance: isize,
    tokens: usize,
    /// Cache lines of a token.
    lines: usize,
    /// Heads left, this one included.
    heads: usize,
    /// Bytes from head to head.
    head: isize,
    /// What is next in this head; its line is below `lines` unless no head is left.
    line: usize,
    token: usize,
}

impl LineStream {
    /// Tokens `tokens` of some heads. Layouts whose channels are not contiguous are left to the hardware prefetcher.
    pub fn new(
        t: &Input<'_>,
        batch: usize,
        heads: Range<usize>,
        tokens: Range<usize>,
        channels: usize,
    ) -> Self {
        let (s, size) = (t.strides, t.dtype.size() as isize);
        if heads.is_empty() || s.channel != 1 {
            return Self::empty();
        }
        let first = BatchHead {
            batch,
            head: heads.start,
        };
        let first = (t.data).wrapping_offset(offset(s, first, tokens.start, 0) * size);
        let (distance, n) = (s.token * size, tokens.len());
        // Contiguous heads are one long row of a token.
        if s.head == channels as isize {
            return Self::strided(first, distance, heads.len() * channels * size as usize, n);
        }
        let mut all = Self::strided(first, distance, channels * size as usize, n);
        if all.heads > 0 {
            (all.heads, all.head) = (heads.len(), s.head * size);
        }
        all
    }

    /// `count` rows of `bytes` bytes, the first at `first`, `distance` bytes apart.
    pub fn strided(first: *const u8, distance: isize, bytes: usize, count: usize) -> Self {
        let none = count == 0 || bytes == 0 || !Native::PREFETCHES;
        LineStream {
            first,
            distance,
            tokens: count,
            lines: bytes.div_ceil(64),
            heads: if none { 0 } else { 1 },
            head: 0,
            line: 0,
            token: 0,
        }
    }

    /// Tokens of an output, which will be written.
    pub fn output(
        t: &Output<'_>,
        batch: usize,
        heads: Range<usize>,
        tokens: Range<usize>,
        channels: usize,
    ) -> Self {
        // SAFETY: nothing is read through this input, only prefetched.
        let t = unsafe { Input::from_raw(t.data, t.dtype, t.strides) };
        Self::new(&t, batch, heads, tokens, channels)
    }

    pub fn empty() -> Self {
        Self::strided(std::ptr::null(), 0, 0, 0)
    }

    /// Cache lines not yet prefetched.
    fn remaining(&self) -> usize {
        match self.heads {
            0 => 0,
            heads => (heads * self.lines - self.line) * self.tokens - self.token,
        }
    }

    /// Prefetches all of it now.
    pub fn issue_all(mut self) {
        loop {
            let mut run = self.run(usize::MAX);
            if run.count == 0 {
                return;
            }
            for _ in 0..run.count {
                run.issue();
            }
        }
    }

    /// Up to `most` of the remaining lines; none if none remain.
    #[inline(always)]
    fn run(&mut self, most: usize) -> PrefetchRun {
        if self.heads == 0 {
            return PrefetchRun::NOTHING;
        }
        let at = self.token as isize * self.distance + self.line as isize * 64;
        let run = PrefetchRun {
            next: self.first.wrapping_offset(at),
            distance: self.distance,
            count: most.min(self.tokens - self.token),
        };
        self.token += run.count;
        if self.token == self.tokens {
            (self.token, self.line) = (0, self.line + 1);
            if self.line == self.lines {
                (self.line, self.heads) = (0, self.heads - 1);
                self.first = self.first.wrapping_offset(self.head);
            }
        }
        run
    }
}

/// One prefetch is issued per this many k-steps of the matrix kernel. Prefetches share the core's line-fill buffers with
/// demand misses of the L1. On a Xeon (Emerald Rapids, 16 of them) one per step made a window of 1024 tokens take 4 %
/// longer, full attention 1 %; one per 6 steps 3 %, for then lines arrive late. A constant: where it was a variable, a
/// window took 5 % longer.
pub(crate) const PREFETCH_INTERVAL: usize = 4;

/// Addresses to prefetch one by one inside the matrix kernel's loop. That costs nothing there; separate loops between
/// tiles took 5 % of the time where all was in the cache anyway.
#[derive(Clone, Copy)]
pub(crate) struct PrefetchRun {
    next: *const u8,
    distance: isize,
    pub count: usize,
}

impl PrefetchRun {
    pub const NOTHING: PrefetchRun = PrefetchRun {
        next: std::ptr::null(),
        distance: 0,
        count: 0,
    };

    /// Prefetches the next address into the L2.
    #[inline(always)]
    pub fn issue(&mut self) {
        Native::prefetch(self.next);
        self.next = self.next.wrapping_offset(self.distance);
    }
}

/// What a task will need next.
pub(crate) struct Prefetch {
    /// Most urgent first: the next mask tile, and of the next query block its queries if they are not packed yet, and
    /// residual and output if it is done then.
    pub next_block: [LineStream; 4],
    /// K and V of the next key block.
    pub kv: [LineStream; 2],
    /// Cache lines to prefetch per tile.
    rate: usize,
}

impl Prefetch {
    pub fn empty() -> Self {
        Prefetch {
            next_block: [(); 4].map(|()| LineStream::empty()),
            kv: [(); 2].map(|()| LineStream::empty()),
            rate: 1,
        }
    }

    /// Sets the rate so that after so many tiles `next_block` is prefetched, and one in `steps` of the lines of `kv`.
    pub fn set_rate(&mut self, tiles: usize, steps: usize) {
        let remaining = |of: &[LineStream]| of.iter().map(LineStream::remaining).sum::<usize>();
        let lines = remaining(&self.next_block) + remaining(&self.kv) / steps;
        // Three times as much: a run ends with the tokens, and at the edges of a band tiles have few steps. With twice as
        // much a window takes 2 % longer.
        self.rate = 1 + 3 * lines / tiles;
    }

    /// What to prefetch in a tile of so many k-steps.
    #[inline(always)]
    pub fn run(&mut self, steps: usize) -> PrefetchRun {
        for list in self.next_block.iter_mut().chain(&mut self.kv) {
            let run = list.run(self.rate.min(steps / PREFETCH_INTERVAL));
            if run.count > 0 {
                return run;
            }
        }
        PrefetchRun::NOTHING
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// Addresses of runs of at most `most`, in order; what is left is counted on the way.
    fn addresses(mut stream: LineStream, most: usize) -> Vec<usize> {
        let mut all = Vec::new();
        loop {
            let left = stream.remaining();
            let run = stream.run(most);
            assert!(run.count <= most && left == run.count + stream.remaining());
            if run.count == 0 {
                assert_eq!(left, 0);
                return all;
            }
            let at = |i: usize| run.next.wrapping_offset(i as isize * run.distance) as usize;
            all.extend((0..run.count).map(at));
        }
    }

    #[test]
    fn every_line_of_every_token_is_prefetched_once() {
        // Tokens 3 to 7 of heads 1 and 2 of `[batch, heads, tokens, channels]`, 80 bytes a token: two cache lines.
        let (heads, tokens, channels) = (4, 9, 20);
        let data = vec![0f32; 2 * heads * tokens * channels];
        let t = Input::from_slice(&data, crate::tensor::Strides::bhsd(heads, tokens, channels));
        let mut want = Vec::new();
        for head in [1, 2] {
            for token in 3..8 {
                let at = &raw const data[((heads + head) * tokens + token) * channels] as usize;
                want.extend([at, at + 64]);
            }
        }
        want.sort();
        for most in [1, 2, 4, 5, 7, usize::MAX] {
            let mut all = addresses(LineStream::new(&t, 1, 1..3, 3..8, channels), most);
            all.sort();
            assert_eq!(all, want, "runs of {most}");
        }
    }

    #[test]
    fn contiguous_heads_are_one_row() {
        let (heads, tokens, channels) = (3, 5, 16);
        let data = vec![0f32; heads * tokens * channels];
        let t = Input::from_slice(&data, crate::tensor::Strides::bshd(heads, tokens, channels));
        let mut all = addresses(LineStream::new(&t, 0, 1..3, 2..4, channels), 100);
        all.sort();
        let at =
            |token: usize, head: usize| &raw const data[(token * heads + head) * channels] as usize;
        assert_eq!(all, [at(2, 1), at(2, 2), at(3, 1), at(3, 2)]);
    }

    #[test]
    fn nothing_remains_of_nothing() {
        let data = [0f32; 8];
        let t = Input::from_slice(&data, crate::tensor::Strides::bshd(1, 2, 4));
        for (heads, tokens) in [(0..0, 0..2), (0..1, 1..1)] {
            assert_eq!(addresses(LineStream::new(&t, 0, heads, tokens, 4), 3), []);
        }
        assert_eq!(addresses(LineStream::empty(), 3), []);
    }

    #[test]
    fn all_of_it_is_prefetched_in_as_many_tiles() {
        let data = vec![0f32; 640 * 20];
        let t = Input::from_slice(&data, crate::tensor::Strides::bshd(1, 640, 20));
        let mut prefetch = Prefetch::empty();
        prefetch.next_block[1] = LineStream::new(&t, 0, 0..1, 0..64, 20);
        prefetch.kv[0] = LineStream::new(&t, 0, 0..1, 64..184, 20);
        prefetch.set_rate(32, 8);
        let issued: usize = (0..32).map(|_| prefetch.run(72).count).sum();
        assert!(issued >= 2 * 64 + 2 * 120 / 8, "{issued} lines");
        assert_eq!(prefetch.next_block[1].remaining(), 0);
    }
}
