//! What `pulp` leaves to be said about vectors: unaligned memory, and a multiply-add that is never slow.

use std::any::TypeId;

use pulp::Simd;

/// Whether the vectors S are those of the instruction set L.
#[inline(always)]
pub(crate) fn is<S: Simd, L: Simd>() -> bool {
    TypeId::of::<S>() == TypeId::of::<L>()
}

/// # Safety
/// `S::F32_LANES` floats at `p` must be readable; no alignment is needed.
#[inline(always)]
pub(crate) unsafe fn load<S: Simd>(_: S, p: *const f32) -> S::f32s {
    // SAFETY: promised by the caller; every bit pattern is a vector.
    unsafe { p.cast::<S::f32s>().read_unaligned() }
}

/// # Safety
/// `S::F32_LANES` floats at `p` must be writable; no alignment is needed.
#[inline(always)]
pub(crate) unsafe fn store<S: Simd>(_: S, p: *mut f32, x: S::f32s) {
    // SAFETY: promised by the caller.
    unsafe { p.cast::<S::f32s>().write_unaligned(x) }
}

/// a · b + c, rounded once where the machine can and twice where it cannot.
///
/// Without such an instruction `pulp` calls the C library's exact `fmaf` for every lane, a hundred times slower.
#[inline(always)]
pub(crate) fn mul_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
    if is::<S, pulp::Scalar256b>() {
        simd.add_f32s(simd.mul_f32s(a, b), c)
    } else {
        simd.mul_add_e_f32s(a, b, c)
    }
}
