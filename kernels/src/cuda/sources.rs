//! The text of the CUDA kernels, and the hash that identifies it.

use sha2::{Digest, Sha256};

/// The kernels' text, by file name. The run-time compiler gets it as it is.
pub const SOURCES: [(&str, &str); 8] = [
    ("params.cuh", include_str!("../../cuda/params.cuh")),
    ("device.cuh", include_str!("../../cuda/device.cuh")),
    ("band.cuh", include_str!("../../cuda/band.cuh")),
    ("attention.cuh", include_str!("../../cuda/attention.cuh")),
    ("simple.cuh", include_str!("../../cuda/simple.cuh")),
    ("attention.cu", include_str!("../../cuda/attention.cu")),
    ("simple.cu", include_str!("../../cuda/simple.cu")),
    ("support.cu", include_str!("../../cuda/support.cu")),
];

/// Identifies the kernels' text: ahead-of-time code of another text is not used.
pub fn source_hash() -> String {
    let mut hash = Sha256::new();
    for (name, text) in SOURCES {
        hash.update(name);
        hash.update([0]);
        hash.update(text);
        hash.update([0]);
    }
    hex(&hash.finalize())
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
