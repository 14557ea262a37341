//! aarch64: NEON, by `pulp`'s vectors alone. Its prefetch is not stable in Rust, and the hardware's is left to work.

use pulp::aarch64::Neon;
use pulp::{Simd, WithSimd};

use super::backend::Backend;
use super::names::Isa;
use super::precision::Float32;
use super::tuning::{MachineTuning, NARROW};

/// aarch64.
pub(crate) struct Aarch64;

impl Backend for Aarch64 {
    const TUNINGS: &'static [MachineTuning] = &[NARROW];

    fn tuning(_: Isa) -> MachineTuning {
        NARROW
    }

    fn run<Op: WithSimd>(isa: Isa, op: Op) -> Option<Op::Output> {
        match isa {
            Isa::Neon => Neon::try_new().map(|simd| Simd::vectorize(simd, op)),
            Isa::Portable => Some(Simd::vectorize(pulp::Scalar256b, op)),
            Isa::Avx512 | Isa::Avx2 => None,
        }
    }

    /// There are none: a type is needed all the same.
    type Bfloat16 = Float32;

    fn bfloat16(_: Isa) -> Option<Float32> {
        None
    }
}
