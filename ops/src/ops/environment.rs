//! What the operators take from the outside world: environment variables and the clock.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `DITFASTATTN_CACHE_BYTES` | bytes of cached tensors in the whole process; 0 turns caching off | a quarter of the memory, at most 8 GiB |
//! | `DITFASTATTN_IDLE_SECONDS` | a request that has not run for so long is forgotten | 600 |
//! | `DITFASTATTN_BF16_DOT` | 1: attention of bfloat16 and float16 on the CPU multiplies in bfloat16 where the machine can | 0 |
//! | `DITFASTATTN_STATS` | file to which the counters are written when a session ends | none |
//!
//! The first two are read once, when the first session with a rewritten model is made, the third at the first attention.

use std::sync::LazyLock;
use std::time::Instant;

use ditfastattn_kernels::Products;

use crate::state::Limits;

/// More than one 2K image needs (3.9 GiB for PixArt-Σ at 2048², float16), and not so much that it surprises.
const LARGEST_DEFAULT: u64 = 8 << 30;

const IDLE_SECONDS: u64 = 600;

/// What a variable says; values that are no numbers are ignored.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.trim().parse().ok()
}

/// How attention on the CPU multiplies. The same for the whole process, so that no step differs from another.
pub(super) fn products() -> Products {
    static CHOICE: LazyLock<Products> = LazyLock::new(|| match number("DITFASTATTN_BF16_DOT") {
        Some(1) => Products::Bfloat16,
        _ => Products::Float32,
    });
    *CHOICE
}

/// The limits that the environment asks for.
pub(super) fn limits() -> Limits {
    Limits {
        bytes: number("DITFASTATTN_CACHE_BYTES").unwrap_or_else(default_bytes),
        idle_ms: number("DITFASTATTN_IDLE_SECONDS")
            .unwrap_or(IDLE_SECONDS)
            .saturating_mul(1000),
    }
}

fn default_bytes() -> u64 {
    let quarter = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
            let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
            Some(kib * 1024 / 4)
        });
    quarter.unwrap_or(LARGEST_DEFAULT).min(LARGEST_DEFAULT)
}

/// Milliseconds since the first use of the library.
pub(super) fn clock() -> impl Fn() -> u64 + Send + Sync {
    let start = Instant::now();
    move || u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}
