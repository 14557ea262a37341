//! Any bytes as a plan file: refused at a place, or a plan that survives being written and read again.
#![no_main]

use ditfastattn_plans::Plan;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(plan) = Plan::parse_bytes(bytes) {
        assert_eq!(Plan::parse(&plan.to_json()).as_ref(), Ok(&plan));
        let _ = plan.liveness();
    }
});
