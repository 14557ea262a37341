//! What an architecture provides beside `pulp`'s vectors: detection, tuning, and the steps that generic vectors are slow at.

use pulp::{Simd, WithSimd};

use super::names::Isa;
use super::precision::DotArithmetic;
use super::tuning::MachineTuning;

/// A vector of queries of all channels: `to = o / sum − subtract + add`.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // Nothing else has such an epilogue so far.
pub(crate) struct RegisterEpilogue {
    /// `[channels, row]`.
    pub o: *const f32,
    /// `[row]`.
    pub sum: *const f32,
    /// `[channels, row]`.
    pub subtract: Option<*const f32>,
    pub row: usize,
    pub channels: usize,
    /// `[queries, channels]`, and the distance of its lines.
    pub add: Option<(*const f32, isize)>,
    /// Likewise.
    pub to: (*mut f32, isize),
}

/// One architecture. All intrinsics are here or below; what it does not override is portable.
///
/// Which instructions a function may use is said by the vectors `S` that it is called with: those of an instruction set
/// exist on machines that have it only.
pub(crate) trait Backend {
    /// The rows of its tuning table, the portable one included.
    const TUNINGS: &'static [MachineTuning];

    /// The tuning for this machine.
    fn tuning(isa: Isa) -> MachineTuning;

    /// Runs `op` with the vectors of `isa`; `None` where architecture or machine lack it.
    fn run<Op: WithSimd>(isa: Isa, op: Op) -> Option<Op::Output>;

    /// Products of pairs of bfloat16.
    type Bfloat16: DotArithmetic + Sync;

    /// Products of pairs of bfloat16 on `isa`; `None` where it or the machine lacks the instructions.
    fn bfloat16(isa: Isa) -> Option<Self::Bfloat16>;

    /// Whether software prefetch is worth its instructions; else it is left to the hardware.
    const PREFETCHES: bool = false;

    /// Prefetches the cache line of an address, which may be any, into the L2.
    #[inline(always)]
    fn prefetch(_: *const u8) {}

    /// 2^x as in `exp`, where there is a faster way than its vectors.
    #[inline(always)]
    fn exp2<S: Simd>(_: S::f32s) -> Option<S::f32s> {
        None
    }

    /// Transposes what it can in squares with a vector to a side, or a vector by 4; says how much of `outer` that was,
    /// all but the last `inner` % 4 of it.
    ///
    /// Where lines are a multiple of 4 KB apart (16 heads of 64 channels) 16 of them alias to one set of the L1: what is not
    /// taken of a cache line at once has to be fetched again. A square of 16 takes all of it.
    ///
    /// # Safety
    /// As for `transpose`, rows and columns being `outer` and `inner` if `READS`, else the other way round.
    #[inline(always)]
    unsafe fn transpose_blocked<S: Simd, const READS: bool>(
        _from: *const f32,
        _from_stride: isize,
        _to: *mut f32,
        _to_stride: isize,
        _outer: usize,
        _inner: usize,
    ) -> usize {
        0
    }

    /// Transposes 4 × 4 elements.
    ///
    /// # Safety
    /// They must be readable and writable, and the matrices must not overlap.
    #[inline(always)]
    unsafe fn transpose_4x4(from: *const f32, from_stride: isize, to: *mut f32, to_stride: isize) {
        for i in 0..4 {
            for j in 0..4 {
                // SAFETY: the caller says that 4 × 4 elements can be read and written.
                unsafe { *to.offset(j * to_stride + i) = *from.offset(i * from_stride + j) }
            }
        }
    }

    /// Whether [`Backend::register_epilogue`] does so many channels.
    #[inline(always)]
    fn has_register_epilogue<S: Simd>(_channels: usize) -> bool {
        false
    }

    /// Writes a vector of queries; says whether it is finite before `add` is added.
    ///
    /// # Safety
    /// [`Backend::has_register_epilogue`] must say so; the elements must be readable, and those of `to` writable.
    #[inline(always)]
    unsafe fn register_epilogue<S: Simd>(_: RegisterEpilogue) -> bool {
        unreachable!("there is no epilogue in registers")
    }

    /// Whether half precision is packed by [`Backend::pack_adjacent`] and [`Backend::pack_interleaved`].
    #[inline(always)]
    fn packs_bf16() -> bool {
        false
    }

    /// Packs a contiguous line of half precision, two adjacent elements to a word; beside an odd last one is 0.
    ///
    /// # Safety
    /// [`Backend::packs_bf16`] must say so, `from` must be readable for `n` elements and `to` writable for half as many
    /// words, rounded up.
    unsafe fn pack_adjacent(_from: *const u16, _is_f16: bool, _n: usize, _to: *mut f32) {
        unreachable!("there is no packing of half precision")
    }

    /// Packs two contiguous lines of half precision, an element of each to a word; without a second one there is 0 beside
    /// the first.
    ///
    /// # Safety
    /// [`Backend::packs_bf16`] must say so, `first`, and `second` if there is one, must be readable for `n` elements and
    /// `to` writable for as many words.
    unsafe fn pack_interleaved(
        _first: *const u16,
        _second: Option<*const u16>,
        _is_f16: bool,
        _n: usize,
        _to: *mut f32,
    ) {
        unreachable!("there is no packing of half precision")
    }
}
