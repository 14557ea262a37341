//! Digests: whether two tensors are the same, byte for byte.
//!
//! Every byte is read, at every run. Knowing a buffer by its address would be cheaper and is not safe: a server may write the
//! next client's tensor into the buffer of the last one. xxh3 reads about as fast as memory is.

use std::hash::BuildHasher;
use std::sync::LazyLock;

use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::feed::Feed;

/// Of 128 bits, with a seed that changes with every process, so that clients cannot aim at collisions.
pub(super) type Digest = u128;

static SEED: LazyLock<u64> =
    LazyLock::new(|| std::hash::RandomState::new().hash_one("ditfastattn"));

/// Element type, shape and all bytes; `None` if they cannot be read.
pub(super) fn digest(feed: &Feed<'_>) -> Option<Digest> {
    let bytes = feed.bytes?;
    let mut parts = Chain::new();
    parts.add(&feed.element.to_le_bytes());
    for &dim in feed.dims {
        parts.add(&(dim as u64).to_le_bytes());
    }
    parts.add(bytes);
    Some(parts.0)
}

/// One digest of several, in their order; `None` if one of them is.
pub(super) fn digest_of(parts: impl IntoIterator<Item = Option<Digest>>) -> Option<Digest> {
    let mut chain = Chain::new();
    for part in parts {
        chain.add(&part?.to_le_bytes());
    }
    Some(chain.0)
}

/// Each part is hashed with what came before it.
struct Chain(Digest);

impl Chain {
    fn new() -> Self {
        Chain(xxh3_128_with_seed(&[], *SEED))
    }

    fn add(&mut self, bytes: &[u8]) {
        let seed = (self.0 as u64) ^ *SEED;
        self.0 = self.0.rotate_left(1) ^ xxh3_128_with_seed(bytes, seed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::feed::Values;
    use super::*;

    fn whole(bytes: &[u8]) -> Option<Digest> {
        digest(&Feed {
            dims: &[bytes.len()],
            element: 2,
            bytes: Some(bytes),
            values: Values::Other,
        })
    }

    #[test]
    fn every_byte_of_an_input_counts_whatever_its_size() {
        for len in [1, 3, 240, 241, 4096, 3 << 20, (33 << 20) + 5] {
            let mut bytes = vec![7u8; len];
            let before = whole(&bytes);
            let mut places: Vec<usize> = (0..len).step_by((len / 61).max(1)).collect();
            places.extend([0, len / 2, len - 1]);
            for at in places {
                bytes[at] ^= 1;
                assert_ne!(whole(&bytes), before, "byte {at} of {len}");
                bytes[at] ^= 1;
            }
            assert_eq!(whole(&bytes), before);
        }
    }

    #[test]
    fn shapes_and_types_of_nothing_count_too() {
        let of = |dims: &[usize], element| {
            digest(&Feed {
                dims,
                element,
                bytes: Some(&[]),
                values: Values::Other,
            })
        };
        assert_ne!(of(&[0, 4], 1), of(&[4, 0], 1));
        assert_ne!(of(&[0], 1), of(&[0], 2));
        assert_eq!(of(&[0], 1), of(&[0], 1));
    }

    /// `cargo test --release -p ditfastattn-ops -- --ignored --nocapture hashing`
    #[test]
    #[ignore = "a measurement"]
    fn what_hashing_takes() {
        for mib in [1usize, 8, 64, 512] {
            let bytes = vec![3u8; mib << 20];
            let start = std::time::Instant::now();
            let times = (1024 / mib).max(2);
            for _ in 0..times {
                std::hint::black_box(whole(std::hint::black_box(&bytes)));
            }
            let seconds = start.elapsed().as_secs_f64() / times as f64;
            println!(
                "{mib} MiB: {:.3} ms, {:.1} GB/s",
                seconds * 1e3,
                (mib << 20) as f64 / seconds / 1e9
            );
        }
    }
}
