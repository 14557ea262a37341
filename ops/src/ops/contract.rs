//! Which versions of the contract between rewriter and library this library serves.

use crate::abi::error::Error;
use crate::abi::kernel_info::KernelInfo;
use ditfastattn_contract::attributes;
use ditfastattn_contract::version::{FIRST, NEWEST};

/// Refuses nodes that were written for another version of the contract: attributes that this library does not know could
/// mean other numbers.
pub(super) fn check_contract(info: &KernelInfo<'_>) -> Result<(), Error> {
    match info.int(attributes::CONTRACT).unwrap_or(NEWEST) {
        FIRST..=NEWEST => Ok(()),
        other => Err(Error::graph(format!(
            "the model was rewritten for version {other} of the operators, this library has version {NEWEST}; \
             use the dfa-rewrite and the library of one release"
        ))),
    }
}
