//! Fixtures with random damage, through everything that `dfa-rewrite` does to a model: no panic, and what is written is whole.
//!
//! The seed of every case is its number, so a failure names what to run again: `DFA_MUTATION_SEED=123 DFA_MUTATION_COUNT=1`. `scripts/fuzz model`
//! looks for the same, guided by coverage.

use ditfastattn_fuzz::damage::Damage;
use ditfastattn_fuzz::model::check;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// The smaller exports: damage is more likely to hit what matters in them.
fn models() -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let mut all: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "onnx"))
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .filter(|(_, bytes)| bytes.len() < 120_000)
        .collect();
    all.sort();
    assert!(all.len() > 20, "the fixtures are missing");
    all
}

#[test]
fn damaged_models_are_refused_or_rewritten_and_never_a_panic() {
    let models = models();
    let (seed, count) = (
        setting("DFA_MUTATION_SEED", 0),
        setting("DFA_MUTATION_COUNT", 3000),
    );
    let mut reached = [0usize; 4];
    for case in seed..seed + count {
        let mut damage = Damage::new(case);
        let (path, bytes) = &models[damage.below(models.len())];
        let mut bytes = bytes.clone();
        for _ in 0..1 + damage.below(4) {
            damage.strike(&mut bytes);
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| check(&bytes)));
        let stage = outcome.unwrap_or_else(|_| panic!("seed {case} ({})", path.display()));
        reached[stage as usize] += 1;
    }
    println!("refused, without a layer, not lowered, written: {reached:?}");
    assert!(
        count < 1000 || (reached[0] > 0 && reached[3] > 0),
        "the damage is too great or too small to test anything: {reached:?}"
    );
}
