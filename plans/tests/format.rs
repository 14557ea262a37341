//! What is a plan: reading, writing and the schema agree.

mod common;

use ditfastattn_plans::{Action, Cfg, Fingerprint, Plan, Side, TextTokens};
use proptest::prelude::*;
use serde_json::{Value, json};

fn schema() -> jsonschema::Validator {
    jsonschema::draft202012::new(&ditfastattn_plans::json_schema()).unwrap()
}

fn example() -> Value {
    json!({
        "format": "ditfastattn-plan",
        "version": 1,
        "name": "D3",
        "delta": 0.075,
        "window": 0.25,
        "cfg": "cond-first",
        "timesteps": [999, 979.5],
        "text": {"tokens": 333, "side": "end"},
        "model": {"layers": 2, "heads": 16, "head_dim": 72, "tokens": 4096},
        "steps": [["full", "asc"], ["wa-rs+asc", "ast"]],
    })
}

#[test]
fn every_member_of_a_plan_is_read() {
    let plan = Plan::parse(&example().to_string()).unwrap();
    assert_eq!(
        plan,
        Plan {
            name: Some("D3".to_owned()),
            delta: Some(0.075),
            window: 0.25,
            cfg: Cfg::CondFirst,
            timesteps: Some(vec![999.0, 979.5]),
            text: Some(TextTokens {
                tokens: 333,
                side: Side::End
            }),
            model: Some(Fingerprint {
                layers: Some(2),
                heads: Some(16),
                head_dim: Some(72),
                tokens: Some(4096),
            }),
            steps: vec![
                vec![Action::Full, Action::Asc],
                vec![Action::WaRsAsc, Action::Ast],
            ],
        }
    );
    assert_eq!((plan.layers(), plan.step_count()), (2, 2));
    assert_eq!(plan.action(1, 0), Action::WaRsAsc);
    assert_eq!(plan.action(2, 0), Action::Full);
    assert_eq!(plan.action(0, 2), Action::Full);
}

#[test]
fn what_is_left_out_has_its_default() {
    let json = r#"{"steps":[["full"]],"version":1,"format":"ditfastattn-plan"}"#;
    assert_eq!(Plan::parse(json).unwrap(), Plan::all_full(1, 1));
}

#[test]
fn written_plans_look_like_this() {
    let plan = Plan::parse(&example().to_string()).unwrap();
    assert_eq!(
        plan.to_json(),
        concat!(
            r#"{"format":"ditfastattn-plan","version":1,"name":"D3","delta":0.075,"window":0.25,"#,
            r#""cfg":"cond-first","timesteps":[999.0,979.5],"text":{"tokens":333,"side":"end"},"#,
            r#""model":{"layers":2,"heads":16,"head_dim":72,"tokens":4096},"#,
            r#""steps":[["full","asc"],["wa-rs+asc","ast"]]}"#
        )
    );
    assert_eq!(
        plan.to_json_pretty(),
        r#"{
  "format": "ditfastattn-plan",
  "version": 1,
  "name": "D3",
  "delta": 0.075,
  "window": 0.25,
  "cfg": "cond-first",
  "timesteps": [999.0, 979.5],
  "text": {"tokens": 333, "side": "end"},
  "model": {"layers": 2, "heads": 16, "head_dim": 72, "tokens": 4096},
  "steps": [
    ["full", "asc"],
    ["wa-rs+asc", "ast"]
  ]
}
"#
    );
}

/// The first fenced block of JSON in the documentation, and the short plan below it.
#[test]
fn the_documented_plans_are_plans() {
    let text = include_str!("../../docs/plan-format.md");
    let fenced = text
        .split("```json\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let plan = Plan::parse(fenced).unwrap();
    assert_eq!((plan.layers(), plan.step_count()), (3, 4));
    let short = text
        .split('`')
        .find(|span| span.starts_with("{\"format\""))
        .unwrap();
    assert!(Plan::parse(short).is_ok(), "{short}");
    for json in [fenced, short] {
        assert!(schema().is_valid(&serde_json::from_str(json).unwrap()));
    }
}

#[test]
fn a_fingerprint_compares_what_both_sides_know() {
    let plan = Fingerprint {
        layers: Some(28),
        heads: Some(16),
        ..Default::default()
    };
    let model = Fingerprint {
        layers: Some(28),
        head_dim: Some(72),
        ..Default::default()
    };
    assert_eq!(plan.mismatch(&model), None);
    let other = Fingerprint {
        heads: Some(24),
        ..model
    };
    assert_eq!(plan.mismatch(&other), Some(("heads", 16, 24)));
}

#[test]
fn the_committed_schema_is_the_one_in_the_code() {
    let committed = include_str!("../plan.schema.json");
    let code = format!("{:#}\n", ditfastattn_plans::json_schema());
    assert!(
        committed == code,
        "plan.schema.json is stale; cargo run -p ditfastattn-plans --example print_schema > plans/plan.schema.json"
    );
}

/// The place of a mistake in a document, and what to put there; `None` takes the member away.
type Mistake = (&'static str, &'static str, Option<Value>);

#[test]
fn structural_mistakes_are_refused_by_the_schema_and_by_the_parser() {
    let schema = schema();
    let mistakes: Vec<Mistake> = vec![
        ("", "format", None),
        ("", "format", Some(json!("plan"))),
        ("", "version", None),
        ("", "version", Some(json!(2))),
        ("", "version", Some(json!("1"))),
        ("", "name", Some(json!(3))),
        ("", "name", Some(json!(null))),
        ("", "delta", Some(json!(-1))),
        ("", "delta", Some(json!("0.1"))),
        ("", "window", Some(json!(0))),
        ("", "window", Some(json!(1.5))),
        ("", "window", Some(json!(null))),
        ("", "cfg", Some(json!("both"))),
        ("", "cfg", Some(json!("none"))),
        ("", "cfg", None),
        ("", "timesteps", Some(json!(999))),
        ("", "timesteps", Some(json!([]))),
        ("", "timesteps", Some(json!(["999", "979"]))),
        ("", "text", Some(json!(333))),
        ("/text", "tokens", None),
        ("/text", "tokens", Some(json!(-1))),
        ("/text", "tokens", Some(json!(1.5))),
        ("/text", "tokens", Some(json!(1u64 << 32))),
        ("/text", "side", None),
        ("/text", "side", Some(json!("middle"))),
        ("/text", "extra", Some(json!(1))),
        ("/model", "layers", Some(json!(0))),
        ("/model", "heads", Some(json!(null))),
        ("/model", "head_dim", Some(json!("72"))),
        ("/model", "depth", Some(json!(28))),
        ("", "steps", None),
        ("", "steps", Some(json!([]))),
        ("", "steps", Some(json!([[]]))),
        ("", "steps", Some(json!({"block0": {}}))),
        ("", "steps", Some(json!(["full", "full"]))),
        ("", "steps", Some(json!([["full", "asc"], ["full", "asx"]]))),
        ("", "steps", Some(json!([["full", "asc"], ["full", 1]]))),
        (
            "",
            "steps",
            Some(json!([["full", "ast"], ["full", "full"]])),
        ),
        (
            "",
            "steps",
            Some(json!([["full", "wa-rs"], ["full", "full"]])),
        ),
        ("", "widnow", Some(json!(0.125))),
    ];
    for (object, key, value) in mistakes {
        let mut document = example();
        assert!(schema.is_valid(&document));
        let members = document
            .pointer_mut(object)
            .unwrap()
            .as_object_mut()
            .unwrap();
        let what = format!("{object}/{key}: {value:?}");
        match value {
            Some(value) => drop(members.insert(key.to_owned(), value)),
            None => assert!(members.remove(key).is_some(), "{what}"),
        }
        assert!(!schema.is_valid(&document), "schema accepts {what}");
        assert!(
            Plan::parse(&document.to_string()).is_err(),
            "parser accepts {what}"
        );
    }
}

/// Replaces, removes or repeats parts of JSON text, so that much of it still looks like a plan.
fn mutated() -> impl Strategy<Value = String> {
    let pieces = [
        "\"full\"",
        "\"ast\"",
        "\"asc\"",
        "\"wa-rs+asc\"",
        "\"none\"",
        "\"window\"",
        "\"tokens\"",
        "\"cfg\"",
        "null",
        "0",
        "1",
        "-1",
        "1.0",
        "1e999",
        "0.125",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        "\"",
        "\\",
        "\u{feff}",
        "é",
    ];
    let edit = (
        any::<prop::sample::Index>(),
        0usize..12,
        prop::sample::select(pieces.to_vec()),
    );
    (common::plans(), prop::collection::vec(edit, 1..4)).prop_map(|(plan, edits)| {
        let mut text: Vec<char> = plan.to_json_pretty().chars().collect();
        for (at, length, piece) in edits {
            let at = at.index(text.len() + 1);
            let end = (at + length).min(text.len());
            text.splice(at..end, piece.chars());
        }
        text.into_iter().collect()
    })
}

proptest! {
    #[test]
    fn plans_survive_being_written_and_read(plan in common::plans()) {
        for json in [plan.to_json(), plan.to_json_pretty()] {
            let read = Plan::parse(&json).unwrap();
            prop_assert_eq!(&read, &plan);
            prop_assert_eq!(read.to_json(), plan.to_json());
            prop_assert!(schema().is_valid(&serde_json::from_str(&json).unwrap()), "{json}");
        }
        prop_assert_eq!(plan.validate(), Ok(()));
    }

    #[test]
    fn bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        ditfastattn_fuzz::plan::check(&bytes);
    }

    #[test]
    fn near_plans_never_panic(text in mutated()) {
        ditfastattn_fuzz::plan::check(text.as_bytes());
    }

    #[test]
    fn foreign_plans_never_panic(
        text in r#"[\[{]("(block|step|attn)[0-9+]{1,3}": ?[{\["]?(OUTPUT_SHARE|full_attn)?"?[}\],]{0,2}){0,6}[}\]]?"#,
    ) {
        ditfastattn_fuzz::plan::check(text.as_bytes());
    }
}
