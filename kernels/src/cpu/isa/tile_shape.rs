//! The shape of the matrix kernel's register tile, by vector length and number of registers.

use pulp::Simd;

/// BLOCK_M, the queries in a block and the row length of every matrix with a query per lane: as many as a tile of C has
/// columns, 64 with AVX-512 and 16 with AVX2 and NEON.
///
/// With 32 registers 6 × 4 accumulators, 4 of B and a broadcast; with 16 registers 6 × 2, 2 and 1. Were rows longer than a
/// tile, the rows of B that a tile reads would alias to few sets of the L1 and be evicted: with AVX2
/// and rows of 64 a window took 3 to 7 % longer.
pub(crate) const fn block_m<S: Simd>() -> usize {
    let vectors = if S::REGISTER_COUNT >= 32 { MAX_NR } else { 2 };
    vectors * S::F32_LANES
}

/// The most vectors in a row of a tile.
pub(crate) const MAX_NR: usize = 4;

/// Rows in a tile: as many as registers, and as few reads of B for each, allow.
pub(crate) const MR: usize = 6;

/// Rows in a tile of a single vector, for [`MR`] sums would leave the multipliers waiting.
pub(crate) const MR_SINGLE: usize = 8;
