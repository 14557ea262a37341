//! A mask, a tile at a time: read in any layout, turned so that a query is a lane, added to the scores of a block.
//!
//! In a tile everything is a number in powers of two, and hidden keys are −∞, so that booleans and biases are one.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::ahead::Ahead;
use super::gemm::row_len;
use super::pack::{Plane, read_line};
use super::transpose::transpose;
use super::vector::{load, mul_add, store};
use crate::api::{Input, Strides};
use crate::mask::{Mask, MaskType};

/// The largest finite number in a tile. Larger ones would overflow when a score is added, and a finite mask must not
/// become an infinite one: a row that is pushed down everywhere is still a row.
const LARGEST: f32 = 3e38;

/// What a tile does to a block of scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// All numbers are zero.
    Nothing,
    Adds,
    /// Every key is hidden from every query.
    HidesAll,
}

/// One block of the mask.
pub(crate) struct Tile<'s> {
    mask: Mask<'s>,
    /// `[keys, queries]`
    turned: &'s mut [f32],
    /// `[queries, keys]`
    rows: &'s mut [f32],
    effect: Effect,
    /// What is in the tile: where the block begins in the mask, how many queries (1 if all have the same line) and keys.
    holds: Option<(isize, usize, usize)>,
}

impl<'s> Tile<'s> {
    /// Floats that a tile of `keys` keys needs, twice.
    pub const fn len<S: Simd>(keys: usize) -> usize {
        keys * row_len::<S>()
    }

    pub fn new(mask: Mask<'s>, turned: &'s mut [f32], rows: &'s mut [f32]) -> Self {
        Tile {
            mask,
            turned,
            rows,
            effect: Effect::Nothing,
            holds: None,
        }
    }

    pub fn effect(&self) -> Effect {
        self.effect
    }

    /// Asks for the memory of a block that will be read.
    pub fn ahead(&self, plane: Plane, queries: Range<usize>, keys: Range<usize>) -> Ahead {
        let s = self.mask.strides;
        if s.query == 0 || s.key != 1 {
            return Ahead::nothing();
        }
        let size = self.mask.kind.size() as isize;
        let first = offset(&self.mask, plane, queries.start, keys.start);
        Ahead::lines(
            self.mask.data.wrapping_offset(first * size),
            s.query * size,
            keys.len() * self.mask.kind.size(),
            queries.len(),
        )
    }

    /// Reads the block of `queries` and `keys` of one (batch, head), unless that is what the tile holds.
    ///
    /// # Safety
    /// Both must lie inside the shape that `check` has compared the mask with.
    #[inline(always)]
    pub unsafe fn read<S: Simd>(
        &mut self,
        plane: Plane,
        queries: Range<usize>,
        keys: Range<usize>,
    ) {
        let n = keys.len();
        let repeats = self.mask.strides.query == 0;
        let lines = if repeats { 1 } else { queries.len() };
        let block = (
            offset(&self.mask, plane, queries.start, keys.start),
            lines,
            n,
        );
        if self.holds == Some(block) {
            return;
        }
        self.holds = Some(block);
        assert!(
            lines <= row_len::<S>() && n * row_len::<S>() <= self.turned.len().min(self.rows.len())
        );
        let (mut zero, mut hidden) = (true, true);
        for i in 0..lines {
            let line = &mut self.rows[i * n..(i + 1) * n];
            // SAFETY: promised by the caller.
            unsafe { read(&self.mask, plane, queries.start + i, keys.start, line) };
            let (z, h) = in_powers_of_two(line);
            zero &= z;
            hidden &= h;
        }
        self.effect = match (zero, hidden) {
            (true, _) => Effect::Nothing,
            (_, true) => Effect::HidesAll,
            _ => Effect::Adds,
        };
        if self.effect != Effect::Adds {
            return;
        }
        if repeats {
            for (lanes, &x) in self
                .turned
                .chunks_exact_mut(row_len::<S>())
                .zip(&self.rows[..n])
            {
                lanes.fill(x);
            }
            return;
        }
        if lines < row_len::<S>() {
            // Lanes without a query share decisions with those beside them.
            self.turned[..n * row_len::<S>()].fill(0.0);
        }
        // SAFETY: `lines` rows of n, and n rows of queries, are there by the assertion above.
        unsafe {
            transpose::<S, true>(
                self.rows.as_ptr(),
                n as isize,
                self.turned.as_mut_ptr(),
                row_len::<S>() as isize,
                lines,
                n,
            );
        }
    }

    /// The tile's numbers of one key, a query per lane.
    pub fn lanes<S: Simd>(&self, key: usize) -> &[f32] {
        &self.turned[key * row_len::<S>()..(key + 1) * row_len::<S>()]
    }

    /// scores = scores · scale + mask, for some keys (counted in the tile) and vectors of queries; hidden keys get −∞
    /// whatever their score is. `scores` is `[keys, queries]`.
    #[inline(always)]
    pub fn add<S: Simd>(
        &self,
        simd: S,
        scale: f32,
        scores: &mut [f32],
        keys: Range<usize>,
        vectors: Range<usize>,
    ) {
        let block = keys.start * row_len::<S>()..keys.end * row_len::<S>();
        let lanes = vectors.start * S::F32_LANES..vectors.end * S::F32_LANES;
        assert!(lanes.end <= row_len::<S>());
        add(
            simd,
            scale,
            &mut scores[block.clone()],
            &self.turned[block],
            lanes,
        );
    }
}

/// A function of its own, so that calls without a mask are compiled as if there were none.
#[inline(never)]
fn add<S: Simd>(simd: S, scale: f32, scores: &mut [f32], tile: &[f32], lanes: Range<usize>) {
    struct Add<'a> {
        scale: f32,
        scores: &'a mut [f32],
        tile: &'a [f32],
        lanes: Range<usize>,
    }
    impl WithSimd for Add<'_> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let scale = simd.splat_f32s(self.scale);
            let hidden = simd.splat_f32s(f32::NEG_INFINITY);
            let rows = self.scores.chunks_exact_mut(row_len::<S>());
            for (scores, tile) in rows.zip(self.tile.chunks_exact(row_len::<S>())) {
                for at in self.lanes.clone().step_by(S::F32_LANES) {
                    // SAFETY: whole vectors inside rows of queries, which `Tile::add` asserts.
                    unsafe {
                        let (p, m) = (
                            scores.as_mut_ptr().add(at),
                            load(simd, tile.as_ptr().add(at)),
                        );
                        let x = mul_add(simd, load(simd, p), scale, m);
                        let hides = simd.equal_f32s(m, hidden);
                        store(simd, p, simd.select_f32s(hides, hidden, x));
                    }
                }
            }
        }
    }
    simd.vectorize(Add {
        scale,
        scores,
        tile,
        lanes,
    });
}

fn offset(mask: &Mask<'_>, plane: Plane, query: usize, key: usize) -> isize {
    let s = mask.strides;
    plane.batch as isize * s.batch
        + plane.head as isize * s.head
        + query as isize * s.query
        + key as isize * s.key
}

/// One query's line of a mask: what is to be added to the scores of some keys, in powers of e.
///
/// # Safety
/// The query and `to.len()` keys from `key` on must lie inside the shape.
#[inline(always)]
unsafe fn read(mask: &Mask<'_>, plane: Plane, query: usize, key: usize, to: &mut [f32]) {
    let s = mask.strides;
    let at = offset(mask, plane, query, key);
    match mask.kind {
        MaskType::Additive(dtype) => {
            // SAFETY: the same promises, in other words.
            unsafe {
                let numbers = Input::from_raw(mask.data, dtype, Strides::default());
                read_line(&numbers, at, s.key, to);
            }
        }
        MaskType::Boolean => {
            let number = |byte: u8| if byte == 0 { f32::NEG_INFINITY } else { 0.0 };
            // SAFETY: promised by the caller.
            unsafe {
                let p = mask.data.offset(at);
                if s.key == 1 {
                    let bytes = std::slice::from_raw_parts(p, to.len());
                    to.iter_mut().zip(bytes).for_each(|(x, &b)| *x = number(b));
                } else {
                    for (i, x) in to.iter_mut().enumerate() {
                        *x = number(*p.offset(i as isize * s.key));
                    }
                }
            }
        }
    }
}

/// Turns powers of e into powers of two. Says whether all numbers are zero, and whether all of them hide.
#[inline(always)]
fn in_powers_of_two(line: &mut [f32]) -> (bool, bool) {
    let (mut other, mut shown) = (0u32, 0u32);
    for x in line {
        other |= u32::from(*x != 0.0);
        shown |= u32::from(*x != f32::NEG_INFINITY);
        let y = *x * std::f32::consts::LOG2_E;
        let held = y.clamp(-LARGEST, LARGEST);
        *x = if x.abs() == f32::INFINITY { y } else { held };
    }
    (other == 0, shown == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_of_all_sizes() {
        let inf = f32::INFINITY;
        let mut line = [0.0, 1.0, -1e4, f32::MIN, f32::MAX, -inf, inf, f32::NAN];
        assert_eq!(in_powers_of_two(&mut line), (false, false));
        let log2_e = std::f32::consts::LOG2_E;
        assert_eq!(
            line[..7],
            [0.0, log2_e, -1e4 * log2_e, -3e38, 3e38, -inf, inf]
        );
        assert!(line[7].is_nan());
        assert_eq!(in_powers_of_two(&mut [0.0, -0.0]), (true, false));
        assert_eq!(in_powers_of_two(&mut [-inf, -inf]), (false, true));
    }
}
