//! Any bytes as a model. Most mutations know that it is a protobuf message, or coverage would stop at the first length that is wrong.
#![no_main]

use ditfastattn_fuzz::damage::Damage;
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|bytes: &[u8]| {
    ditfastattn_fuzz::model::check(bytes);
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut damage = Damage::new(seed.into());
    if damage.below(4) == 0 {
        return fuzzer_mutate(data, size, max_size);
    }
    let mut bytes = data[..size].to_vec();
    damage.strike(&mut bytes);
    bytes.truncate(max_size);
    data[..bytes.len()].copy_from_slice(&bytes);
    bytes.len()
});
