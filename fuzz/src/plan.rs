//! Any bytes as a plan: refused at a place in the file, or a plan that keeps all promises.

use ditfastattn_plans::{Cfg, HeatMap, Plan, PlanError};
use std::sync::LazyLock;

static SCHEMA: LazyLock<jsonschema::Validator> = LazyLock::new(|| {
    jsonschema::draft202012::new(&ditfastattn_plans::json_schema()).expect("a JSON Schema")
});

/// Reads `bytes` as our plan and as one of other implementations.
///
/// # Panics
/// Where a promise does not hold.
pub fn check(bytes: &[u8]) {
    match Plan::parse_bytes(bytes) {
        Ok(plan) => {
            let value = serde_json::from_slice(bytes).expect("what the parser accepts is JSON");
            let valid = SCHEMA.is_valid(&value);
            assert!(valid, "the schema refuses what the parser accepts");
            accepted(&plan);
        }
        Err(error) => {
            let lines: Vec<&[u8]> = bytes.split(|b| *b == b'\n').collect();
            assert!((1..=lines.len()).contains(&error.line), "{error}");
            let columns = lines[error.line - 1].len() + 1;
            assert!((1..=columns).contains(&error.column), "{error}");
            printable(&error);
        }
    }
    match Plan::import(bytes, 0.125, Cfg::CondFirst) {
        Ok(plan) => accepted(&plan),
        Err(error) => printable(&error),
    }
}

fn accepted(plan: &Plan) {
    assert_eq!(plan.validate(), Ok(()));
    for json in [plan.to_json(), plan.to_json_pretty()] {
        assert_eq!(Plan::parse(&json).as_ref(), Ok(plan), "{json}");
    }
    let _ = plan.liveness();
    assert!(HeatMap::new(plan).to_svg().ends_with("</svg>\n"));
}

/// An error is shown in a terminal: nothing in it may be an instruction to that.
fn printable(error: &PlanError) {
    assert!(!error.message.chars().any(char::is_control), "{error:?}");
}
