//! x86-64: AVX-512 and AVX2, with SSE where vectors are short.

mod avx2;
mod avx512;
mod bf16;

use std::arch::x86_64::*;
use std::sync::LazyLock;

use pulp::x86::{V3, V4};
use pulp::{Simd, WithSimd};

use crate::cpu::isa::backend::{Backend, RegisterEpilogue};
use crate::cpu::isa::names::Isa;
use crate::cpu::isa::tuning::{MachineTuning, NARROW, TaskPacking};
use crate::cpu::isa::vector::is;
use avx512::{as_avx512, from_avx512};
use bf16::Bfloat16;

/// x86-64.
pub(crate) struct X86;

/// AVX-512 on Intel.
const AVX512_INTEL: MachineTuning = MachineTuning {
    name: "avx512-intel",
    pack_threshold_queries: 900,
    task_packing: TaskPacking::AliasedValues,
};

/// AVX-512 elsewhere: measured on Zen 4.
const AVX512_AMD: MachineTuning = MachineTuning {
    name: "avx512-amd",
    pack_threshold_queries: 1280,
    task_packing: TaskPacking::Never,
};

impl Backend for X86 {
    const TUNINGS: &'static [MachineTuning] = &[AVX512_INTEL, AVX512_AMD, NARROW];

    fn tuning(isa: Isa) -> MachineTuning {
        match isa {
            Isa::Avx512 if is_intel() => AVX512_INTEL,
            Isa::Avx512 => AVX512_AMD,
            _ => NARROW,
        }
    }

    fn run<Op: WithSimd>(isa: Isa, op: Op) -> Option<Op::Output> {
        match isa {
            Isa::Avx512 => V4::try_new().map(|simd| Simd::vectorize(simd, op)),
            Isa::Avx2 => V3::try_new().map(|simd| Simd::vectorize(simd, op)),
            Isa::Portable => Some(Simd::vectorize(pulp::Scalar256b, op)),
            Isa::Neon => None,
        }
    }

    type Bfloat16 = Bfloat16;

    fn bfloat16(isa: Isa) -> Option<Bfloat16> {
        Bfloat16::new().filter(|_| isa == Isa::Avx512)
    }

    const PREFETCHES: bool = true;

    #[inline(always)]
    fn prefetch(address: *const u8) {
        // SAFETY: a prefetch is allowed on any address; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }

    #[inline(always)]
    fn exp2<S: Simd>(x: S::f32s) -> Option<S::f32s> {
        // SAFETY: vectors of that type exist only where AVX-512 does.
        as_avx512::<S>(x).map(|x| from_avx512::<S>(unsafe { avx512::exp2(x) }))
    }

    #[inline(always)]
    unsafe fn transpose_blocked<S: Simd, const READS: bool>(
        from: *const f32,
        from_stride: isize,
        to: *mut f32,
        to_stride: isize,
        outer: usize,
        inner: usize,
    ) -> usize {
        let avx512 = is::<S, V4>();
        if !avx512 && !is::<S, V3>() {
            return 0;
        }
        let side = S::F32_LANES;
        let done = outer / side * side;
        let squares = inner / side * side;
        let at = |a: usize, b: usize| {
            let (i, j) = if READS { (a, b) } else { (b, a) };
            (
                from.wrapping_offset(i as isize * from_stride + j as isize),
                to.wrapping_offset(j as isize * to_stride + i as isize),
            )
        };
        for a in (0..done).step_by(side) {
            for b in (0..squares).step_by(side) {
                let (from, to) = at(a, b);
                // SAFETY: `side` by `side` elements from here on lie inside; `S` says which instructions are there.
                unsafe {
                    if avx512 {
                        avx512::transpose_16x16(from, from_stride, to, to_stride);
                    } else {
                        avx2::transpose_8x8(from, from_stride, to, to_stride);
                    }
                }
            }
            for b in (squares..inner / 4 * 4).step_by(4) {
                // SAFETY: `side` by 4 elements from here on lie inside, of the matrix if `READS`, else of the transposed
                // one.
                unsafe {
                    let (from, to) = at(a, b);
                    if !avx512 {
                        Self::transpose_4x4(from, from_stride, to, to_stride);
                        let (from, to) = at(a + 4, b);
                        Self::transpose_4x4(from, from_stride, to, to_stride);
                    } else if READS {
                        avx512::transpose_16x4(from, from_stride, to, to_stride);
                    } else {
                        avx512::transpose_4x16(from, from_stride, to, to_stride);
                    }
                }
            }
        }
        done
    }

    /// With SSE: left to itself the compiler moves the 16 elements one by one.
    #[inline(always)]
    unsafe fn transpose_4x4(from: *const f32, from_stride: isize, to: *mut f32, to_stride: isize) {
        // SAFETY: SSE is part of x86-64; the caller says that 4 × 4 elements can be read and written.
        unsafe {
            let row = |i: isize| _mm_loadu_ps(from.offset(i * from_stride));
            let (a, b, c, d) = (row(0), row(1), row(2), row(3));
            let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
            let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
            _mm_storeu_ps(to, _mm_movelh_ps(ab, cd));
            _mm_storeu_ps(to.offset(to_stride), _mm_movehl_ps(cd, ab));
            _mm_storeu_ps(to.offset(2 * to_stride), _mm_movelh_ps(ab_high, cd_high));
            _mm_storeu_ps(to.offset(3 * to_stride), _mm_movehl_ps(cd_high, ab_high));
        }
    }

    #[inline(always)]
    fn has_register_epilogue<S: Simd>(channels: usize) -> bool {
        // Head dims that are not a multiple of 8 are rare: not worth a second path with masks in AVX2.
        is::<S, V4>() || is::<S, V3>() && channels.is_multiple_of(8)
    }

    #[inline(always)]
    unsafe fn register_epilogue<S: Simd>(epilogue: RegisterEpilogue) -> bool {
        // SAFETY: promised by the caller; `S` says which instructions are there.
        unsafe {
            if is::<S, V4>() {
                avx512::epilogue(epilogue)
            } else {
                assert!(is::<S, V3>());
                avx2::epilogue(epilogue)
            }
        }
    }

    fn packs_bf16() -> bool {
        Bfloat16::new().is_some()
    }

    unsafe fn pack_adjacent(from: *const u16, is_f16: bool, n: usize, to: *mut f32) {
        debug_assert!(Self::packs_bf16());
        // SAFETY: promised by the caller, the instructions too.
        unsafe { bf16::pack_adjacent(from, is_f16, n, to) }
    }

    unsafe fn pack_interleaved(
        first: *const u16,
        second: Option<*const u16>,
        is_f16: bool,
        n: usize,
        to: *mut f32,
    ) {
        debug_assert!(Self::packs_bf16());
        // SAFETY: promised by the caller, the instructions too.
        unsafe { bf16::pack_interleaved(first, second, is_f16, n, to) }
    }
}

/// Whether the processor says that it is one of Intel's.
fn is_intel() -> bool {
    // Asked once: under a hypervisor it is a trap.
    static IT_IS: LazyLock<bool> = LazyLock::new(|| {
        let name = __cpuid(0);
        [name.ebx, name.edx, name.ecx]
            .map(u32::to_le_bytes)
            .as_flattened()
            == b"GenuineIntel"
    });
    *IT_IS
}
