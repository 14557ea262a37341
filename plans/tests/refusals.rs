//! Files that are no valid plans: what is said about each, and about which place.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use ditfastattn_plans::{MAX_PLAN_BYTES, Plan, PlanErrorKind};

fn attacks() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/attacks"))
}

/// The text that begins at a line and column, both from 1 and in characters.
fn text_at(text: &str, line: usize, column: usize) -> String {
    let line = text.split('\n').nth(line - 1).unwrap_or_default();
    line.chars().skip(column - 1).collect()
}

#[test]
fn every_hostile_file_is_refused_for_its_reason_at_its_place() {
    let expected = fs::read_to_string(attacks().join("expected.tsv")).unwrap();
    let mut listed = BTreeSet::new();
    for row in expected.lines().filter(|row| !row.starts_with('#')) {
        let [file, kind, place, token, message] = row
            .split('\t')
            .collect::<Vec<_>>()
            .try_into()
            .expect("five columns");
        listed.insert(file.to_owned());
        let bytes = fs::read(attacks().join(file)).unwrap();
        let error = Plan::parse_bytes(&bytes).expect_err(file);
        let found = [
            format!("{:?}", error.kind),
            format!("{}:{}", error.line, error.column),
            error.message.clone(),
        ];
        assert_eq!(found, [kind, place, message], "{file}");
        assert_eq!(
            error.to_string(),
            format!("line {}, column {}: {message}", error.line, error.column)
        );
        if token != "-" {
            let text = text_at(str::from_utf8(&bytes).unwrap(), error.line, error.column);
            assert!(
                text.starts_with(token),
                "{file}: {place} is {text:?}, not {token}"
            );
        }
    }
    let present: BTreeSet<String> = fs::read_dir(attacks())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "expected.tsv")
        .collect();
    assert_eq!(present, listed, "files and expected.tsv");
}

#[test]
fn messages_stay_short_and_printable() {
    for entry in fs::read_dir(attacks()).unwrap() {
        let path = entry.unwrap().path();
        if let Err(error) = Plan::parse_bytes(&fs::read(&path).unwrap()) {
            assert!(error.message.len() < 300, "{path:?}: {}", error.message);
            assert!(!error.message.chars().any(char::is_control), "{path:?}");
        }
    }
}

#[test]
fn the_size_limit_is_exact_and_comes_before_everything_else() {
    let plan = Plan::all_full(2, 2).to_json();
    let padded = plan.clone() + &" ".repeat(MAX_PLAN_BYTES - plan.len());
    assert!(Plan::parse(&padded).is_ok());
    for refused in [padded.clone() + " ", "[".repeat(MAX_PLAN_BYTES + 1)] {
        assert_eq!(
            Plan::parse(&refused).unwrap_err().kind,
            PlanErrorKind::TooLarge
        );
        assert_eq!(
            Plan::parse_bytes(refused.as_bytes()).unwrap_err().kind,
            PlanErrorKind::TooLarge
        );
        assert_eq!(
            Plan::import(&refused, 0.125, Default::default())
                .unwrap_err()
                .kind,
            PlanErrorKind::TooLarge
        );
    }
}

#[test]
fn nesting_as_deep_as_a_file_allows_does_not_exhaust_the_stack() {
    for open in ["[", "{\"a\":"] {
        let deep = open.repeat(MAX_PLAN_BYTES / open.len());
        assert_eq!(Plan::parse(&deep).unwrap_err().kind, PlanErrorKind::Syntax);
        assert!(Plan::import(&deep, 0.125, Default::default()).is_err());
    }
    let half = MAX_PLAN_BYTES / 2 - 100;
    let deep = format!(
        "{{\"format\": \"ditfastattn-plan\", \"version\": 1, \"steps\": {}{}}}",
        "[".repeat(half),
        "]".repeat(half)
    );
    assert_eq!(
        Plan::parse(&deep).unwrap_err().kind,
        PlanErrorKind::WrongType
    );
}

#[test]
fn a_million_wrong_cells_cost_one_message() {
    let cells = vec!["1"; MAX_PLAN_BYTES / 2 - 100].join(",");
    let json = format!("{{\"format\":\"ditfastattn-plan\",\"version\":1,\"steps\":[[{cells}]]}}");
    let error = Plan::parse(&json).unwrap_err();
    assert_eq!(
        (error.kind, error.line, error.column),
        (PlanErrorKind::WrongType, 1, 52)
    );
}

/// Breaks one rule of a valid plan.
type Spoil = fn(&mut Plan);

#[test]
fn plans_built_in_memory_are_held_to_the_rules_of_the_file() {
    let good = Plan::all_full(2, 2);
    assert_eq!(good.validate(), Ok(()));
    let bad: [(PlanErrorKind, Spoil); 7] = [
        (PlanErrorKind::OutOfRange, |plan| plan.window = 0.0),
        (PlanErrorKind::WrongType, |plan| plan.window = f64::NAN),
        (PlanErrorKind::WrongType, |plan| {
            plan.delta = Some(f64::INFINITY)
        }),
        (PlanErrorKind::RowLength, |plan| plan.steps[1].truncate(1)),
        (PlanErrorKind::Empty, |plan| plan.steps.clear()),
        (PlanErrorKind::TimestepsLength, |plan| {
            plan.timesteps = Some(vec![999.0])
        }),
        (PlanErrorKind::FirstRow, |plan| {
            plan.steps[0][1] = ditfastattn_plans::Action::Ast
        }),
    ];
    for (kind, spoil) in bad {
        let mut plan = good.clone();
        spoil(&mut plan);
        assert_eq!(plan.validate().unwrap_err().kind, kind);
    }
}
