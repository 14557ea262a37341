//! Which instruction set runs. Owns detection and dispatch, nothing numeric.

#[cfg(target_arch = "x86_64")]
use std::sync::LazyLock;

use pulp::{Simd, WithSimd};

use super::gemm::block_m;

/// An instruction set the kernels are compiled for. Hidden: tests force one, everybody else takes the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 F, BW, CD, DQ, VL (and what comes with them).
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// 128-bit vectors of aarch64.
    Neon,
    /// Whatever the compiler makes of arrays of 8 floats.
    Portable,
}

impl Isa {
    /// Every instruction set this machine has, best first. Never empty.
    pub fn available() -> Vec<Isa> {
        let all = [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable];
        all.into_iter().filter(|l| l.run(Probe)).collect()
    }

    /// The best of this machine.
    pub fn best() -> Isa {
        Isa::available()[0]
    }

    /// Queries in a block (`BLOCK_M`); 1 on a machine without this instruction set, where nothing is run.
    pub(crate) fn block_m(self) -> usize {
        self.run(Queries).max(1)
    }

    /// Runs `op` with these vectors; on a machine without them does nothing and returns the default.
    pub fn run<Op: WithSimd>(self, op: Op) -> Op::Output
    where
        Op::Output: Default,
    {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => pulp::x86::V4::try_new()
                .map(|s| Simd::vectorize(s, op))
                .unwrap_or_default(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => pulp::x86::V3::try_new()
                .map(|s| Simd::vectorize(s, op))
                .unwrap_or_default(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => pulp::aarch64::Neon::try_new()
                .map(|s| Simd::vectorize(s, op))
                .unwrap_or_default(),
            Isa::Portable => Simd::vectorize(pulp::Scalar256b, op),
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
        block_m::<S>()
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
