//! Keys and values as tasks read them: float32, each (batch, head) by itself, in blocks of [`KEYS`].
//!
//! Tensors that are like that already are read where they are, and so are those with other heads between the lines of
//! one, where few blocks of queries see a key. Others are copied: by each task for itself, or, where many see a key, once
//! per call, on all threads. In `[batch, tokens, heads, channels]` each token of a head lies in a page of its own, whose
//! translation costs as much as its data; a copy of all heads visits it once.
//!
//! Owns where they are read and the copies in advance. What is computed does not depend on either, bit for bit.

use std::ops::Range;

use super::gemm::QUERIES;
use super::pack::{Ahead, Order, Plane, gather, offset, read_line};
use super::scratch::Scratch;
use crate::api::{Attention, DType, Input, Mode};
use crate::parallel::Parallel;

/// Keys in a block. With the queries of a block it sets the working set: scores, Q, O, K and V of a block should stay in
/// L2 and mostly in L1.
pub(crate) const KEYS: usize = 120;

/// What decides how keys and values are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Where more blocks of queries than this see a key, a copy in advance is worth its traffic.
    pub reads: usize,
    /// Floats that are copied in advance at a time: calls that need more are done in several parts, and those of
    /// which one head needs more are not copied in advance.
    pub floats: usize,
}

impl Limits {
    pub const BEST: Limits = Limits {
        reads: 20,
        floats: 12 << 20,
    };
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

/// Where the keys and the values of a call are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    k: Place,
    v: Place,
    /// Floats that one plane of both needs in memory of the call.
    plane: usize,
}

impl Places {
    pub fn of(a: &Attention<'_>, limits: Limits) -> Self {
        let seen_by = match &a.mode {
            Mode::Window { band, .. } => (band.half_width.saturating_mul(2))
                .saturating_add(band.text + 1)
                .min(a.shape.q_tokens),
            _ => a.shape.q_tokens,
        };
        let early = Places::new(a, true);
        if seen_by > limits.reads * QUERIES && early.plane <= limits.floats {
            early
        } else {
            Places::new(a, false)
        }
    }

    fn new(a: &Attention<'_>, early: bool) -> Self {
        let s = a.shape;
        let place = |t: &Input<'_>, channels: usize| {
            // Lines beside each other are read as fast as a copy of them.
            let dense = t.strides.token == channels as isize;
            let lines = t.dtype == DType::F32 && t.strides.channel == 1 && t.strides.token > 0;
            match (lines && (dense || !early), early) {
                (true, _) => Place::There,
                (_, true) => Place::Call,
                _ => Place::Task,
            }
        };
        let (k, v) = (place(&a.k, s.head_dim), place(&a.v, s.v_dim));
        let floats = |place, channels| match place {
            // Inputs that repeat elements may have any number of tokens.
            Place::Call => (s.kv_tokens.div_ceil(KEYS))
                .saturating_mul(KEYS)
                .saturating_mul(channels),
            _ => 0,
        };
        Places {
            k,
            v,
            plane: floats(k, s.head_dim).saturating_add(floats(v, s.v_dim)),
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
        let planes = limits.floats.checked_div(places.plane);
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
    /// Distance between the lines of two keys.
    row: usize,
    part: Part,
    place: Place,
    /// The memory of the call, if that is the place.
    copy: *mut f32,
}

// SAFETY: while tasks share a matrix they only read what it points to; while it is filled each task writes blocks of
// its own.
unsafe impl Sync for Matrix<'_> {}

impl<'a> Matrix<'a> {
    fn new(from: Input<'a>, part: &Part, tokens: usize, channels: usize, place: Place) -> Self {
        let order = match place {
            Place::There => Order::Tokens,
            _ => Order::natural(from.strides, KEYS),
        };
        let row = match place {
            Place::There => from.strides.token.unsigned_abs(),
            _ => channels,
        };
        Matrix {
            from,
            channels,
            tokens,
            order,
            row,
            part: part.clone(),
            place,
            copy: std::ptr::null_mut(),
        }
    }

    /// Floats that the call has for the matrix.
    fn len(&self) -> usize {
        match self.place {
            Place::Call => self.part.planes() * self.tokens.next_multiple_of(KEYS) * self.channels,
            _ => 0,
        }
    }

    /// Floats that a task needs for a block of a head.
    pub fn task_len(&self) -> usize {
        match self.place {
            Place::Task => KEYS * self.channels,
            _ => 0,
        }
    }

    /// The block `keys` of a plane, whose first is a multiple of [`KEYS`]. `room` has [`Matrix::task_len`] floats.
    ///
    /// # Safety
    /// The keys must lie inside the shape.
    #[inline(always)]
    pub unsafe fn block(&self, p: Plane, keys: Range<usize>, room: &mut [f32]) -> *const f32 {
        match self.place {
            Place::There => (self.from.data.cast::<f32>()).wrapping_offset(offset(
                self.from.strides,
                p,
                keys.start,
                0,
            )),
            Place::Call => self.copy.wrapping_add(self.at(p, keys.start)),
            Place::Task => {
                // SAFETY: promised by the caller.
                unsafe { gather(&self.from, p, keys, self.channels, self.order, room) };
                room.as_ptr()
            }
        }
    }

    /// Where in the memory of the call a block is.
    fn at(&self, p: Plane, first: usize) -> usize {
        (self.part.index(p) * self.tokens.next_multiple_of(KEYS) + first) * self.channels
    }

    /// Calls `f` with each line of the first keys of a block.
    ///
    /// # Safety
    /// The block must have so many keys.
    #[inline(always)]
    pub unsafe fn lines(&self, block: *const f32, keys: usize, mut f: impl FnMut(&[f32])) {
        let (lines, distance, len) = match self.order {
            Order::Tokens => (keys, self.row, self.channels),
            Order::Channels { stride } => (self.channels, stride, keys),
        };
        for i in 0..lines {
            // SAFETY: promised by the caller.
            f(unsafe { std::slice::from_raw_parts(block.add(i * distance), len) });
        }
    }

    /// Distances in a block between keys and between channels.
    #[inline(always)]
    pub fn strides(&self) -> (usize, usize) {
        match self.order {
            Order::Tokens => (self.row, 1),
            Order::Channels { stride } => (1, stride),
        }
    }

    /// Asks for the memory of a block; where all are copied in advance, for that of the first head only.
    pub fn ahead(&self, p: Plane, heads: usize, keys: Range<usize>) -> Ahead {
        match self.place {
            Place::Call => {
                let line = (self.channels * size_of::<f32>()) as isize;
                let block = self.copy.wrapping_add(self.at(p, keys.start));
                Ahead::lines(block.cast_const().cast(), line, line, keys.len())
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
        let (s, n) = (self.from.strides, self.channels);
        let line = |head: usize, at: usize, len: usize| {
            let p = Plane { batch, head };
            // SAFETY: inside the block, which is this task's by the promise of the caller.
            let to = unsafe {
                std::slice::from_raw_parts_mut(self.copy.add(self.at(p, keys.start) + at), len)
            };
            (p, to)
        };
        let heads = self.part.kv_heads.clone();
        // SAFETY (all of them): keys and heads lie inside the shape.
        match self.order {
            Order::Tokens if s.head.abs() < s.token.abs() => {
                for (i, token) in keys.clone().enumerate() {
                    for head in heads.clone() {
                        let (p, to) = line(head, i * n, n);
                        unsafe { read_line(&self.from, offset(s, p, token, 0), s.channel, to) }
                    }
                }
            }
            Order::Tokens => {
                for head in heads {
                    for (i, token) in keys.clone().enumerate() {
                        let (p, to) = line(head, i * n, n);
                        unsafe { read_line(&self.from, offset(s, p, token, 0), s.channel, to) }
                    }
                }
            }
            Order::Channels { stride } => {
                for head in heads {
                    for c in 0..n {
                        let (p, to) = line(head, c * stride, keys.len());
                        let at = offset(s, p, keys.start, c);
                        unsafe { read_line(&self.from, at, s.token, to) }
                    }
                }
            }
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
