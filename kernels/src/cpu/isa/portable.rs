//! Any other architecture: what the compiler makes of arrays of 8 floats.

use pulp::{Simd, WithSimd};

use super::backend::Backend;
use super::names::Isa;
use super::precision::Float32;
use super::tuning::{MachineTuning, NARROW};

/// An architecture without intrinsics.
pub(crate) struct Portable;

impl Backend for Portable {
    const TUNINGS: &'static [MachineTuning] = &[NARROW];

    fn tuning(_: Isa) -> MachineTuning {
        NARROW
    }

    fn run<Op: WithSimd>(isa: Isa, op: Op) -> Option<Op::Output> {
        (isa == Isa::Portable).then(|| Simd::vectorize(pulp::Scalar256b, op))
    }

    /// There are none: a type is needed all the same.
    type Bfloat16 = Float32;

    fn bfloat16(_: Isa) -> Option<Float32> {
        None
    }
}
