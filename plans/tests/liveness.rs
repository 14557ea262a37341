//! The lifetimes that a plan implies, against a simulation of what the actions read and write.
//!
//! The simulation knows only the table of semantics: which action writes what, which reads what.
//! It never looks ahead; `Liveness` never looks at a tensor. They have to agree.

mod common;

use ditfastattn_plans::{Action, CacheShape, Cfg, Liveness, Plan};
use proptest::prelude::*;

/// One tensor that a layer left behind: which it was, and when it was written and last read.
/// Times count the runs of layers: a step has one run, or two under `cfg: separate`.
#[derive(Clone, Debug)]
struct Tensor {
    residual: bool,
    layer: usize,
    written: usize,
    /// The steps whose runs read it, with the times of those runs.
    reads: Vec<(usize, usize)>,
    step: usize,
}

/// Executes the table of semantics and records every tensor with its readers.
fn simulate(plan: &Plan) -> Vec<Tensor> {
    let runs = if plan.cfg == Cfg::Separate { 2 } else { 1 };
    let layers = plan.layers();
    let mut tensors: Vec<Tensor> = Vec::new();
    // The latest residual and output of every layer, for each run of a step.
    let mut residual = vec![vec![None; layers]; runs];
    let mut output = vec![vec![None; layers]; runs];
    for step in 0..plan.step_count() {
        for run in 0..runs {
            for layer in 0..layers {
                let now = (step * runs + run) * layers + layer;
                let mut write = |residual| {
                    tensors.push(Tensor {
                        residual,
                        layer,
                        written: now,
                        reads: vec![],
                        step,
                    });
                    Some(tensors.len() - 1)
                };
                let action = plan.action(step, layer);
                let mut reads = Vec::new();
                match action {
                    Action::Full | Action::Asc => residual[run][layer] = write(true),
                    // The second of two runs takes the first one's output and reads no residual.
                    Action::WaRsAsc if run == 1 => {}
                    Action::WaRs | Action::WaRsAsc => {
                        reads.push(
                            residual[run][layer].expect("a window step has a residual to read"),
                        );
                    }
                    Action::Ast => {
                        reads.push(output[run][layer].expect("ast has an output to read"))
                    }
                }
                if action.uses_halves() && run == 1 {
                    reads.push(
                        output[0][layer].expect("the second run finds the first one's output"),
                    );
                }
                if action != Action::Ast {
                    output[run][layer] = write(false);
                }
                for id in reads {
                    tensors[id].reads.push((step, now));
                }
            }
        }
    }
    tensors
}

/// A tensor has to be there after `step` if it was written by then and is read by a later step.
fn needed_after(tensors: &[Tensor], residual: bool, step: usize, layer: usize) -> bool {
    tensors.iter().any(|t| {
        t.residual == residual
            && t.layer == layer
            && t.step <= step
            && t.reads.iter().any(|(reader, _)| *reader > step)
    })
}

fn check(plan: &Plan) -> Result<(), TestCaseError> {
    let tensors = simulate(plan);
    let liveness = plan.liveness();
    for step in 0..plan.step_count() {
        for layer in 0..plan.layers() {
            let at = format!("step {step}, layer {layer} of {:?}", plan.steps);
            prop_assert_eq!(
                liveness.residual_live_after(step, layer),
                needed_after(&tensors, true, step, layer),
                "residual after {}",
                &at
            );
            prop_assert_eq!(
                liveness.output_live_after(step, layer),
                needed_after(&tensors, false, step, layer),
                "output after {}",
                &at
            );
            let shared = tensors.iter().any(|t| {
                !t.residual
                    && t.layer == layer
                    && t.step == step
                    && t.reads.iter().any(|(s, _)| *s == step)
            });
            prop_assert_eq!(
                liveness.output_shared_within(step, layer),
                shared,
                "shared within {}",
                &at
            );
        }
    }
    Ok(())
}

/// Bytes by brute force: at every time, every tensor that is written by then and still to be read.
fn peak(plan: &Plan, bytes: u64) -> u64 {
    let tensors = simulate(plan);
    let runs = if plan.cfg == Cfg::Separate { 2 } else { 1 };
    let live = |now: usize| {
        let alive = |t: &&Tensor| t.written <= now && t.reads.iter().any(|(_, time)| *time >= now);
        tensors.iter().filter(alive).count() as u64
    };
    let times = plan.step_count() * runs * plan.layers();
    (0..times).map(live).max().unwrap_or(0) * (bytes / runs as u64)
}

const SHAPE: CacheShape = CacheShape {
    rows: 2,
    tokens: 1024,
    width: 1152,
    element_bytes: 2,
};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn lifetimes_are_what_the_semantics_read_and_not_more(plan in common::plans()) {
        check(&plan)?;
    }

    #[test]
    fn the_peak_is_the_largest_sum_of_living_tensors(plan in common::plans()) {
        // `wa-rs+asc` of a second run leaves that run's residual unread, so a residual that only
        // such steps read is counted although half of it could go: never less than the truth.
        let peaks = plan.liveness().peak_bytes(&SHAPE).bytes;
        let truth = peak(&plan, SHAPE.tensor_bytes());
        if plan.cfg == Cfg::Separate && plan.steps.iter().flatten().any(|a| *a == Action::WaRsAsc) {
            prop_assert!(peaks >= truth && peaks <= 2 * truth, "{peaks} against {truth}");
        } else {
            prop_assert_eq!(peaks, truth);
        }
    }
}

/// All plans of one layer with up to five steps: small, and none is left out.
#[test]
fn every_short_plan_of_one_layer_agrees_with_the_simulation() {
    for cfg in Cfg::ALL {
        let mut columns: Vec<Vec<Action>> = vec![vec![]];
        for step in 0..5 {
            columns = columns
                .into_iter()
                .flat_map(|column| {
                    Action::ALL
                        .into_iter()
                        .filter(move |a| {
                            (step > 0 || a.is_full()) && (cfg != Cfg::None || !a.uses_halves())
                        })
                        .map(move |a| column.iter().copied().chain([a]).collect())
                })
                .collect();
            for column in &columns {
                let steps = column.iter().map(|a| vec![*a]).collect();
                check(&Plan {
                    cfg,
                    steps,
                    ..Plan::all_full(1, 1)
                })
                .unwrap();
            }
        }
    }
}

fn plan(cfg: Cfg, rows: &[&str]) -> Plan {
    let row = |row: &&str| row.split(' ').map(|name| name.parse().unwrap()).collect();
    Plan {
        cfg,
        steps: rows.iter().map(row).collect(),
        ..Plan::all_full(1, 1)
    }
}

fn residual(liveness: &Liveness, steps: usize) -> Vec<bool> {
    (0..steps)
        .map(|step| liveness.residual_live_after(step, 0))
        .collect()
}

#[test]
fn sharing_an_output_does_not_break_the_chain_to_a_residual() {
    let plan = plan(
        Cfg::CondFirst,
        &[
            "full",
            "ast",
            "wa-rs",
            "ast",
            "wa-rs+asc",
            "asc",
            "ast",
            "full",
        ],
    );
    let liveness = plan.liveness();
    assert_eq!(
        residual(&liveness, 8),
        [true, true, true, true, false, false, false, false]
    );
    let outputs: Vec<bool> = (0..8)
        .map(|step| liveness.output_live_after(step, 0))
        .collect();
    assert_eq!(
        outputs,
        [true, false, true, false, false, true, false, false]
    );
}

#[test]
fn only_separate_runs_hand_outputs_over_within_a_step() {
    for cfg in Cfg::ALL.into_iter().filter(|cfg| *cfg != Cfg::None) {
        let liveness = plan(cfg, &["asc full", "wa-rs+asc ast"]).liveness();
        let separate = cfg == Cfg::Separate;
        assert_eq!(liveness.output_shared_within(0, 0), separate);
        assert_eq!(liveness.output_shared_within(1, 0), separate);
        assert!(!liveness.output_shared_within(0, 1));
        assert!(!liveness.output_shared_within(1, 1));
    }
}

#[test]
fn nothing_lives_outside_the_plan() {
    let liveness = plan(Cfg::Separate, &["full", "wa-rs"]).liveness();
    for (step, layer) in [(2, 0), (0, 1), (usize::MAX, usize::MAX)] {
        assert!(!liveness.residual_live_after(step, layer));
        assert!(!liveness.output_live_after(step, layer));
        assert!(!liveness.output_shared_within(step, layer));
    }
}

#[test]
fn the_peak_names_its_moment() {
    // Layer 0 hands an output to step 1; layer 1 keeps a residual to step 2 and adds an output.
    let plan = plan(Cfg::None, &["full full", "ast wa-rs", "full ast"]);
    let peak = plan.liveness().peak_bytes(&SHAPE);
    let one = SHAPE.tensor_bytes();
    assert_eq!(one, 2 * 1024 * 1152 * 2);
    // After layer 1 of step 0: layer 0's output and layer 1's residual; two tensors, as later.
    assert_eq!((peak.bytes, peak.step, peak.layer), (2 * one, 0, 1));
    assert_eq!(peak.residual_bytes, one);
}

#[test]
fn a_dense_plan_keeps_nothing() {
    let peak = Plan::all_full(28, 50).liveness().peak_bytes(&SHAPE);
    assert_eq!(peak, Default::default());
}

/// The authors keep a residual and an output per layer for the whole generation: 3.9 GiB at 2K.
#[test]
fn a_plan_that_keeps_everything_takes_what_the_authors_take() {
    let rows = [
        vec![Action::Full; 28],
        vec![Action::Ast; 28],
        vec![Action::WaRs; 28],
    ];
    let plan = Plan {
        steps: rows.to_vec(),
        ..Plan::all_full(28, 1)
    };
    let shape = CacheShape {
        rows: 2,
        tokens: 16384,
        width: 1152,
        element_bytes: 2,
    };
    let gib = plan.liveness().peak_bytes(&shape).bytes as f64 / (1u64 << 30) as f64;
    assert!((gib - 3.94).abs() < 0.01, "{gib}");
}

#[test]
fn absurd_shapes_saturate() {
    let plan = plan(Cfg::None, &["full full", "ast ast"]);
    let shape = CacheShape {
        rows: usize::MAX,
        tokens: usize::MAX,
        width: 2,
        element_bytes: 2,
    };
    assert_eq!(plan.liveness().peak_bytes(&shape).bytes, u64::MAX);
}
