//! Models whose layers differ, what saves how much where, and what that means in time.

use ditfastattn_plans::{
    Action, CacheShape, Cfg, LayerCount, LayerWork, PAPER_ORDER, Plan, Throughput, Workload,
    band_density, band_density_limit, candidates_by_cost, candidates_in_order,
};

mod common;

use common::{near, work};
use proptest::prelude::*;

fn layer(tokens: usize) -> LayerWork {
    LayerWork::from(work(tokens))
}

fn plan(cfg: Cfg, rows: &[&[Action]]) -> Plan {
    let steps = rows.iter().map(|row| row.to_vec()).collect();
    Plan {
        cfg,
        steps,
        ..Plan::all_full(1, 1)
    }
}

#[test]
fn the_density_of_many_tokens() {
    assert_eq!(band_density_limit(0.125), 15.0 / 64.0);
    assert_eq!(band_density_limit(1.0), 1.0);
    near(band_density(1 << 20, 0, 1 << 17), 15.0 / 64.0, 1e-5);
}

/// Latte: spatial layers see few long sequences, temporal ones many short ones.
#[test]
fn layers_of_different_sizes_are_summed() {
    let spatial = layer(256);
    let temporal = LayerWork::from(Workload {
        tokens: 16,
        rows: 2 * 256,
        ..work(0)
    });
    let plan = plan(
        Cfg::CondFirst,
        &[
            &[Action::Full, Action::Full],
            &[Action::Ast, Action::WaRs],
            &[Action::WaRsAsc, Action::Asc],
        ],
    );
    let cost = plan.cost_by_layer(&[spatial, temporal]).unwrap();
    near(
        cost.dense_module_macs,
        3.0 * (spatial.module_macs() + temporal.module_macs()),
        1.0,
    );
    let (wide, narrow) = (band_density(256, 0, 32), band_density(16, 0, 2));
    let expected = spatial.module_macs() * (1.0 + spatial.module_share(Action::WaRsAsc, wide))
        + temporal.module_macs() * (1.5 + temporal.module_share(Action::WaRs, narrow));
    near(cost.module_macs / expected, 1.0, 1e-12);
    assert_eq!(
        plan.cost_by_layer(&[spatial]),
        Err(LayerCount {
            expected: 2,
            found: 1
        })
    );
}

/// Llama-like: 32 heads of 72, keys and values of 8.
#[test]
fn grouped_keys_and_core_form_change_the_projections_only() {
    let (c, d) = (1152.0, 2304.0);
    let grouped = LayerWork {
        work: Workload {
            width: 2304,
            ..work(1024)
        },
        projection_per_token: 2.0 * c * d + 2.0 * c * d * 8.0 / 32.0,
        shares_projections: true,
    };
    near(grouped.projection_macs(), 2048.0 * c * d * 2.5, 1.0);
    near(grouped.module_share(Action::Ast, 0.2), 0.0, 0.0);
    let core = LayerWork {
        shares_projections: false,
        ..layer(1024)
    };
    // Of a module at 1024 tokens the projections are 2d / (2d + N).
    let projections = 2304.0 / (2304.0 + 1024.0);
    near(core.module_share(Action::Ast, 0.2), projections, 1e-12);
    near(
        core.module_share(Action::Asc, 0.2),
        projections + (1.0 - projections) / 2.0,
        1e-12,
    );
    near(core.module_share(Action::Full, 0.2), 1.0, 1e-12);
}

#[test]
fn a_window_that_covers_everything_is_counted_as_full_and_said() {
    let rows: [&[Action]; 2] = [&[Action::Full; 2], &[Action::WaRs, Action::WaRsAsc]];
    let mut plan = plan(Cfg::CondFirst, &rows);
    assert_eq!(plan.cost(&work(64)).covered, 0);
    assert_eq!(plan.cost(&work(1)).covered, 2);
    assert_eq!(plan.cost(&work(2)).covered, 2, "half-width 1 sees both");
    plan.window = 1.0;
    let cost = plan.cost(&work(64));
    assert_eq!(cost.covered, 2);
    near(cost.module_saved(), 0.5 / 4.0, 1e-12);
    assert!(work(9).window_covers(8));
    assert!(!work(10).window_covers(8));
    let joint = Workload {
        text: 5,
        ..work(14)
    };
    assert!(joint.window_covers(8), "text sees everything anyway");
    assert!(work(9).window_covers(usize::MAX));
}

/// Table 2 decides the order: ASC saves 50 %, WA-RS 24, 49 and 67 % at 1024, 4096 and 16384 tokens.
#[test]
fn candidates_in_ascending_cost() {
    use Action::{Asc, Ast, WaRs, WaRsAsc};
    let layers = [layer(1024), layer(4096), layer(16384), layer(2)];
    assert_eq!(
        candidates_by_cost(&layers, 0.125, Cfg::UncondFirst),
        [
            vec![Ast, WaRsAsc, Asc, WaRs],
            vec![Ast, WaRsAsc, Asc, WaRs],
            vec![Ast, WaRsAsc, WaRs, Asc],
            // The window covers both tokens.
            vec![Ast, Asc],
        ]
    );
    let without = [vec![Ast, WaRs], vec![Ast, WaRs], vec![Ast, WaRs], vec![Ast]];
    assert_eq!(candidates_by_cost(&layers, 0.125, Cfg::None), without);
    assert_eq!(
        candidates_in_order(&PAPER_ORDER, 1, Cfg::Separate),
        [[Ast, WaRsAsc, WaRs, Asc]]
    );
    assert_eq!(
        candidates_in_order(&PAPER_ORDER, 1, Cfg::None),
        [[Ast, WaRs]]
    );
}

/// Tables 3 and 4: attention takes 33.9, 41.5 and 69.2 % of a generation at 512, 1K and 2K.
#[test]
fn no_attention_at_all_is_the_ceiling() {
    let rows: [&[Action]; 2] = [&[Action::Full], &[Action::Ast]];
    let mut plan = plan(Cfg::CondFirst, &rows);
    plan.steps = vec![vec![Action::Ast]];
    let cost = plan.cost(&work(1024));
    for (share, ceiling) in [(0.339, 1.51), (0.415, 1.71), (0.692, 3.25)] {
        near(1.0 / cost.time_share(share), ceiling, 0.005);
    }
}

#[test]
fn times_follow_the_macs_at_the_rates_of_the_machine() {
    let rows: [&[Action]; 3] = [&[Action::Full], &[Action::WaRs], &[Action::Ast]];
    let plan = plan(Cfg::CondFirst, &rows);
    let layer = layer(4096);
    let even = Throughput {
        full: 1e12,
        band: 1e12,
        projection: 1e12,
        reuse_seconds: 0.0,
        other_seconds: 0.05,
    };
    let times = plan.times(&[layer], &even).unwrap();
    let cost = plan.cost_by_layer(&[layer]).unwrap();
    near(times.dense_attention, cost.dense_module_macs / 1e12, 1e-12);
    near(times.attention, cost.module_macs / 1e12, 1e-12);
    near(times.other, 0.15, 1e-12);
    near(
        times.share(),
        cost.time_share(times.attention_share()),
        1e-12,
    );

    let real = Throughput {
        band: 0.5e12,
        reuse_seconds: 0.01,
        ..even
    };
    let slower = plan.times(&[layer], &real).unwrap();
    let density = band_density(4096, 0, 512);
    let extra = layer.work.matmul_macs() * density / 1e12 + 0.01;
    near(slower.attention - times.attention, extra, 1e-9);
    assert_eq!(slower.dense_attention, times.dense_attention);
    assert!(plan.times(&[], &real).is_err());
}

proptest! {
    #[test]
    fn equal_layers_cost_what_one_size_for_all_costs(plan in common::plans(), tokens in 1usize..5000, text in 0usize..100) {
        let work = Workload { text: text.min(tokens), ..work(tokens) };
        let layers = vec![LayerWork::from(work); plan.layers()];
        prop_assert_eq!(plan.cost_by_layer(&layers).unwrap(), plan.cost(&work));
        let shape = CacheShape { rows: 2, tokens, width: 1152, element_bytes: 2 };
        let liveness = plan.liveness();
        let peak = liveness.peak_bytes_by_layer(&vec![shape; plan.layers()]).unwrap();
        prop_assert_eq!(peak, liveness.peak_bytes(&shape));
        prop_assert!(liveness.peak_bytes_by_layer(&vec![shape; plan.layers() + 1]).is_err());
    }

    /// Layers that cache nothing take nothing, however large they are.
    #[test]
    fn the_peak_of_one_layer_is_its_own(plan in common::plans(), tokens in 1usize..5000) {
        let shape = CacheShape { rows: 2, tokens, width: 8, element_bytes: 2 };
        let empty = CacheShape { rows: 0, ..shape };
        for layer in 0..plan.layers() {
            let alone = Plan { steps: plan.steps.iter().map(|row| vec![row[layer]]).collect(), ..plan.clone() };
            let mut shapes = vec![empty; plan.layers()];
            shapes[layer] = shape;
            let peak = plan.liveness().peak_bytes_by_layer(&shapes).unwrap();
            prop_assert_eq!(peak.bytes, alone.liveness().peak_bytes(&shape).bytes);
        }
    }
}
