//! The precision of the two products: what a 32-bit word of a matrix holds, and how words are multiplied and added.
//!
//! Owns the choice between float32 and pairs of bfloat16, and the instructions of the latter. Everything else, softmax and
//! sums included, is float32 whatever the choice. Knows nothing of tensors: words are made in `pack_bf16` and in `task`.

use pulp::{Simd, WithSimd};

use super::isa::Isa;
use super::vector::mul_add;

/// How words are multiplied. Its values are proof that the machine can.
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

/// Pairs of bfloat16 on `isa`; `None` where it or the machine lacks the instructions.
#[cfg(target_arch = "x86_64")]
pub(crate) fn bfloat16(isa: Isa) -> Option<Bfloat16> {
    Bfloat16::new().filter(|_| isa == Isa::Avx512)
}

/// No such machine has them so far.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn bfloat16(_: Isa) -> Option<Float32> {
    None
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Bfloat16, pack_pair};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use pulp::x86::V4;

    use super::super::vector::{as_avx512, from_avx512};
    use super::*;

    /// Two bfloat16 in a word, the first in the low half. AVX-512 only.
    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Bfloat16(V4);

    impl Bfloat16 {
        /// `None` if the machine lacks the instructions.
        pub fn new() -> Option<Self> {
            let there = is_x86_feature_detected!("avx512bf16");
            V4::try_new().filter(|_| there).map(Bfloat16)
        }
    }

    impl DotArithmetic for Bfloat16 {
        const ELEMS_PER_WORD: usize = 2;

        #[inline(always)]
        fn run<Op: WithSimd>(self, _: Isa, op: Op) -> Op::Output
        where
            Op::Output: Default,
        {
            // SAFETY: there is a `Bfloat16`, so the machine has all of these instructions.
            unsafe { with_bf16(self.0, op) }
        }

        #[inline(always)]
        fn vectorize<S: Simd, Op: WithSimd>(self, _: S, op: Op) -> Op::Output {
            // SAFETY: as in `run`.
            unsafe { with_bf16(self.0, op) }
        }

        #[inline(always)]
        fn mul_add<S: Simd>(self, _: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
            // SAFETY: as in `run`.
            from_avx512::<S>(unsafe { dot(as_zmm::<S>(a), as_zmm::<S>(b), as_zmm::<S>(c)) })
        }

        #[inline(always)]
        fn pack_pair<S: Simd>(self, _: S, first: S::f32s, second: S::f32s) -> S::f32s {
            // SAFETY: as in `run`.
            from_avx512::<S>(unsafe { pack_pair(as_zmm::<S>(first), as_zmm::<S>(second)) })
        }

        #[inline(always)]
        fn unpack(word: f32) -> [f32; 2] {
            let bits = word.to_bits();
            [bits << 16, bits & 0xffff_0000].map(f32::from_bits)
        }

        #[inline(always)]
        fn unpack_lane<S: Simd>(simd: S, words: S::f32s, index: usize) -> S::f32s {
            let bits = simd.transmute_u32s_f32s(words);
            simd.transmute_f32s_u32s(if index == 0 {
                simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(16))
            } else {
                simd.and_u32s(bits, simd.splat_u32s(0xffff_0000))
            })
        }
    }

    /// Tasks run on AVX-512 only under this arithmetic.
    #[inline(always)]
    fn as_zmm<S: Simd>(x: S::f32s) -> __m512 {
        as_avx512::<S>(x).expect("vectors of AVX-512")
    }

    /// # Safety
    /// The machine must have AVX-512 BF16, and what [`Isa::Avx512`] stands for.
    #[target_feature(
        enable = "sse,sse2,fxsr,sse3,ssse3,sse4.1,sse4.2,popcnt,avx,avx2,bmi1,bmi2,fma,lzcnt"
    )]
    #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16")]
    unsafe fn with_bf16<Op: WithSimd>(simd: V4, op: Op) -> Op::Output {
        op.with_simd(simd)
    }

    /// # Safety
    /// The machine must have AVX-512 BF16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn dot(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: 512 bits both ways.
        let (a, b) = unsafe {
            (
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        };
        _mm512_dpbf16_ps(c, a, b)
    }

    /// Words of pairs.
    ///
    /// # Safety
    /// The machine must have AVX-512 BF16 and BW.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) unsafe fn pack_pair(first: __m512, second: __m512) -> __m512 {
        // 16 bfloat16 of the first, then 16 of the second, one of each to a word.
        const BESIDE: [u16; 32] = {
            let mut at = [0; 32];
            let mut i = 0;
            while i < 16 {
                at[2 * i] = i as u16;
                at[2 * i + 1] = 16 + i as u16;
                i += 1;
            }
            at
        };
        let both = _mm512_cvtne2ps_pbh(second, first);
        // SAFETY: 512 bits all of them.
        unsafe {
            let at = std::mem::transmute::<[u16; 32], __m512i>(BESIDE);
            let both = std::mem::transmute::<__m512bh, __m512i>(both);
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(at, both))
        }
    }
}
