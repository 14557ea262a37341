//! What `scripts/fuzz` begins with, what it found (`found/`, committed) and what it kept (`corpus/`, where it has run), without a fuzzer.

use ditfastattn_fuzz::model::Reached;
use std::path::{Path, PathBuf};

/// The files of a folder of the repository, which `found` and `corpus` need not be.
fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .join(folder);
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    files
}

/// Checks each file, and names the one that fails. Returns what the checks say.
fn replay<T>(folders: &[&str], kind: &str, check: impl Fn(&[u8]) -> T) -> Vec<T> {
    let all = folders.iter().flat_map(|folder| files(folder));
    all.filter(|path| kind.is_empty() || path.extension().is_some_and(|e| e == kind))
        .map(|path| {
            let bytes = std::fs::read(&path).unwrap();
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&bytes)));
            outcome.unwrap_or_else(|_| panic!("{} breaks a promise", path.display()))
        })
        .collect()
}

#[test]
fn plans_keep_their_promises() {
    let folders = [
        "plans/attacks",
        "plans/tests/pickles",
        "fuzz/found/plan",
        "fuzz/corpus/plan",
    ];
    let seen = replay(&folders, "", ditfastattn_fuzz::plan::check);
    assert!(
        seen.len() > 90,
        "{} files: the seeds are missing",
        seen.len()
    );
    let fixtures = replay(&["tests/fixtures"], "json", ditfastattn_fuzz::plan::check);
    assert!(
        fixtures.len() > 40,
        "{} plans: the fixtures are missing",
        fixtures.len()
    );
}

#[test]
fn models_keep_their_promises() {
    let fixtures = replay(&["tests/fixtures"], "onnx", ditfastattn_fuzz::model::check);
    let written = fixtures.iter().filter(|r| **r == Reached::Written).count();
    assert!(
        written > 100,
        "{written} of {} were rewritten",
        fixtures.len()
    );
    let seeds = replay(
        &["fuzz/seeds/model"],
        "onnx",
        ditfastattn_fuzz::model::check,
    );
    let written = seeds.iter().filter(|r| **r == Reached::Written).count();
    assert!(
        written >= 18,
        "{written} of {} seeds were rewritten",
        seeds.len()
    );
    replay(
        &["fuzz/found/model", "fuzz/corpus/model"],
        "",
        ditfastattn_fuzz::model::check,
    );
}
