//! Journals: resumed at every cut they lead to the same bytes; others' are refused.

use std::fs::{self, File, OpenOptions};
use std::ops::ControlFlow;
use std::path::Path;

use ditfastattn_plans::{
    Action, Cfg, Fingerprint, Journal, JournalError, LossTable, Metric, SearchError, Settings,
    Side, TextTokens, search,
};
use proptest::prelude::*;

use super::toy::{Resuming, Sizes, Toy};
use super::{Change, cases, go_on, run, settings};

const SIZES: Sizes = Sizes {
    layers: 3,
    steps: 4,
    samples: 2,
    seed: 98,
};

fn example() -> Settings {
    Settings {
        model: Some(Fingerprint {
            layers: Some(3),
            ..Fingerprint::default()
        }),
        timesteps: Some(vec![999.0, 666.1, 1.0 / 3.0, 0.1 + 0.2]),
        text: Some(TextTokens {
            tokens: 7,
            side: Side::End,
        }),
        ..settings(&SIZES, Cfg::UncondFirst, 0.1, Metric::Mrae)
    }
}

fn open(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn a_search_resumed_at_every_byte_ends_in_the_same_bytes() {
    let settings = example();
    let (found, _) = run(SIZES, &settings);
    let whole = found.table.to_jsonl();
    let methods: std::collections::BTreeSet<_> = found.plan.steps.iter().flatten().collect();
    assert!(methods.len() >= 4, "a case worth testing: {methods:?}");

    let directory = directory();
    let path = directory.path().join("journal.jsonl");
    for cut in 0..=whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let (mut journal, table) = Journal::open(open(&path), &settings).unwrap();
        let finished = whole[..cut].matches('\n').count();
        assert_eq!(table.cells().len(), finished.saturating_sub(1));
        let mut resuming = Resuming::new(Toy::new(SIZES, settings.cfg));
        let again = search(&mut resuming, table, &mut journal, &mut go_on).unwrap();
        drop(journal);
        assert_eq!(again.table, found.table);
        assert_eq!(again.plan.to_json_pretty(), found.plan.to_json_pretty());
        assert_eq!(fs::read_to_string(&path).unwrap(), whole, "cut at {cut}");
        if let Some(repeated) = again.repeated {
            assert_eq!(repeated.recorded.loss, repeated.now);
        }
        if cut == whole.len() {
            assert_eq!(again.effort.naive_forwards(), 0.0, "nothing is left to do");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn stopped_after_any_cell_and_resumed_it_is_the_same((sizes, settings) in cases(), at in any::<prop::sample::Index>()) {
        let (found, _) = run(sizes, &settings);
        let cells = found.table.cells().len();
        if cells > 0 {
            let at = at.index(cells) + 1;
            let mut bytes = Vec::new();
            let mut journal = Journal::new(&mut bytes, &settings).unwrap();
            let table = LossTable::new(settings.clone()).unwrap();
            let mut toy = Toy::new(sizes, settings.cfg);
            let stopped = search(&mut toy, table, &mut journal, &mut |progress| {
                if progress.decided == at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            let table = LossTable::parse(&bytes).unwrap();
            prop_assert_eq!(table.cells(), &found.table.cells()[..at]);
            match stopped {
                Err(SearchError::Stopped(stopped)) => prop_assert_eq!(&*stopped, &table),
                other => prop_assert!(at == cells && other.is_ok()),
            }
            let mut resuming = Resuming::new(Toy::new(sizes, settings.cfg));
            let again = search(&mut resuming, table, &mut (), &mut go_on).unwrap();
            prop_assert_eq!(again.table.to_jsonl(), found.table.to_jsonl());
            prop_assert_eq!(again.plan.to_json(), found.plan.to_json());
            prop_assert_eq!(LossTable::parse(found.table.to_jsonl().as_bytes()).unwrap(), found.table);
        }
    }

    #[test]
    fn hostile_journals_are_refused_without_panic(at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()) {
        let (found, _) = run(SIZES, &example());
        let mut bytes = found.table.to_jsonl().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = LossTable::parse(&bytes);
        let _ = LossTable::parse(&bytes[..cut.index(bytes.len())]);
    }
}

#[test]
fn the_format() {
    let settings = Settings {
        steps: 2,
        timesteps: None,
        candidates: vec![vec![Action::Ast, Action::WaRs]],
        ..example()
    };
    let text = r#"{"format":"ditfastattn-search","version":1,"model_hash":"toy-98","inputs_hash":"latents","model":{"layers":3},"steps":2,"layers":1,"delta":0.1,"metric":"mrae","window":0.125,"cfg":"uncond-first","timesteps":null,"text":{"side":"end","tokens":7},"candidates":[["ast","wa-rs"]]}
{"step":1,"layer":0,"action":"wa-rs","losses":[["ast",null],["wa-rs",0.025]]}
"#;
    let table = LossTable::parse(text.as_bytes()).unwrap();
    assert_eq!(table.settings(), &settings);
    assert_eq!(table.cells()[0].tried[0].loss, None);
    assert_eq!(table.cells()[0].tried[1].loss, Some(0.025));
    assert!(table.is_complete());
    assert_eq!(table.to_jsonl(), text);
}

#[test]
fn a_journal_of_another_search_is_refused_by_the_field_that_differs() {
    let settings = example();
    let directory = directory();
    let path = directory.path().join("journal.jsonl");
    drop(Journal::open(open(&path), &settings).unwrap());
    let written = fs::read(&path).unwrap();
    let others: [(&str, Change); 11] = [
        ("model_hash", |s| s.model_hash.push('x')),
        ("inputs_hash", |s| s.inputs_hash.push('x')),
        ("model", |s| s.model = None),
        ("steps", |s| {
            s.steps = 5;
            s.timesteps = None;
        }),
        ("layers", |s| {
            s.candidates.pop();
        }),
        ("delta", |s| s.delta = f64::from_bits(s.delta.to_bits() + 1)),
        ("metric", |s| s.metric = Metric::Authors),
        ("window", |s| s.window = 0.25),
        ("cfg", |s| s.cfg = Cfg::CondFirst),
        ("timesteps", |s| s.timesteps.as_mut().unwrap()[3] = 0.3),
        ("candidates", |s| s.candidates[1].reverse()),
    ];
    for (expected, change) in others {
        let mut other = settings.clone();
        change(&mut other);
        match Journal::open(open(&path), &other) {
            Err(JournalError::OtherSearch { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
        assert_eq!(fs::read(&path).unwrap(), written, "left as it was");
    }
}

#[test]
fn files_that_are_no_journals_are_left_alone() {
    let settings = example();
    let directory = directory();
    let path = directory.path().join("precious.json");
    for content in [
        "precious",
        "{}\n",
        "{\"format\": \"ditfastattn-plan\"}\n",
        "\u{0}\n",
        "\n",
    ] {
        fs::write(&path, content).unwrap();
        let error = Journal::open(open(&path), &settings).unwrap_err();
        assert!(
            matches!(error, JournalError::Broken { line: 1, .. }),
            "{error}"
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), content);
    }
}

#[test]
fn lines_that_no_search_wrote_are_refused_by_number() {
    let (found, _) = run(SIZES, &example());
    let lines: Vec<String> = found.table.to_jsonl().lines().map(str::to_owned).collect();
    let refused = |lines: &[String]| match LossTable::parse((lines.join("\n") + "\n").as_bytes()) {
        Err(JournalError::Broken { line, message, .. }) => (line, message),
        other => panic!("{other:?}"),
    };
    let mut missing = lines.clone();
    missing.remove(2);
    let (line, message) = refused(&missing);
    assert_eq!(line, 3);
    assert!(
        message.contains("expected step 1, layer 1, found step 1, layer 2"),
        "{message}"
    );

    let mut longer = lines.clone();
    longer.push(lines[1].clone());
    assert_eq!(refused(&longer).0, lines.len() + 1);

    let mut changed = lines.clone();
    changed[1] = r#"{"step":1,"layer":0,"action":"ast","losses":[["ast",0.5]]}"#.to_owned();
    let (line, message) = refused(&changed);
    assert_eq!(line, 2);
    assert!(
        message.contains("full after 4 candidates, found ast after 1"),
        "{message}"
    );

    changed[1] = r#"{"step":1,"layer":0,"action":"asc","losses":[["asc",0.0]]}"#.to_owned();
    assert!(refused(&changed).1.contains("not those of the header"));

    changed[1] = "half a line".to_owned();
    assert_eq!(refused(&changed).0, 2);
}

#[test]
fn a_journal_has_one_writer() {
    let settings = example();
    let directory = directory();
    let path = directory.path().join("journal.jsonl");
    let (journal, _) = Journal::open(open(&path), &settings).unwrap();
    let error = Journal::open(open(&path), &settings).unwrap_err();
    assert!(matches!(error, JournalError::InUse));
    drop(journal);
    assert!(Journal::open(open(&path), &settings).is_ok());
}

#[test]
fn a_search_that_starts_behind_its_journal_is_refused() {
    let settings = example();
    let (found, mut toy) = run(SIZES, &settings);
    let directory = directory();
    let path = directory.path().join("journal.jsonl");
    fs::write(&path, found.table.to_jsonl()).unwrap();
    let (mut journal, _) = Journal::open(open(&path), &settings).unwrap();
    let table = LossTable::new(settings).unwrap();
    let error = search(&mut toy, table, &mut journal, &mut go_on).unwrap_err();
    assert!(matches!(
        error,
        SearchError::Journal(JournalError::Ahead {
            journal: 9,
            table: 0
        })
    ));
}
