//! Plans of xDiT and of the authors, and what is said about those that are broken.

use ditfastattn_plans::{Action::*, Cfg, Plan, PlanErrorKind};

#[test]
fn a_plan_of_xdit() {
    let json = r#"{
  "block0": {"step0": "FULL_ATTN", "step1": "RESIDUAL_WINDOW_ATTN", "step2": "OUTPUT_SHARE"},
  "block1": {"step0": "FULL_ATTN_CFG_SHARE", "step1": "RESIDUAL_WINDOW_ATTN_CFG_SHARE", "step2": "FULL_ATTN"}
}"#;
    let plan = Plan::import(json, 0.25, Cfg::UncondFirst).unwrap();
    assert_eq!(plan.steps, [[Full, Asc], [WaRs, WaRsAsc], [Ast, Full]]);
    assert_eq!((plan.window, plan.cfg), (0.25, Cfg::UncondFirst));
    assert_eq!(plan.validate(), Ok(()));
}

#[test]
fn a_plan_of_the_authors() {
    let json = r#"[
 {"attn1": ["full_attn", "residual_window_attn+cfg_attn_share"], "attn2": null, "ff": null},
 {"attn1": ["full_attn+cfg_attn_share", "output_share"], "attn2": null, "ff": null},
 {"attn1": ["full_attn", "residual_window_attn"]}]"#;
    let plan = Plan::import(json, 0.125, Cfg::CondFirst).unwrap();
    assert_eq!(plan.steps, [[Full, Asc, Full], [WaRsAsc, Ast, WaRs]]);
}

#[test]
fn blocks_and_steps_are_ordered_by_number() {
    let steps: Vec<String> = (0..12)
        .rev()
        .map(|i| {
            format!(
                r#""step{i}": "{}""#,
                if i == 11 { "OUTPUT_SHARE" } else { "FULL_ATTN" }
            )
        })
        .collect();
    let json = format!("{{\"block0\": {{{}}}}}", steps.join(", "));
    let plan = Plan::import(&json, 0.125, Cfg::None).unwrap();
    let shared: Vec<usize> = (0..12)
        .filter(|step| plan.action(*step, 0) == Ast)
        .collect();
    assert_eq!(shared, [11]);
}

#[test]
fn broken_imports_are_refused_at_their_place() {
    let cases = [
        (
            r#"{"block0": {"step0": "FULL"}}"#,
            PlanErrorKind::UnknownAction,
            22,
        ),
        (
            r#"{"block0": {"step0": "OUTPUT_SHARE"}}"#,
            PlanErrorKind::FirstRow,
            22,
        ),
        (
            r#"{"block0": {"step0": "FULL_ATTN_CFG_SHARE"}}"#,
            PlanErrorKind::HalvesWithoutCfg,
            22,
        ),
        (
            r#"{"block1": {"step0": "FULL_ATTN"}}"#,
            PlanErrorKind::Import,
            2,
        ),
        (
            r#"{"block0": {"step0": "FULL_ATTN", "step2": "FULL_ATTN"}}"#,
            PlanErrorKind::Import,
            35,
        ),
        (
            r#"{"block0": {"step00": "FULL_ATTN"}}"#,
            PlanErrorKind::UnknownKey,
            13,
        ),
        (
            r#"{"block0": {"step99999999999999999999": "FULL_ATTN"}}"#,
            PlanErrorKind::UnknownKey,
            13,
        ),
        (
            r#"{"layer0": {"step0": "FULL_ATTN"}}"#,
            PlanErrorKind::UnknownKey,
            2,
        ),
        (r#"{"block0": ["FULL_ATTN"]}"#, PlanErrorKind::WrongType, 12),
        (
            r#"{"block0": {"step0": "FULL_ATTN"}, "block1": {}}"#,
            PlanErrorKind::Import,
            46,
        ),
        (r#"{}"#, PlanErrorKind::Empty, 1),
        (r#"[]"#, PlanErrorKind::Empty, 1),
        (r#"{"block0": {}}"#, PlanErrorKind::Empty, 1),
        (r#"[{"attn2": null}]"#, PlanErrorKind::MissingKey, 2),
        (r#"[{"attn1": null}]"#, PlanErrorKind::WrongType, 12),
        (
            r#"[{"attn1": ["full_attn", "residual_window_attn+without_residual"]}]"#,
            PlanErrorKind::UnknownAction,
            26,
        ),
        (r#""full""#, PlanErrorKind::WrongType, 1),
    ];
    for (json, kind, column) in cases {
        let error = Plan::import(json, 0.125, Cfg::None).unwrap_err();
        assert_eq!(
            (error.kind, error.line, error.column),
            (kind, 1, column),
            "{json}: {error}"
        );
    }
    for window in [0.0, -1.0, 1.5, f64::NAN] {
        let json = r#"{"block0": {"step0": "FULL_ATTN"}}"#;
        let error = Plan::import(json, window, Cfg::None).unwrap_err();
        assert_eq!(error.kind, PlanErrorKind::OutOfRange);
    }
}
