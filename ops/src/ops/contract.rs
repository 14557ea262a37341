//! The version of the contract between rewriter and library.

use crate::abi::error::Error;
use crate::abi::kernel_info::KernelInfo;

/// The version of the contract between rewriter and library, the `contract` attribute of `DiTFastAttnStep` and of nodes with
/// explicit state. ONNX Runtime ignores versions of custom operators, so the graph carries it.
const CONTRACT: i64 = 3;

/// Refuses nodes that were written for another version of the contract: attributes that this library does not know could
/// mean other numbers.
pub(super) fn check_contract(info: &KernelInfo<'_>) -> Result<(), Error> {
    match info.int("contract").unwrap_or(CONTRACT) {
        1..=CONTRACT => Ok(()),
        other => Err(Error::graph(format!(
            "the model was rewritten for version {other} of the operators, this library has version {CONTRACT}; \
             use the dfa-rewrite and the library of one release"
        ))),
    }
}
