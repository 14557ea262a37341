//! Keys and values as tasks read them: float32 or pairs of bfloat16, each (batch, head) by itself, in blocks of [`KEYS`].
//!
//! Tensors that are like that already are read where they are, and so are those with other heads between the lines of
//! one, where few queries see a key and [`TasksCopy`] does not say otherwise. Others are copied: by each task for itself, or,
//! where many see a key, once per call, on all threads. In `[batch, tokens, heads, channels]` each token of a head lies in a
//! page of its own, whose translation costs as much as its data; a copy of all heads visits it once.
//!
//! Owns where they are read and the copies in advance. What is computed does not depend on either, bit for bit.

use std::ops::Range;

use super::ahead::Ahead;
use super::limits::Limits;
use super::pack::{Order, Plane, gather, offset, read_line};
use super::pairs::{read_across, read_along};
use super::scratch::Scratch;
use crate::api::{Attention, DType, Input, Mode};
use crate::parallel::Parallel;

/// Keys in a block. With the queries of a block it sets the working set: scores, Q, O, K and V of a block should stay in
/// L2 and mostly in L1. Even, so that no pair of keys is in two blocks.
pub(crate) const KEYS: usize = 120;

/// Which keys and values each task copies for itself, of those with other heads between their lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TasksCopy {
    Nothing,
    /// Values whose lines lie a multiple of 4 KB apart, and so in one set of the first cache, which holds a dozen of them: a
    /// tile of outputs reads some channels of all keys.
    CollidingValues,
    /// All; where a band hides most of them, values only, and only those whose lines lie a multiple of 2 KB apart, in two sets.
    All,
}

impl TasksCopy {
    /// Where keys and values are read that are not copied in advance.
    fn places(self, values: &Input<'_>, mode: &Mode<'_>) -> [Place; 2] {
        let line = values.strides.token.unsigned_abs() * values.dtype.size();
        let copied = match self {
            TasksCopy::Nothing => [false, false],
            TasksCopy::CollidingValues => [false, line.is_multiple_of(4096)],
            TasksCopy::All => {
                let outside = !matches!(mode, Mode::Window { .. });
                [outside, outside || line.is_multiple_of(2048)]
            }
        };
        copied.map(|copied| if copied { Place::Task } else { Place::There })
    }
}

/// Where the blocks of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the tensor itself.
    There,
    /// In memory of the call: for each plane its blocks, `[tokens, channels]` or `[channels, KEYS]`.
    Call,
    /// Each task copies them for itself.
    Task,
}

/// What a 32-bit word of a matrix holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    /// A float32.
    Number,
    /// Two neighbouring channels of a key, in bfloat16: scores are sums over channels.
    Channels,
    /// Two neighbouring keys of a channel, in bfloat16: outputs are sums over keys.
    Keys,
}

impl Word {
    /// Words that keys and channels take, along each.
    fn of(self, keys: usize, channels: usize) -> (usize, usize) {
        match self {
            Word::Number => (keys, channels),
            Word::Channels => (keys, channels.div_ceil(2)),
            Word::Keys => (keys.div_ceil(2), channels),
        }
    }
}

/// Where the keys and the values of a call are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    k: (Place, Word),
    v: (Place, Word),
    /// Words that one plane of both needs in memory of the call.
    plane: usize,
}

impl Places {
    /// `each` is how many numbers a word holds.
    pub fn of(a: &Attention<'_>, each: usize, limits: Limits) -> Self {
        let seen_by = match &a.mode {
            Mode::Window { band, .. } => (band.half_width.saturating_mul(2))
                .saturating_add(band.text + 1)
                .min(a.shape.q_tokens),
            _ => a.shape.q_tokens,
        };
        let early = Places::new(a, each, [Place::Call; 2]);
        if seen_by > limits.queries && early.plane <= limits.words {
            early
        } else {
            Places::new(a, each, limits.tasks_copy.places(&a.v, &a.mode))
        }
    }

    /// `apart`: where keys and values are read whose lines have other heads between them.
    fn new(a: &Attention<'_>, each: usize, apart: [Place; 2]) -> Self {
        let s = a.shape;
        let place = |t: &Input<'_>, word: Word, channels: usize, apart: Place| {
            // Lines beside each other are read as fast as a copy of them.
            let dense = t.strides.token == channels as isize;
            let words = match word {
                Word::Number => t.dtype == DType::F32,
                Word::Channels => {
                    t.dtype == DType::BF16 && channels.is_multiple_of(2) && t.strides.token % 2 == 0
                }
                Word::Keys => false,
            };
            let lines = words && t.strides.channel == 1 && t.strides.token > 0;
            match (lines, apart) {
                (true, apart) if dense || apart == Place::There => Place::There,
                (_, Place::Call) => Place::Call,
                _ => Place::Task,
            }
        };
        let (k_word, v_word) = match each {
            1 => (Word::Number, Word::Number),
            _ => (Word::Channels, Word::Keys),
        };
        let k = (place(&a.k, k_word, s.head_dim, apart[0]), k_word);
        let v = (place(&a.v, v_word, s.v_dim, apart[1]), v_word);
        let words = |(place, word): (Place, Word), channels| match place {
            // Inputs that repeat elements may have any number of tokens.
            Place::Call => {
                let (along_keys, along_channels) = word.of(KEYS, channels);
                (s.kv_tokens.div_ceil(KEYS))
                    .saturating_mul(along_keys)
                    .saturating_mul(along_channels)
            }
            _ => 0,
        };
        Places {
            k,
            v,
            plane: words(k, s.head_dim).saturating_add(words(v, s.v_dim)),
        }
    }
}

/// A part of a call: some rows of the batch, or some heads of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub batch: Range<usize>,
    pub kv_heads: Range<usize>,
}

impl Part {
    /// The parts of a call. One after the other: there are as many as rows, which may be thousands.
    pub fn all(a: &Attention<'_>, places: Places, limits: Limits) -> impl Iterator<Item = Part> {
        let planes = limits.words.checked_div(places.plane);
        Part::of(
            a.shape.batch,
            a.shape.kv_heads,
            planes.unwrap_or(usize::MAX),
        )
    }

    /// Parts of at most `planes` planes, or one.
    fn of(batch: usize, kv_heads: usize, planes: usize) -> impl Iterator<Item = Part> {
        let rows = (planes / kv_heads).clamp(1, batch);
        let heads = planes.clamp(1, kv_heads);
        (0..batch).step_by(rows).flat_map(move |b| {
            (0..kv_heads).step_by(heads).map(move |h| Part {
                batch: b..batch.min(b + rows),
                kv_heads: h..kv_heads.min(h + heads),
            })
        })
    }

    fn planes(&self) -> usize {
        self.batch.len() * self.kv_heads.len()
    }

    /// The place of a plane among those of the part.
    fn index(&self, p: Plane) -> usize {
        (p.batch - self.batch.start) * self.kv_heads.len() + p.head - self.kv_heads.start
    }
}

/// The keys or the values of a part.
pub(crate) struct Matrix<'a> {
    from: Input<'a>,
    channels: usize,
    tokens: usize,
    order: Order,
    /// Words between the lines of two keys, or of two pairs of keys.
    row: usize,
    part: Part,
    place: Place,
    word: Word,
    /// The memory of the call, if that is the place.
    copy: *mut f32,
}

// SAFETY: while tasks share a matrix they only read what it points to; while it is filled each task writes blocks of
// its own.
unsafe impl Sync for Matrix<'_> {}

impl<'a> Matrix<'a> {
    fn new(
        from: Input<'a>,
        part: &Part,
        tokens: usize,
        channels: usize,
        (place, word): (Place, Word),
    ) -> Self {
        let (stride, along_channels) = word.of(KEYS, channels);
        let order = match place {
            Place::There => Order::Tokens,
            _ => Order::natural(from.strides, stride),
        };
        let row = match place {
            Place::There => word.of(0, from.strides.token.unsigned_abs()).1,
            _ => along_channels,
        };
        Matrix {
            from,
            channels,
            tokens,
            order,
            row,
            part: part.clone(),
            place,
            word,
            copy: std::ptr::null_mut(),
        }
    }

    /// Words of a block.
    fn block_len(&self) -> usize {
        let (along_keys, along_channels) = self.word.of(KEYS, self.channels);
        along_keys * along_channels
    }

    /// Words that the call has for the matrix.
    fn len(&self) -> usize {
        match self.place {
            Place::Call => self.part.planes() * self.tokens.div_ceil(KEYS) * self.block_len(),
            _ => 0,
        }
    }

    /// Words that a task needs for a block of a head.
    pub fn task_len(&self) -> usize {
        match self.place {
            Place::Task => self.block_len(),
            _ => 0,
        }
    }

    /// The block `keys` of a plane, whose first is a multiple of [`KEYS`]. `room` has [`Matrix::task_len`] words.
    /// Where pairs are read in the tensor itself, words are not aligned.
    ///
    /// # Safety
    /// The keys must lie inside the shape.
    #[inline(always)]
    pub unsafe fn block(&self, p: Plane, keys: Range<usize>, room: &mut [f32]) -> *const f32 {
        match self.place {
            Place::There => {
                let at = offset(self.from.strides, p, keys.start, 0);
                let bytes = at * self.from.dtype.size() as isize;
                self.from.data.wrapping_offset(bytes).cast()
            }
            Place::Call => self.copy.wrapping_add(self.at(p, keys.start)),
            Place::Task => {
                // SAFETY (both): promised by the caller.
                if self.word == Word::Number {
                    unsafe { gather(&self.from, p, keys, self.channels, self.order, room) };
                } else {
                    for i in 0..self.shape(keys.len()).0 {
                        unsafe { self.read(p, keys.clone(), i, room) };
                    }
                }
                room.as_ptr()
            }
        }
    }

    /// Where in the memory of the call a block is.
    fn at(&self, p: Plane, first: usize) -> usize {
        let blocks = self.tokens.div_ceil(KEYS);
        (self.part.index(p) * blocks + first / KEYS) * self.block_len()
    }

    /// Lines of a block with so many keys, words between two of them, and words of each.
    #[inline(always)]
    fn shape(&self, keys: usize) -> (usize, usize, usize) {
        let (along_keys, along_channels) = self.word.of(keys, self.channels);
        match self.order {
            Order::Tokens => (along_keys, self.row, along_channels),
            Order::Channels { stride } => (along_channels, stride, along_keys),
        }
    }

    /// Reads line `i` of a block into its place in `block`.
    ///
    /// # Safety
    /// The keys must lie inside the shape.
    #[inline(always)]
    unsafe fn read(&self, p: Plane, keys: Range<usize>, i: usize, block: &mut [f32]) {
        let (t, s) = (&self.from, self.from.strides);
        let (_, distance, len) = self.shape(keys.len());
        let to = &mut block[i * distance..i * distance + len];
        // In the tensor: numbers in a line, lines, the stride inside one, and where each begins.
        let (n, lines, stride) = match self.order {
            Order::Tokens => (self.channels, keys.len(), s.channel),
            Order::Channels { .. } => (keys.len(), self.channels, s.token),
        };
        let at = |line: usize| match self.order {
            Order::Tokens => offset(s, p, keys.start + line, 0),
            Order::Channels { .. } => offset(s, p, keys.start, line),
        };
        // SAFETY: lines of these keys.
        unsafe {
            match (self.word, self.order) {
                (Word::Number, _) => read_line(t, at(i), stride, to),
                (Word::Channels, Order::Tokens) | (Word::Keys, Order::Channels { .. }) => {
                    read_along(t, at(i), stride, n, to);
                }
                (Word::Channels, Order::Channels { .. }) | (Word::Keys, Order::Tokens) => {
                    let second = (2 * i + 1 < lines).then(|| at(2 * i + 1));
                    read_across(t, at(2 * i), second, stride, to);
                }
            }
        }
    }

    /// Calls `f` with each line of the first keys of a block.
    ///
    /// # Safety
    /// The block must have so many keys.
    #[inline(always)]
    pub unsafe fn lines(&self, block: *const f32, keys: usize, mut f: impl FnMut(&[f32])) {
        let (lines, distance, len) = self.shape(keys);
        for i in 0..lines {
            // SAFETY: promised by the caller.
            f(unsafe { std::slice::from_raw_parts(block.add(i * distance), len) });
        }
    }

    /// Words in a block between keys and between channels; between pairs of keys or of channels where a word is one.
    #[inline(always)]
    pub fn strides(&self) -> (usize, usize) {
        match self.order {
            Order::Tokens => (self.row, 1),
            Order::Channels { stride } => (1, stride),
        }
    }

    /// Asks for the memory of some keys of a block; where all are copied in advance, for that of the first head only, and from
    /// where the block begins.
    pub fn ahead(&self, p: Plane, heads: usize, keys: Range<usize>) -> Ahead {
        match self.place {
            Place::Call => {
                let (lines, words) = self
                    .word
                    .of(keys.end - keys.start / KEYS * KEYS, self.channels);
                let line = words * size_of::<f32>();
                let block = self.copy.wrapping_add(self.at(p, keys.start));
                Ahead::lines(block.cast_const().cast(), line as isize, line, lines)
            }
            _ => Ahead::new(
                &self.from,
                p.batch,
                p.head..p.head + heads,
                keys,
                self.channels,
            ),
        }
    }

    /// Copies one block of keys of all heads of one row of the batch.
    ///
    /// # Safety
    /// The matrix must have a copy, of which nobody else may use this block meanwhile.
    unsafe fn fill(&self, batch: usize, keys: Range<usize>) {
        let s = self.from.strides;
        let line = |head: usize, i: usize| {
            let p = Plane { batch, head };
            let block = self.copy.wrapping_add(self.at(p, keys.start));
            // SAFETY: the block is this task's by the promise of the caller; keys and heads lie inside the shape.
            unsafe {
                let block = std::slice::from_raw_parts_mut(block, self.block_len());
                self.read(p, keys.clone(), i, block);
            }
        };
        let lines = 0..self.shape(keys.len()).0;
        let heads = self.part.kv_heads.clone();
        if self.order == Order::Tokens && s.head.abs() < s.token.abs() {
            lines.for_each(|i| heads.clone().for_each(|head| line(head, i)));
        } else {
            heads.for_each(|head| lines.clone().for_each(|i| line(head, i)));
        }
    }
}

/// Keys and values of a part.
pub(crate) struct Keys<'a> {
    pub k: Matrix<'a>,
    pub v: Matrix<'a>,
}

impl<'a> Keys<'a> {
    /// Makes the copies of a part, in `scratch`.
    pub fn new(
        a: &Attention<'a>,
        places: Places,
        part: &Part,
        scratch: &'a mut Scratch,
        pool: &dyn Parallel,
    ) -> Self {
        let s = a.shape;
        let mut keys = Keys {
            k: Matrix::new(a.k, part, s.kv_tokens, s.head_dim, places.k),
            v: Matrix::new(a.v, part, s.kv_tokens, s.v_dim, places.v),
        };
        let copies = scratch.cut([keys.k.len(), keys.v.len()]);
        let blocks = s.kv_tokens.div_ceil(KEYS);
        for (matrix, copy) in [&mut keys.k, &mut keys.v].into_iter().zip(copies) {
            if matrix.place != Place::Call {
                continue;
            }
            matrix.copy = copy.as_mut_ptr();
            let matrix = &*matrix;
            pool.run(part.batch.len() * blocks, &|i| {
                let first = i % blocks * KEYS;
                let batch = part.batch.start + i / blocks;
                // SAFETY: each block is of one task.
                unsafe { matrix.fill(batch, first..s.kv_tokens.min(first + KEYS)) };
            });
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Band, Strides};

    #[test]
    fn tasks_copy_what_they_are_told_to() {
        let numbers = [0f32; 1];
        let places = |copy: TasksCopy, token, mode: &Mode<'_>| {
            let strides = Strides {
                batch: 0,
                head: 64,
                token,
                channel: 1,
            };
            // SAFETY: nothing is read through it.
            let t = unsafe { Input::from_raw(numbers.as_ptr().cast(), DType::F32, strides) };
            copy.places(&t, mode).map(|place| place == Place::Task)
        };
        let band = Mode::Window {
            band: Band::new(2),
            residual: None,
        };
        for (copy, token, full, window) in [
            (TasksCopy::Nothing, 1024, [false, false], [false, false]),
            (
                TasksCopy::CollidingValues,
                1024,
                [false, true],
                [false, true],
            ),
            (
                TasksCopy::CollidingValues,
                3072,
                [false, true],
                [false, true],
            ),
            (
                TasksCopy::CollidingValues,
                1536,
                [false, false],
                [false, false],
            ),
            (TasksCopy::All, 1536, [true, true], [false, true]),
            (TasksCopy::All, 1152, [true, true], [false, false]),
        ] {
            assert_eq!(places(copy, token, &Mode::Full), full, "{copy:?} {token}");
            assert_eq!(places(copy, token, &band), window, "{copy:?} {token}");
        }
    }

    #[test]
    fn parts_are_every_plane_once() {
        for (batch, heads) in [(1, 1), (1, 5), (3, 4), (4, 1)] {
            for planes in [0, 1, 2, 3, 4, 7, 8, 100] {
                let parts: Vec<Part> = Part::of(batch, heads, planes).collect();
                let mut seen = vec![0; batch * heads];
                for part in &parts {
                    assert!(part.planes() <= planes.max(1));
                    let mut index = 0;
                    for b in part.batch.clone() {
                        for head in part.kv_heads.clone() {
                            seen[b * heads + head] += 1;
                            assert_eq!(part.index(Plane { batch: b, head }), index);
                            index += 1;
                        }
                    }
                }
                assert!(seen.iter().all(|&n| n == 1), "{parts:?}");
            }
        }
    }
}
