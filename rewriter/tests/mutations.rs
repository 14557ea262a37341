//! Fixtures with random damage, through everything that `dfa-rewrite` does to a model: no panic, and what is written can be read.
//!
//! The seed of every case is its number, so a failure names what to run again: `DFA_MUTATION_SEED=123 DFA_MUTATION_COUNT=1`. The fuzz target
//! `fuzz/fuzz_targets/model.rs` looks for the same, guided by coverage.

use bytes::Bytes;
use ditfastattn_plans::Plan;
use ditfastattn_rewriter::find::{Choice, InputsRequest, survey};
use ditfastattn_rewriter::lower::{RequestInputs, lower};
use ditfastattn_rewriter::onnx::ModelFile;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
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

struct Damage(ChaCha8Rng);

impl Damage {
    fn below(&mut self, n: usize) -> usize {
        (self.0.next_u64() % n.max(1) as u64) as usize
    }

    /// A length-delimited field anywhere in the message: where its payload begins and ends. Follows lengths downwards, so that what
    /// is damaged is deep inside and the rest still parses.
    fn field(&mut self, bytes: &[u8]) -> Option<(usize, usize)> {
        let (mut begin, mut end) = (0, bytes.len());
        for _ in 0..1 + self.below(7) {
            let inner = fields(&bytes[begin..end]);
            if inner.is_empty() {
                break;
            }
            let (from, to) = inner[self.below(inner.len())];
            (begin, end) = (begin + from, begin + to);
        }
        (begin < end).then_some((begin, end))
    }

    fn strike(&mut self, bytes: &mut Vec<u8>) {
        let Some((begin, end)) = self.field(bytes) else {
            return;
        };
        let at = begin + self.below(end - begin);
        match self.below(7) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = [0, 1, 2, 0x7f, 0x80, 0xff][self.below(6)],
            // The same length, so the messages around it still hold.
            2 => bytes[begin..end].fill([0, 0xff, 0x7f, b'x'][self.below(4)]),
            3 => bytes[begin..end].reverse(),
            4 => {
                if let Some((from, to)) = self.field(bytes) {
                    let n = (end - begin).min(to - from);
                    let copy = bytes[from..from + n].to_vec();
                    bytes[begin..begin + n].copy_from_slice(&copy);
                }
            }
            5 => {
                // Extreme integers, little-endian as in raw data.
                let value = [0, 1, -1, i64::MAX, i64::MIN, 1 << 31, 1 << 62][self.below(7)];
                for (to, from) in bytes[at..end].iter_mut().zip(value.to_le_bytes()) {
                    *to = from;
                }
            }
            _ => bytes.truncate(at),
        }
    }
}

/// The payloads of the length-delimited fields of a message, as far as it is one.
fn fields(message: &[u8]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut at = 0;
    let varint = |at: &mut usize| -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *message.get(*at)?;
            *at += 1;
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Some(value);
            }
        }
        None
    };
    while at < message.len() {
        let Some(key) = varint(&mut at) else { break };
        match key & 7 {
            0 => {
                if varint(&mut at).is_none() {
                    break;
                }
            }
            1 => at += 8,
            5 => at += 4,
            2 => {
                let Some(length) = varint(&mut at) else { break };
                let end = at.saturating_add(length as usize);
                if end > message.len() {
                    break;
                }
                found.push((at, end));
                at = end;
            }
            _ => break,
        }
    }
    found
}

/// How far it came: 0 refused, 1 no layer, 2 not lowered, 3 written.
fn through(path: &Path, bytes: Vec<u8>) -> usize {
    let Ok(model) = ModelFile::parse(path, Bytes::from(bytes)) else {
        return 0;
    };
    let Ok(survey) = survey(&model.graph, &InputsRequest::default(), &Choice::default()) else {
        return 1;
    };
    let layers = survey.layers().count();
    if layers == 0 {
        return 1;
    }
    let plan = Plan::all_full(layers, 2);
    let Ok(lowered) = lower(&model, &survey, &plan, RequestInputs::Optional) else {
        return 2;
    };
    let whole: Vec<u8> = lowered.pieces.iter().flat_map(|p| p.to_vec()).collect();
    ModelFile::parse(path, whole.into()).expect("what was written can be read");
    3
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
        let mut damage = Damage(ChaCha8Rng::seed_from_u64(case));
        let (path, bytes) = &models[damage.below(models.len())];
        let mut bytes = bytes.clone();
        for _ in 0..1 + damage.below(4) {
            damage.strike(&mut bytes);
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| through(path, bytes)));
        let stage = outcome.unwrap_or_else(|_| panic!("seed {case} ({})", path.display()));
        reached[stage] += 1;
    }
    println!("refused, without a layer, not lowered, written: {reached:?}");
    assert!(
        count < 1000 || (reached[0] > 0 && reached[3] > 0),
        "the damage is too great or too small to test anything: {reached:?}"
    );
}
