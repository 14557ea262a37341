//! A mask, a tile at a time: read in any layout, transposed so that a query is a lane, added to the scores of a block.
//!
//! In a tile everything is a number in powers of two, and hidden keys are −∞, so that booleans and biases are one.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::isa::{block_m, load, mul_add, store};
use super::load_store::{BatchHead, read_line};
use super::prefetch::LineStream;
use super::transpose::transpose;
use crate::mask::{Mask, MaskType};
use crate::tensor::{Input, Strides};

/// The largest finite number in a tile. Larger ones would overflow when a score is added, and a finite mask must not
/// become an infinite one: a row that is pushed down everywhere is still a row.
const LARGEST: f32 = 3e38;

/// What a tile does to the scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TileKind {
    /// All numbers are zero.
    Zero,
    Additive,
    /// Every key is hidden from every query.
    FullyMasked,
}

/// One block of the mask.
pub(crate) struct MaskTile<'s> {
    mask: Mask<'s>,
    /// `[keys, queries]`
    transposed: &'s mut [f32],
    /// `[queries, keys]`
    rows: &'s mut [f32],
    kind: TileKind,
    /// What the tile holds: where the block begins in the mask, how many queries (1 if all have the same line) and keys.
    cached: Option<(isize, usize, usize)>,
}

impl<'s> MaskTile<'s> {
    /// Floats that a tile of `keys` keys needs, twice.
    pub const fn len<S: Simd>(keys: usize) -> usize {
        keys * block_m::<S>()
    }

    pub fn new(mask: Mask<'s>, transposed: &'s mut [f32], rows: &'s mut [f32]) -> Self {
        MaskTile {
            mask,
            transposed,
            rows,
            kind: TileKind::Zero,
            cached: None,
        }
    }

    pub fn kind(&self) -> TileKind {
        self.kind
    }

    /// The cache lines of a block that will be read.
    pub fn prefetch(
        &self,
        batch_head: BatchHead,
        queries: Range<usize>,
        keys: Range<usize>,
    ) -> LineStream {
        let s = self.mask.strides;
        if s.query == 0 || s.key != 1 {
            return LineStream::empty();
        }
        let size = self.mask.kind.size() as isize;
        let first = offset(&self.mask, batch_head, queries.start, keys.start);
        LineStream::strided(
            self.mask.data.wrapping_offset(first * size),
            s.query * size,
            keys.len() * self.mask.kind.size(),
            queries.len(),
        )
    }

    /// Reads the block of `queries` and `keys` of one (batch, head), unless that is what is cached.
    ///
    /// # Safety
    /// Both must lie inside the shape that `check` has compared the mask with.
    #[inline(always)]
    pub unsafe fn read<S: Simd>(
        &mut self,
        batch_head: BatchHead,
        queries: Range<usize>,
        keys: Range<usize>,
    ) {
        let n = keys.len();
        let repeats = self.mask.strides.query == 0;
        let lines = if repeats { 1 } else { queries.len() };
        let block = (
            offset(&self.mask, batch_head, queries.start, keys.start),
            lines,
            n,
        );
        if self.cached == Some(block) {
            return;
        }
        self.cached = Some(block);
        assert!(
            lines <= block_m::<S>()
                && n * block_m::<S>() <= self.transposed.len().min(self.rows.len())
        );
        let (mut zero, mut hidden) = (true, true);
        for i in 0..lines {
            let line = &mut self.rows[i * n..(i + 1) * n];
            // SAFETY: promised by the caller.
            unsafe { read(&self.mask, batch_head, queries.start + i, keys.start, line) };
            let (z, h) = in_powers_of_two(line);
            zero &= z;
            hidden &= h;
        }
        self.kind = match (zero, hidden) {
            (true, _) => TileKind::Zero,
            (_, true) => TileKind::FullyMasked,
            _ => TileKind::Additive,
        };
        if self.kind != TileKind::Additive {
            return;
        }
        if repeats {
            for (lanes, &x) in self
                .transposed
                .chunks_exact_mut(block_m::<S>())
                .zip(&self.rows[..n])
            {
                lanes.fill(x);
            }
            return;
        }
        if lines < block_m::<S>() {
            // Lanes without a query share decisions with those beside them.
            self.transposed[..n * block_m::<S>()].fill(0.0);
        }
        // SAFETY: `lines` rows of n, and n rows of queries, are there by the assertion above.
        unsafe {
            transpose::<S, true>(
                self.rows.as_ptr(),
                n as isize,
                self.transposed.as_mut_ptr(),
                block_m::<S>() as isize,
                lines,
                n,
            );
        }
    }

    /// The tile's numbers of one key, a query per lane.
    pub fn lanes<S: Simd>(&self, key: usize) -> &[f32] {
        &self.transposed[key * block_m::<S>()..(key + 1) * block_m::<S>()]
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
        let block = keys.start * block_m::<S>()..keys.end * block_m::<S>();
        let lanes = vectors.start * S::F32_LANES..vectors.end * S::F32_LANES;
        assert!(lanes.end <= block_m::<S>());
        add(
            simd,
            scale,
            &mut scores[block.clone()],
            &self.transposed[block],
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
            let rows = self.scores.chunks_exact_mut(block_m::<S>());
            for (scores, tile) in rows.zip(self.tile.chunks_exact(block_m::<S>())) {
                for at in self.lanes.clone().step_by(S::F32_LANES) {
                    // SAFETY: whole vectors inside rows of queries, which `MaskTile::add` asserts.
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

fn offset(mask: &Mask<'_>, batch_head: BatchHead, query: usize, key: usize) -> isize {
    let s = mask.strides;
    batch_head.batch as isize * s.batch
        + batch_head.head as isize * s.head
        + query as isize * s.query
        + key as isize * s.key
}

/// One query's line of a mask: what is to be added to the scores of some keys, in powers of e.
///
/// # Safety
/// The query and `to.len()` keys from `key` on must lie inside the shape.
#[inline(always)]
unsafe fn read(mask: &Mask<'_>, batch_head: BatchHead, query: usize, key: usize, to: &mut [f32]) {
    let s = mask.strides;
    let at = offset(mask, batch_head, query, key);
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

/// Converts powers of e to powers of two. Says whether all numbers are zero, and whether all of them hide.
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
