//! The polynomial behind 2^x, which all instruction sets share.

/// Coefficients of r, r², … r⁵ in 2^r. The constant term is exactly 1, so that 2^0 = 1 exactly.
/// Weighted minimax fit on [−1/2, 1/2]: relative error 9.2e-8.
#[allow(clippy::approx_constant)] // The first is near ln 2, as it should be, but not ln 2.
pub(crate) const COEFFICIENTS: [f32; 5] = [
    0.693_147,
    0.240_222_42,
    0.055_507_336,
    0.009_671_513,
    0.001_326_472_7,
];
