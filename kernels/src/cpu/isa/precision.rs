//! The precision of the two products: what a 32-bit word of a matrix holds, and how words are multiplied and added.
//!
//! Owns what every precision must provide, and float32; others are with their instruction sets. Everything else, softmax and
//! sums included, is float32 whatever the precision. Knows nothing of tensors: words are made in `pack_bf16` and in `task`.

use pulp::{Simd, WithSimd};

use super::names::Isa;
use super::vector::mul_add;

/// What a precision of the matrix kernel must provide: how words are packed, multiplied and read back. Its values are proof
/// that the machine can.
pub(crate) trait DotArithmetic: Copy {
    /// Elements in a word: steps of a product that are taken at once.
    const ELEMS_PER_WORD: usize;

    /// Runs `op`, with `isa` or with the one that the arithmetic needs.
    fn run<Op: WithSimd>(self, isa: Isa, op: Op) -> Op::Output
    where
        Op::Output: Default;

    /// Compiles `op` as a function of its own, with the instructions of the vectors and of the arithmetic.
    fn vectorize<S: Simd, Op: WithSimd>(self, simd: S, op: Op) -> Op::Output;

    /// c plus the products of the elements of `a` and `b`.
    fn mul_add<S: Simd>(self, simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s;

    /// Words of `first` and `second`, rounded to nearest; of `first` alone where a word holds one element.
    fn pack_pair<S: Simd>(self, simd: S, first: S::f32s, second: S::f32s) -> S::f32s;

    /// The elements of a word; zeros where it holds fewer.
    fn unpack(word: f32) -> [f32; 2];

    /// Element `index` of each word.
    fn unpack_lane<S: Simd>(simd: S, words: S::f32s, index: usize) -> S::f32s;
}

/// One float32 in a word.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Float32;

impl DotArithmetic for Float32 {
    const ELEMS_PER_WORD: usize = 1;

    #[inline(always)]
    fn run<Op: WithSimd>(self, isa: Isa, op: Op) -> Op::Output
    where
        Op::Output: Default,
    {
        isa.run(op)
    }

    #[inline(always)]
    fn vectorize<S: Simd, Op: WithSimd>(self, simd: S, op: Op) -> Op::Output {
        simd.vectorize(op)
    }

    #[inline(always)]
    fn mul_add<S: Simd>(self, simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        mul_add(simd, a, b, c)
    }

    #[inline(always)]
    fn pack_pair<S: Simd>(self, _: S, first: S::f32s, _: S::f32s) -> S::f32s {
        first
    }

    #[inline(always)]
    fn unpack(word: f32) -> [f32; 2] {
        [word, 0.0]
    }

    #[inline(always)]
    fn unpack_lane<S: Simd>(_: S, words: S::f32s, _: usize) -> S::f32s {
        words
    }
}
