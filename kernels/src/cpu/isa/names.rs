//! The instruction sets by name. Knows nothing of what they can do.

/// An instruction set the kernels are compiled for. Hidden: tests force one, everybody else takes the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// Every instruction set of every architecture, best first.
    pub const ALL: [Isa; 4] = [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable];

    /// As `DITFASTATTN_ISA` names it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }
}
