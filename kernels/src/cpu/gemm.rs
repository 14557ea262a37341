//! The one matrix kernel both products of attention run on: C += A·B with vectors of queries.
//!
//! B (`[steps, QUERIES]`) and C (`[rows, QUERIES]`) have a query per lane; A is read one scalar at a time and
//! broadcast. So scores are C = K·Qᵀ (rows are keys, steps are channels) and outputs are C = Vᵀ·P (rows are
//! channels, steps are keys): neither needs a transposition per block, neither pads head_dim or the number of keys,
//! and everything the softmax does between them is vertical. A tile of C stays in registers over all steps.

#![allow(clippy::needless_range_loop)] // Loops over tiles read better with their indices.

use pulp::{Simd, WithSimd};

use super::vector::{load, mul_add, store};

/// Queries in a block: the row length of every matrix with a query per lane.
pub(crate) const QUERIES: usize = 64;

/// One product. All pointers may be unaligned.
#[derive(Clone, Copy)]
pub(crate) struct Gemm {
    pub a: *const f32,
    /// Distance in A between neighbouring rows of C; this or `a_step` is 1.
    pub a_row: usize,
    /// Distance in A between neighbouring steps.
    pub a_step: usize,
    /// `[steps, QUERIES]`, already advanced to the first lane.
    pub b: *const f32,
    /// `[rows, QUERIES]`, already advanced to the first lane.
    pub c: *mut f32,
    pub rows: usize,
    pub steps: usize,
    /// Vectors of queries, starting at the pointers' lane.
    pub vectors: usize,
    /// Add to C, rather than overwrite it.
    pub add: bool,
}

impl Gemm {
    /// Computes the product, and calls `between` after each tile of it (a microsecond or less).
    ///
    /// # Safety
    /// For every row < rows, step < steps and lane < vectors · `S::F32_LANES`: `a + row·a_row + step·a_step` and
    /// `b + step·QUERIES + lane` must be readable, `c + row·QUERIES + lane` readable and writable, and C must not
    /// overlap A or B.
    #[inline(always)]
    pub unsafe fn run<S: Simd>(self, simd: S, mut between: impl FnMut()) {
        // With 32 registers 6 × 4 accumulators, 4 of B and a broadcast; with 16 registers 6 × 2, 2 and 1.
        let wide = if S::REGISTER_COUNT >= 32 { 4 } else { 2 };
        let mut done = 0;
        while done < self.vectors {
            let n = wide.min(self.vectors - done);
            let part = Gemm {
                // SAFETY: the lane lies inside the rows of B and C, by this function's contract.
                b: unsafe { self.b.add(done * S::F32_LANES) },
                // SAFETY: as above.
                c: unsafe { self.c.add(done * S::F32_LANES) },
                ..self
            };
            // SAFETY: a part of the columns of what this function's contract allows.
            unsafe {
                match n {
                    4 => columns::<S, 4>(simd, part, &mut between),
                    3 => columns::<S, 3>(simd, part, &mut between),
                    2 => columns::<S, 2>(simd, part, &mut between),
                    _ => columns::<S, 1>(simd, part, &mut between),
                }
            }
            done += n;
        }
    }
}

/// NR vectors of columns, rows in sixes.
#[inline(always)]
unsafe fn columns<S: Simd, const NR: usize>(simd: S, g: Gemm, between: &mut dyn FnMut()) {
    let sixes = g.rows / 6 * 6;
    let head = Gemm { rows: sixes, ..g };
    let tail = Gemm {
        a: g.a.wrapping_add(sixes * g.a_row),
        c: g.c.wrapping_add(sixes * QUERIES),
        rows: g.rows - sixes,
        ..g
    };
    // SAFETY: parts of the rows of what the caller promised.
    unsafe {
        tiles::<S, 6, NR>(simd, head, between);
        match tail.rows {
            5 => tiles::<S, 5, NR>(simd, tail, between),
            4 => tiles::<S, 4, NR>(simd, tail, between),
            3 => tiles::<S, 3, NR>(simd, tail, between),
            2 => tiles::<S, 2, NR>(simd, tail, between),
            1 => tiles::<S, 1, NR>(simd, tail, between),
            _ => {}
        }
    }
}

/// `rows / MR` tiles. A function of its own, so that the compiler allots registers to one shape of tile at a time.
#[inline(never)]
unsafe fn tiles<S: Simd, const MR: usize, const NR: usize>(
    simd: S,
    g: Gemm,
    between: &mut dyn FnMut(),
) {
    struct Tiles<'a, const MR: usize, const NR: usize>(Gemm, &'a mut dyn FnMut());
    impl<const MR: usize, const NR: usize> WithSimd for Tiles<'_, MR, NR> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let g = self.0;
            // SAFETY: made by `tiles` only, whose caller promised.
            unsafe {
                // The stride that is 1 is told to the compiler, for simpler addresses.
                if g.a_step == 1 {
                    tile_loop::<S, MR, NR>(simd, g, g.a_row, 1, self.1);
                } else {
                    tile_loop::<S, MR, NR>(simd, g, 1, g.a_step, self.1);
                }
            }
        }
    }
    debug_assert!(g.a_step == 1 || g.a_row == 1);
    simd.vectorize(Tiles::<MR, NR>(g, between))
}

#[inline(always)]
unsafe fn tile_loop<S: Simd, const MR: usize, const NR: usize>(
    simd: S,
    g: Gemm,
    a_row: usize,
    a_step: usize,
    between: &mut dyn FnMut(),
) {
    for row in (0..g.rows).step_by(MR) {
        let part = Gemm {
            a: g.a.wrapping_add(row * a_row),
            c: g.c.wrapping_add(row * QUERIES),
            ..g
        };
        // SAFETY: row + MR ≤ rows, which the caller promised.
        unsafe { tile_body::<S, MR, NR>(simd, part, a_row, a_step) };
        between();
    }
}

#[inline(always)]
unsafe fn tile_body<S: Simd, const MR: usize, const NR: usize>(
    simd: S,
    g: Gemm,
    a_row: usize,
    a_step: usize,
) {
    let mut acc = [[simd.splat_f32s(0.0); NR]; MR];
    // SAFETY: MR rows, NR vectors and g.steps steps are readable and writable, by the caller's promise.
    unsafe {
        if g.add {
            for i in 0..MR {
                for j in 0..NR {
                    acc[i][j] = load(simd, g.c.add(i * QUERIES + j * S::F32_LANES));
                }
            }
        }
        let (mut a, mut b) = (g.a, g.b);
        for _ in 0..g.steps {
            let mut bs = [simd.splat_f32s(0.0); NR];
            for j in 0..NR {
                bs[j] = load(simd, b.add(j * S::F32_LANES));
            }
            for i in 0..MR {
                let x = simd.splat_f32s(*a.add(i * a_row));
                for j in 0..NR {
                    acc[i][j] = mul_add(simd, x, bs[j], acc[i][j]);
                }
            }
            a = a.wrapping_add(a_step);
            b = b.wrapping_add(QUERIES);
        }
        for i in 0..MR {
            for j in 0..NR {
                store(simd, g.c.add(i * QUERIES + j * S::F32_LANES), acc[i][j]);
            }
        }
    }
}
