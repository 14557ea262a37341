//! The one matrix kernel both products of attention run on: C += A·B with vectors of queries.
//!
//! B (`[steps, queries]`) and C (`[rows, queries]`) have a query per lane; A is read one word at a time and
//! broadcast. What a word is and how two are multiplied is the arithmetic's: a number, or a pair of numbers, of which a
//! step then takes two. So scores are C = K·Qᵀ (rows are keys, steps are channels) and outputs are C = Vᵀ·P (rows are
//! channels, steps are keys): neither needs a transposition per block, neither pads head_dim or the number of keys,
//! and everything the softmax does between them is vertical. A tile of C stays in registers over all steps.

#![allow(clippy::needless_range_loop)] // Loops over tiles read better with their indices.

use std::sync::atomic::{Ordering, compiler_fence};

use pulp::{Simd, WithSimd};

use super::isa::{DotArithmetic, MR, MR_SINGLE, block_m, load, store};
use super::prefetch::{PREFETCH_INTERVAL, PrefetchRun};

/// One product of words in 32 bits. All pointers may be unaligned.
#[derive(Clone, Copy)]
pub(crate) struct Gemm {
    pub a: *const f32,
    /// Distance in A between neighbouring rows of C; this or `a_step` is 1.
    pub a_row: usize,
    /// Distance in A between neighbouring steps.
    pub a_step: usize,
    /// `[steps, queries]`, already advanced to the first lane.
    pub b: *const f32,
    /// `[rows, queries]`, already advanced to the first lane.
    pub c: *mut f32,
    pub rows: usize,
    pub steps: usize,
    /// Vectors of queries, starting at the pointers' lane.
    pub vectors: usize,
    /// Add to C, rather than overwrite it.
    pub add: bool,
    /// `[queries]`, already advanced to the first lane: raised to the largest of each column of C, which is a row of the scores. Null if nobody needs
    /// it.
    pub row_max: *mut f32,
}

impl Gemm {
    /// Computes the product. `next_prefetch` is called before each tile with its number of steps, and says what to
    /// prefetch in them: at most one address per [`PREFETCH_INTERVAL`] steps.
    ///
    /// # Safety
    /// For every row < rows, step < steps and lane < vectors · `S::F32_LANES`: `a + row·a_row + step·a_step` and
    /// `b + step·queries + lane` must be readable, `c + row·queries + lane` readable and writable, also `row_max + lane`
    /// unless that is null, and C must not overlap A or B.
    #[inline(always)]
    pub unsafe fn run<S: Simd, A: DotArithmetic>(
        self,
        simd: S,
        arithmetic: A,
        mut next_prefetch: impl FnMut(usize) -> PrefetchRun,
    ) {
        let max_nr = block_m::<S>() / S::F32_LANES;
        assert!(self.vectors <= max_nr, "rows are no longer than a tile");
        // SAFETY: this function's contract.
        unsafe {
            match self.vectors {
                0 => {}
                1 => columns::<S, A, 1>(simd, arithmetic, self, &mut next_prefetch),
                2 => columns::<S, A, 2>(simd, arithmetic, self, &mut next_prefetch),
                3 if max_nr > 2 => columns::<S, A, 3>(simd, arithmetic, self, &mut next_prefetch),
                _ if max_nr > 2 => columns::<S, A, 4>(simd, arithmetic, self, &mut next_prefetch),
                _ => {}
            }
        }
    }
}

/// NR vectors of columns, in tiles of [`MR`] rows, or of [`MR_SINGLE`] where they are a single vector wide.
#[inline(always)]
unsafe fn columns<S: Simd, A: DotArithmetic, const NR: usize>(
    simd: S,
    arithmetic: A,
    g: Gemm,
    next_prefetch: &mut dyn FnMut(usize) -> PrefetchRun,
) {
    let each = if NR == 1 { MR_SINGLE } else { MR };
    let mut whole = g.rows / each * each;
    if NR > 1 && g.rows - whole == 1 && whole > 0 {
        // A tile of a row takes as long as one of two or three: 4 and 3 rather than 6 and 1.
        whole -= each;
    }
    let head = Gemm { rows: whole, ..g };
    let mut tail = Gemm {
        a: g.a.wrapping_add(whole * g.a_row),
        c: g.c.wrapping_add(whole * block_m::<S>()),
        rows: g.rows - whole,
        ..g
    };
    // SAFETY: parts of the rows of what the caller promised.
    unsafe {
        if NR == 1 {
            tiles::<S, A, MR_SINGLE, NR>(simd, arithmetic, head, next_prefetch);
        } else {
            tiles::<S, A, MR, NR>(simd, arithmetic, head, next_prefetch);
        }
        if tail.rows == 7 {
            let four = Gemm { rows: 4, ..tail };
            tiles::<S, A, 4, NR>(simd, arithmetic, four, next_prefetch);
            tail.a = tail.a.wrapping_add(4 * g.a_row);
            tail.c = tail.c.wrapping_add(4 * block_m::<S>());
            tail.rows = 3;
        }
        match tail.rows {
            6 => tiles::<S, A, 6, NR>(simd, arithmetic, tail, next_prefetch),
            5 => tiles::<S, A, 5, NR>(simd, arithmetic, tail, next_prefetch),
            4 => tiles::<S, A, 4, NR>(simd, arithmetic, tail, next_prefetch),
            3 => tiles::<S, A, 3, NR>(simd, arithmetic, tail, next_prefetch),
            2 => tiles::<S, A, 2, NR>(simd, arithmetic, tail, next_prefetch),
            1 => tiles::<S, A, 1, NR>(simd, arithmetic, tail, next_prefetch),
            _ => {}
        }
    }
}

/// `rows / MR` tiles. A function of its own, so that the compiler allots registers to one shape of tile at a time.
#[inline(never)]
unsafe fn tiles<S: Simd, A: DotArithmetic, const MR: usize, const NR: usize>(
    simd: S,
    arithmetic: A,
    g: Gemm,
    next_prefetch: &mut dyn FnMut(usize) -> PrefetchRun,
) {
    struct Tiles<'a, A, const MR: usize, const NR: usize>(
        A,
        Gemm,
        &'a mut dyn FnMut(usize) -> PrefetchRun,
    );
    impl<A: DotArithmetic, const MR: usize, const NR: usize> WithSimd for Tiles<'_, A, MR, NR> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Tiles(arithmetic, g, next_prefetch) = self;
            // SAFETY: made by `tiles` only, whose caller promised.
            unsafe {
                // The stride that is 1 is told to the compiler, for simpler addresses.
                if g.a_step == 1 {
                    tile_loop::<S, A, MR, NR>(simd, arithmetic, g, g.a_row, 1, next_prefetch);
                } else {
                    tile_loop::<S, A, MR, NR>(simd, arithmetic, g, 1, g.a_step, next_prefetch);
                }
            }
        }
    }
    debug_assert!(g.a_step == 1 || g.a_row == 1);
    arithmetic.vectorize(simd, Tiles::<A, MR, NR>(arithmetic, g, next_prefetch))
}

#[inline(always)]
unsafe fn tile_loop<S: Simd, A: DotArithmetic, const MR: usize, const NR: usize>(
    simd: S,
    arithmetic: A,
    g: Gemm,
    a_row: usize,
    a_step: usize,
    next_prefetch: &mut dyn FnMut(usize) -> PrefetchRun,
) {
    for row in (0..g.rows).step_by(MR) {
        let part = Gemm {
            a: g.a.wrapping_add(row * a_row),
            c: g.c.wrapping_add(row * block_m::<S>()),
            ..g
        };
        let prefetch = next_prefetch(g.steps);
        // SAFETY: row + MR ≤ rows, which the caller promised.
        unsafe { tile_body::<S, A, MR, NR>(simd, arithmetic, part, a_row, a_step, prefetch) };
    }
}

#[inline(always)]
unsafe fn tile_body<S: Simd, A: DotArithmetic, const MR: usize, const NR: usize>(
    simd: S,
    arithmetic: A,
    g: Gemm,
    a_row: usize,
    a_step: usize,
    prefetch: PrefetchRun,
) {
    let mut tile = Registers {
        acc: [[simd.splat_f32s(0.0); NR]; MR],
        a: g.a,
        b: g.b,
        prefetch,
    };
    let prefetches = prefetch.count.min(g.steps / PREFETCH_INTERVAL);
    // SAFETY: MR rows, NR vectors and g.steps steps are readable and writable, by the caller's promise.
    unsafe {
        if g.add {
            for i in 0..MR {
                for j in 0..NR {
                    tile.acc[i][j] = load(simd, g.c.add(i * block_m::<S>() + j * S::F32_LANES));
                }
            }
        }
        for _ in 0..prefetches {
            tile.prefetch.issue();
            tile.steps(simd, arithmetic, a_row, a_step);
        }
        let mut left = g.steps - PREFETCH_INTERVAL * prefetches;
        if unrolls::<S>() {
            for _ in 0..left / PREFETCH_INTERVAL {
                tile.steps(simd, arithmetic, a_row, a_step);
            }
            left %= PREFETCH_INTERVAL;
        }
        for _ in 0..left {
            tile.step(simd, arithmetic, a_row, a_step);
        }
        for i in 0..MR {
            for j in 0..NR {
                store(
                    simd,
                    g.c.add(i * block_m::<S>() + j * S::F32_LANES),
                    tile.acc[i][j],
                );
            }
        }
        if !g.row_max.is_null() {
            // While the stores wait for each other.
            for j in 0..NR {
                let at = g.row_max.add(j * S::F32_LANES);
                let mut top = load(simd, at);
                for i in 0..MR {
                    top = simd.max_f32s(top, tile.acc[i][j]);
                }
                store(simd, at, top);
            }
        }
    }
}

/// A tile of C in registers, and where it is in A and B.
struct Registers<S: Simd, const MR: usize, const NR: usize> {
    acc: [[S::f32s; NR]; MR],
    a: *const f32,
    b: *const f32,
    prefetch: PrefetchRun,
}

/// Whether the loop is unrolled by [`PREFETCH_INTERVAL`] steps, with a fence between steps.
///
/// Six rows of two vectors take 12 multiply-adds in a step, 8 loads, and 6 more instructions for the loop if it is not
/// unrolled. With another program on the core's second hardware thread these are the bottleneck: on an EPYC (Zen 3) full
/// attention took 5 to 10 % longer at best, 11 to 16 % as a median. Without the fence compilers load for the next step
/// early, for which 16 registers are too few, and spill accumulators. With 32 registers a step has 24 multiply-adds, and
/// neither was measured to matter.
const fn unrolls<S: Simd>() -> bool {
    S::REGISTER_COUNT < 32
}

impl<S: Simd, const MR: usize, const NR: usize> Registers<S, MR, NR> {
    /// # Safety
    /// As [`Registers::step`], for so many steps.
    #[inline(always)]
    unsafe fn steps<A: DotArithmetic>(
        &mut self,
        simd: S,
        arithmetic: A,
        a_row: usize,
        a_step: usize,
    ) {
        for _ in 0..PREFETCH_INTERVAL {
            // SAFETY: promised by the caller.
            unsafe { self.step(simd, arithmetic, a_row, a_step) };
            if unrolls::<S>() {
                compiler_fence(Ordering::SeqCst);
            }
        }
    }

    /// # Safety
    /// MR rows of A and NR vectors of B must be readable at this step.
    #[inline(always)]
    unsafe fn step<A: DotArithmetic>(
        &mut self,
        simd: S,
        arithmetic: A,
        a_row: usize,
        a_step: usize,
    ) {
        let mut bs = [simd.splat_f32s(0.0); NR];
        // SAFETY: promised by the caller.
        unsafe {
            for j in 0..NR {
                bs[j] = load(simd, self.b.add(j * S::F32_LANES));
            }
            for i in 0..MR {
                let x = simd.splat_f32s(self.a.add(i * a_row).read_unaligned());
                for j in 0..NR {
                    self.acc[i][j] = arithmetic.mul_add(simd, x, bs[j], self.acc[i][j]);
                }
            }
        }
        self.a = self.a.wrapping_add(a_step);
        self.b = self.b.wrapping_add(block_m::<S>());
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::isa::{Backend, Float32, Native};

    /// Small integers, whose products and sums are exact in either arithmetic.
    fn number(at: usize) -> f32 {
        (at * 37 % 17) as f32 - 8.0
    }

    /// A product of `rows` by `numbers` by all queries, beside exact sums.
    struct Product<A>(A, usize, usize);

    impl<A: DotArithmetic> WithSimd for Product<A> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Product(arithmetic, rows, numbers) = self;
            let a = |row: usize, n: usize| number(row * numbers + n);
            let b = |n: usize, lane: usize| number(1 + n * block_m::<S>() + lane);
            let steps = numbers.div_ceil(A::ELEMS_PER_WORD);
            let word = |x: &dyn Fn(usize) -> f32, step: usize| {
                let bits = |n: usize| if n < numbers { x(n) } else { 0.0 };
                if A::ELEMS_PER_WORD == 1 {
                    return x(step);
                }
                let [low, high] =
                    [2 * step, 2 * step + 1].map(|n| u32::from(bf16::from_f32(bits(n)).to_bits()));
                f32::from_bits(low | high << 16)
            };
            for by_row in [false, true] {
                let (a_row, a_step) = if by_row { (steps, 1) } else { (1, rows) };
                let mut words = vec![0f32; rows * steps];
                for row in 0..rows {
                    for step in 0..steps {
                        words[row * a_row + step * a_step] = word(&|n| a(row, n), step);
                    }
                }
                let b_words: Vec<f32> = (0..steps * block_m::<S>())
                    .map(|at| word(&|n| b(n, at % block_m::<S>()), at / block_m::<S>()))
                    .collect();
                for vectors in 1..=block_m::<S>() / S::F32_LANES {
                    for add in [false, true] {
                        let mut c = vec![1f32; rows * block_m::<S>()];
                        let mut row_max = vec![-3f32; block_m::<S>()];
                        let g = Gemm {
                            a: words.as_ptr(),
                            a_row,
                            a_step,
                            b: b_words.as_ptr(),
                            c: c.as_mut_ptr(),
                            rows,
                            steps,
                            vectors,
                            add,
                            row_max: row_max.as_mut_ptr(),
                        };
                        // SAFETY: the matrices have these sizes.
                        unsafe { g.run(simd, arithmetic, |_| PrefetchRun::NOTHING) };
                        for (at, &c) in c.iter().enumerate() {
                            let (row, lane) = (at / block_m::<S>(), at % block_m::<S>());
                            let sum: f32 = (0..numbers).map(|n| a(row, n) * b(n, lane)).sum();
                            let want = if lane >= vectors * S::F32_LANES {
                                1.0
                            } else {
                                sum + f32::from(u8::from(add))
                            };
                            assert_eq!(c, want, "{rows} rows of {numbers}, at {at}");
                        }
                        for (lane, &top) in row_max.iter().enumerate() {
                            let column = c[lane..].iter().step_by(block_m::<S>());
                            let want = if lane >= vectors * S::F32_LANES {
                                -3.0
                            } else {
                                column.fold(-3.0, |top: f32, &x| top.max(x))
                            };
                            assert_eq!(top, want, "the maximum of {rows} rows in lane {lane}");
                        }
                    }
                }
            }
        }
    }

    const SIZES: [(usize, usize); 7] = [(1, 1), (2, 2), (5, 3), (6, 8), (7, 9), (12, 0), (120, 33)];

    #[test]
    fn products_of_integers_are_exact() {
        for isa in Isa::available() {
            for (rows, numbers) in SIZES {
                isa.run(Product(Float32, rows, numbers));
            }
        }
    }

    #[test]
    fn products_of_pairs_of_integers_are_exact() {
        let Some(pairs) = Native::bfloat16(Isa::Avx512) else {
            println!("skipped: products of pairs, which need AVX-512 BF16");
            return;
        };
        for (rows, numbers) in SIZES {
            pairs.run(Isa::Avx512, Product(pairs, rows, numbers));
        }
    }
}
