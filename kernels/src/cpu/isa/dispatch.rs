//! Detection and dispatch: which instruction sets this machine has, and running code with one of them.

use pulp::{Simd, WithSimd};

use super::backend::Backend;
use super::names::Isa;
use super::native::Native;
use super::tile_shape::block_m;

impl Isa {
    /// Every instruction set this machine has, best first. Never empty.
    pub fn available() -> Vec<Isa> {
        let there = Isa::ALL.into_iter().filter(|isa| isa.is_available());
        there.collect()
    }

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        Native::run(self, Probe).is_some()
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
        Native::run(self, op).unwrap_or_default()
    }
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
