//! The architecture that this library is compiled for.

#[cfg(target_arch = "aarch64")]
pub(crate) use super::aarch64::Aarch64 as Native;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) use super::portable::Portable as Native;
#[cfg(target_arch = "x86_64")]
pub(crate) use super::x86::X86 as Native;
