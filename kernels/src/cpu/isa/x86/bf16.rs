//! AVX-512 BF16: products of pairs, and packing half precision into pairs.

use std::arch::x86_64::*;

use pulp::x86::V4;
use pulp::{Simd, WithSimd};

use crate::cpu::isa::names::Isa;
use crate::cpu::isa::precision::DotArithmetic;

use super::avx512::{as_avx512, from_avx512};

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
unsafe fn pack_pair(first: __m512, second: __m512) -> __m512 {
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

/// As many ones as there are elements left, at most `lanes`, which are fewer than 64.
fn ones(left: usize, lanes: usize) -> u64 {
    (1 << left.min(lanes)) - 1
}

/// Packs a line, two adjacent elements to a word.
///
/// # Safety
/// `from` must be readable for `n` elements and `to` writable for half as many, rounded up; the machine must be one of
/// [`Bfloat16`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn pack_adjacent(from: *const u16, is_f16: bool, n: usize, to: *mut f32) {
    for at in (0..n).step_by(32) {
        let left = n - at;
        // SAFETY: what is left is readable and writable by the caller's promise, and no more is touched; 512 bits both
        // ways.
        unsafe {
            let mut both = _mm512_maskz_loadu_epi16(ones(left, 32) as u32, from.add(at).cast());
            if is_f16 {
                let low = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
                let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(both));
                let words = _mm512_cvtne2ps_pbh(high, low);
                both = std::mem::transmute::<__m512bh, __m512i>(words);
            }
            let mask = ones(left.div_ceil(2), 16) as u16;
            _mm512_mask_storeu_ps(to.add(at / 2), mask, _mm512_castsi512_ps(both));
        }
    }
}

/// Packs two lines, an element of each to a word.
///
/// # Safety
/// `first`, and `second` if there is one, must be readable for `n` elements and `to` writable for as many words; the
/// machine must be one of [`Bfloat16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn pack_interleaved(
    first: *const u16,
    second: Option<*const u16>,
    is_f16: bool,
    n: usize,
    to: *mut f32,
) {
    for at in (0..n).step_by(16) {
        let mask = ones(n - at, 16) as u16;
        // SAFETY: what is left is readable and writable by the caller's promise, and no more is touched.
        unsafe {
            let low = _mm256_maskz_loadu_epi16(mask, first.add(at).cast());
            let high = match second {
                Some(second) => _mm256_maskz_loadu_epi16(mask, second.add(at).cast()),
                None => _mm256_setzero_si256(),
            };
            let words = if is_f16 {
                pack_pair(_mm512_cvtph_ps(low), _mm512_cvtph_ps(high))
            } else {
                let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
                _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(low), high))
            };
            _mm512_mask_storeu_ps(to.add(at), mask, words);
        }
    }
}
