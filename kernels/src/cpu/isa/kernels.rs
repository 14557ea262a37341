//! The table of matrix kernels: what each provides, for tests and whoever adds one.

use pulp::{Simd, WithSimd};

use super::backend::Backend;
use super::names::Isa;
use super::native::Native;
use super::precision::{DotArithmetic, Float32};
use super::tile_shape::{MR, block_m};

/// The matrix kernel of one instruction set at one precision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixKernel {
    pub isa: Isa,
    /// `f32` or `bf16`.
    pub precision: &'static str,
    /// Queries in a vector.
    pub lanes: usize,
    /// Rows of a register tile.
    pub mr: usize,
    /// Vectors in a row of a register tile.
    pub nr: usize,
    /// Vector registers of the instruction set.
    pub registers: usize,
    /// How operands are packed: steps in a 32-bit word.
    pub elems_per_word: usize,
}

/// The kernels that this machine has, best first. Those of other machines are not in it.
pub fn kernels() -> Vec<MatrixKernel> {
    let mut all = Vec::new();
    for isa in Isa::available() {
        if let Some(bfloat16) = Native::bfloat16(isa) {
            all.extend(describe(bfloat16, isa, "bf16"));
        }
        all.extend(describe(Float32, isa, "f32"));
    }
    all
}

fn describe<A: DotArithmetic>(
    arithmetic: A,
    isa: Isa,
    precision: &'static str,
) -> Option<MatrixKernel> {
    struct Shape;
    impl WithSimd for Shape {
        type Output = Option<[usize; 3]>;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> Self::Output {
            Some([S::F32_LANES, block_m::<S>(), S::REGISTER_COUNT])
        }
    }
    let [lanes, block_m, registers] = arithmetic.run(isa, Shape)?;
    Some(MatrixKernel {
        isa,
        precision,
        lanes,
        mr: MR,
        nr: block_m / lanes,
        registers,
        elems_per_word: A::ELEMS_PER_WORD,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fit_the_registers() {
        let all = kernels();
        for isa in Isa::available() {
            assert!(all.iter().any(|k| k.isa == isa && k.precision == "f32"));
        }
        for k in all {
            // Sums, a row of B, and one element of A for all lanes; with 16 registers the latter is an operand in memory.
            let needed = k.mr * k.nr + k.nr + usize::from(k.registers >= 32);
            assert!(needed <= k.registers, "{k:?}");
            assert_eq!(k.lanes * k.nr, k.isa.block_m(), "{k:?}");
        }
    }
}
