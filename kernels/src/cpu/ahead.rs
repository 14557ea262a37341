//! Asking for memory while something else is computed.
//!
//! Owns what is asked for and how fast; when, is the task's business, and products do it in their steps. Nothing here reads
//! or writes a tensor.

use std::ops::Range;

use super::pack::{Plane, offset};
use crate::api::{Input, Output};

/// Lines of tokens of some heads, asked for some pieces of a cache line's length at a time: the first piece of each token,
/// then the second, so that the addresses of many are a constant distance apart.
pub(crate) struct Ahead {
    /// Piece 0 of token 0 of this head.
    first: *const u8,
    /// Bytes from token to token.
    distance: isize,
    tokens: usize,
    /// Pieces of a token.
    pieces: usize,
    /// Heads left, this one included.
    heads: usize,
    /// Bytes from head to head.
    head: isize,
    /// What is next in this head; its piece is below `pieces` unless no head is left.
    piece: usize,
    token: usize,
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
        if heads.is_empty() || s.channel != 1 {
            return Self::nothing();
        }
        let first = Plane {
            batch,
            head: heads.start,
        };
        let first = (t.data).wrapping_offset(offset(s, first, tokens.start, 0) * size);
        let (distance, n) = (s.token * size, tokens.len());
        // Heads side by side are one long line of a token.
        if s.head == channels as isize {
            return Self::lines(first, distance, heads.len() * channels * size as usize, n);
        }
        let mut all = Self::lines(first, distance, channels * size as usize, n);
        if all.heads > 0 {
            (all.heads, all.head) = (heads.len(), s.head * size);
        }
        all
    }

    /// Of `count` lines of `bytes`, the first at `first`, `distance` bytes apart.
    pub fn lines(first: *const u8, distance: isize, bytes: usize, count: usize) -> Self {
        // On other machines than x86 it is left to the hardware.
        let none = count == 0 || bytes == 0 || cfg!(not(target_arch = "x86_64"));
        Ahead {
            first,
            distance,
            tokens: count,
            pieces: bytes.div_ceil(64),
            heads: if none { 0 } else { 1 },
            head: 0,
            piece: 0,
            token: 0,
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

    /// Cache lines not yet asked for.
    fn left(&self) -> usize {
        match self.heads {
            0 => 0,
            heads => (heads * self.pieces - self.piece) * self.tokens - self.token,
        }
    }

    /// Asks for all of it now.
    pub fn all(mut self) {
        loop {
            let mut run = self.run(usize::MAX);
            if run.count == 0 {
                return;
            }
            for _ in 0..run.count {
                run.ask();
            }
        }
    }

    /// Up to `most` of what is left; nothing if nothing is.
    #[inline(always)]
    fn run(&mut self, most: usize) -> Run {
        if self.heads == 0 {
            return Run::NOTHING;
        }
        let at = self.token as isize * self.distance + self.piece as isize * 64;
        let run = Run {
            next: self.first.wrapping_offset(at),
            distance: self.distance,
            count: most.min(self.tokens - self.token),
        };
        self.token += run.count;
        if self.token == self.tokens {
            (self.token, self.piece) = (0, self.piece + 1);
            if self.piece == self.pieces {
                (self.piece, self.heads) = (0, self.heads - 1);
                self.first = self.first.wrapping_offset(self.head);
            }
        }
        run
    }
}

/// Steps of a product to each address that is asked for. What was asked for waits for memory in one of the dozen places where
/// loads that miss the first cache wait too: with an address in each step a window of 1024 tokens took 4 % longer on a Xeon
/// (Emerald Rapids), full attention 1 %; in each sixth, 3 %, for then not all is there in time. A constant: where it was a
/// variable, a window took 5 % longer.
pub(crate) const STEPS: usize = 4;

/// Addresses to be asked for one by one, in the steps of a product: that costs nothing there, where loops of their own
/// between tiles took 5 % of the time where all was in the cache anyway.
#[derive(Clone, Copy)]
pub(crate) struct Run {
    next: *const u8,
    distance: isize,
    pub count: usize,
}

impl Run {
    pub const NOTHING: Run = Run {
        next: std::ptr::null(),
        distance: 0,
        count: 0,
    };

    /// Asks for the next address.
    #[inline(always)]
    pub fn ask(&mut self) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: a prefetch is allowed on any address; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(self.next.cast()) }
        }
        self.next = self.next.wrapping_offset(self.distance);
    }
}

/// What a task will need.
pub(crate) struct Prefetch {
    /// Most urgent first: the mask for what comes next, and of the next query block its queries if they are not packed yet,
    /// and the residual and output if it ends then.
    pub soon: [Ahead; 4],
    /// The next block of keys, and its values.
    pub keys: [Ahead; 2],
    /// Cache lines to ask for in a tile.
    rate: usize,
}

impl Prefetch {
    pub fn nothing() -> Self {
        Prefetch {
            soon: [(); 4].map(|()| Ahead::nothing()),
            keys: [(); 2].map(|()| Ahead::nothing()),
            rate: 1,
        }
    }

    /// Sets the rate so that after so many tiles all but the keys is asked for, and one in `steps` of these.
    pub fn set_rate(&mut self, tiles: usize, steps: usize) {
        let left = |of: &[Ahead]| of.iter().map(Ahead::left).sum::<usize>();
        let lines = left(&self.soon) + left(&self.keys) / steps;
        // Three times as much, for runs end where a piece of a token does, and in the corners of a band tiles have few steps:
        // with twice as much a window takes 2 % longer.
        self.rate = 1 + 3 * lines / tiles;
    }

    /// What to ask for in a tile of so many steps.
    #[inline(always)]
    pub fn run(&mut self, steps: usize) -> Run {
        for list in self.soon.iter_mut().chain(&mut self.keys) {
            let run = list.run(self.rate.min(steps / STEPS));
            if run.count > 0 {
                return run;
            }
        }
        Run::NOTHING
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    /// Addresses of runs of at most `most`, in order; what is left is counted on the way.
    fn addresses(mut ahead: Ahead, most: usize) -> Vec<usize> {
        let mut all = Vec::new();
        loop {
            let left = ahead.left();
            let run = ahead.run(most);
            assert!(run.count <= most && left == run.count + ahead.left());
            if run.count == 0 {
                assert_eq!(left, 0);
                return all;
            }
            let at = |i: usize| run.next.wrapping_offset(i as isize * run.distance) as usize;
            all.extend((0..run.count).map(at));
        }
    }

    #[test]
    fn every_piece_of_every_token_is_asked_for_once() {
        // Tokens 3 to 7 of heads 1 and 2 of `[batch, heads, tokens, channels]`, 80 bytes a token: two pieces.
        let (heads, tokens, channels) = (4, 9, 20);
        let data = vec![0f32; 2 * heads * tokens * channels];
        let t = Input::from_slice(&data, crate::api::Strides::bhsd(heads, tokens, channels));
        let mut want = Vec::new();
        for head in [1, 2] {
            for token in 3..8 {
                let at = &raw const data[((heads + head) * tokens + token) * channels] as usize;
                want.extend([at, at + 64]);
            }
        }
        want.sort();
        for most in [1, 2, 4, 5, 7, usize::MAX] {
            let mut all = addresses(Ahead::new(&t, 1, 1..3, 3..8, channels), most);
            all.sort();
            assert_eq!(all, want, "runs of {most}");
        }
    }

    #[test]
    fn heads_side_by_side_are_one_line() {
        let (heads, tokens, channels) = (3, 5, 16);
        let data = vec![0f32; heads * tokens * channels];
        let t = Input::from_slice(&data, crate::api::Strides::bshd(heads, tokens, channels));
        let mut all = addresses(Ahead::new(&t, 0, 1..3, 2..4, channels), 100);
        all.sort();
        let at =
            |token: usize, head: usize| &raw const data[(token * heads + head) * channels] as usize;
        assert_eq!(all, [at(2, 1), at(2, 2), at(3, 1), at(3, 2)]);
    }

    #[test]
    fn nothing_is_left_of_nothing() {
        let data = [0f32; 8];
        let t = Input::from_slice(&data, crate::api::Strides::bshd(1, 2, 4));
        for (heads, tokens) in [(0..0, 0..2), (0..1, 1..1)] {
            assert_eq!(addresses(Ahead::new(&t, 0, heads, tokens, 4), 3), []);
        }
        assert_eq!(addresses(Ahead::nothing(), 3), []);
    }

    #[test]
    fn all_of_it_is_asked_for_in_as_many_tiles() {
        let data = vec![0f32; 640 * 20];
        let t = Input::from_slice(&data, crate::api::Strides::bshd(1, 640, 20));
        let mut prefetch = Prefetch::nothing();
        prefetch.soon[1] = Ahead::new(&t, 0, 0..1, 0..64, 20);
        prefetch.keys[0] = Ahead::new(&t, 0, 0..1, 64..184, 20);
        prefetch.set_rate(32, 8);
        let asked: usize = (0..32).map(|_| prefetch.run(72).count).sum();
        assert!(asked >= 2 * 64 + 2 * 120 / 8, "{asked} lines");
        assert_eq!(prefetch.soon[1].left(), 0);
    }
}
