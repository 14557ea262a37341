//! SHA-256 in the form in which files and journals carry it.

use sha2::{Digest, Sha256};

/// The digest of `bytes`, in lower-case hexadecimal.
pub fn sha256(bytes: impl AsRef<[u8]>) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|b| format!("{b:02x}")).collect()
}
