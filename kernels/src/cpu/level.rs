//! Which instruction set runs. Owns detection and dispatch, nothing numeric.

#[cfg(target_arch = "x86_64")]
use std::sync::LazyLock;

use pulp::{Simd, WithSimd};

use super::gemm::row_len;

/// An instruction set the kernels are compiled for. Hidden: tests force one, everybody else takes the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// AVX-512 F, BW, CD, DQ, VL (and what comes with them).
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// 128-bit vectors of aarch64.
    Neon,
    /// Whatever the compiler makes of arrays of 8 floats.
    Portable,
}

impl Level {
    /// Every level this machine can run, best first. Never empty.
    pub fn available() -> Vec<Level> {
        let all = [Level::Avx512, Level::Avx2, Level::Neon, Level::Portable];
        all.into_iter().filter(|l| l.run(Probe)).collect()
    }

    /// The best level of this machine.
    pub fn best() -> Level {
        Level::available()[0]
    }

    /// Queries in a block; 1 on a machine without this level, where nothing is run.
    pub(crate) fn queries(self) -> usize {
        self.run(Queries).max(1)
    }

    /// Runs `op` with this level's vectors; on a machine without them does nothing and returns the default.
    pub fn run<Op: WithSimd>(self, op: Op) -> Op::Output
    where
        Op::Output: Default,
    {
        match self {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => pulp::x86::V4::try_new()
                .map(|s| Simd::vectorize(s, op))
                .unwrap_or_default(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => pulp::x86::V3::try_new()
                .map(|s| Simd::vectorize(s, op))
                .unwrap_or_default(),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => pulp::aarch64::Neon::try_new()
                .map(|s| Simd::vectorize(s, op))
                .unwrap_or_default(),
            Level::Portable => Simd::vectorize(pulp::Scalar256b, op),
            #[allow(unreachable_patterns)]
            _ => Op::Output::default(),
        }
    }
}

/// Whether the processor says that it is one of Intel's.
pub(crate) fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        // Asked once: under a hypervisor it is a trap.
        static IT_IS: LazyLock<bool> = LazyLock::new(|| {
            let name = std::arch::x86_64::__cpuid(0);
            [name.ebx, name.edx, name.ecx]
                .map(u32::to_le_bytes)
                .as_flattened()
                == b"GenuineIntel"
        });
        *IT_IS
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Answers how many queries are in a block.
struct Queries;

impl WithSimd for Queries {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        row_len::<S>()
    }
}

/// Answers whether it was run.
struct Probe;

impl WithSimd for Probe {
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> bool {
        true
    }
}
