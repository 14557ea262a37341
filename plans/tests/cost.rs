//! The numbers of the paper and of the authors' notebooks, and what they are made of.

use ditfastattn_plans::{Action, Cfg, Plan, Workload, band_density};
mod common;

use common::{near, work};
use proptest::prelude::*;

/// Table 2: FLOPs of the attention module in percent of full attention, d = 1152.
#[test]
fn table_2() {
    let published = [(1024, 77.0, 38.0), (4096, 51.0, 26.0), (16384, 33.0, 16.0)];
    let limit = [76.4, 51.0, 32.9];
    for ((tokens, window, both), limit) in published.into_iter().zip(limit) {
        let work = work(tokens);
        let percent = |action: Action, density| 100.0 * action.module_share(density, &work);
        // The paper's window is 1/8 of the tokens to either side, so 15/64 of all pairs.
        near(percent(Action::WaRs, 15.0 / 64.0), limit, 0.05);
        let exact = band_density(tokens, 0, tokens / 8);
        near(percent(Action::WaRs, exact), limit, 0.1);
        near(percent(Action::WaRs, exact), window, 1.0);
        near(percent(Action::WaRsAsc, exact), both, 1.0);
        near(
            percent(Action::WaRsAsc, exact),
            percent(Action::WaRs, exact) / 2.0,
            1e-12,
        );
        near(percent(Action::Asc, exact), 50.0, 1e-12);
        near(percent(Action::Ast, exact), 0.0, 0.0);
        near(percent(Action::Full, exact), 100.0, 1e-12);
    }
}

/// The authors' plots: GMAC of QKᵀ and PV over all layers and steps, batch 1 with guidance.
#[test]
fn published_gmacs() {
    let published = [
        (1024, 20, 2705.83),
        (1024, 30, 4058.74),
        (1024, 40, 5411.66),
        (1024, 50, 6764.57),
        (4096, 20, 43293.27),
        (16384, 20, 692692.33),
    ];
    for (tokens, steps, gmac) in published {
        let cost = Plan::all_full(28, steps).cost(&work(tokens));
        near(cost.dense_matmul_macs / 1e9, gmac, 0.005);
        assert_eq!(cost.matmul_macs, cost.dense_matmul_macs);
        near(cost.module_saved(), 0.0, 0.0);
    }
}

/// The authors' own accounting: 25, 12.5, 50 and 0 percent, 23.4 and 11.7 with an exact band.
#[test]
fn matmul_shares() {
    let density = band_density(1 << 20, 0, 1 << 17);
    near(density, 15.0 / 64.0, 1e-5);
    near(Action::WaRs.matmul_share(density), 0.234, 5e-4);
    near(Action::WaRsAsc.matmul_share(density), 0.117, 5e-4);
    near(Action::Asc.matmul_share(density), 0.5, 0.0);
    near(Action::Ast.matmul_share(density), 0.0, 0.0);
    near(Action::Full.matmul_share(density), 1.0, 0.0);
}

#[test]
fn a_plan_costs_the_sum_of_its_actions() {
    let steps = vec![
        vec![Action::Full, Action::Asc],
        vec![Action::WaRs, Action::Ast],
        vec![Action::WaRsAsc, Action::Ast],
    ];
    let plan = Plan {
        cfg: Cfg::CondFirst,
        steps,
        ..Plan::all_full(2, 3)
    };
    let counts = plan.counts();
    assert_eq!(Action::ALL.map(|action| counts.of(action)), [1, 1, 1, 1, 2]);
    assert_eq!(counts.total(), 6);
    near(counts.share(Action::Ast), 1.0 / 3.0, 1e-12);

    let work = work(1024);
    let cost = plan.cost(&work);
    let density = band_density(1024, 0, 128);
    near(
        cost.matmul_macs / work.matmul_macs(),
        1.5 + 1.5 * density,
        1e-9,
    );
    let windowed = Action::WaRs.module_share(density, &work);
    near(
        cost.module_saved(),
        1.0 - (1.5 + 1.5 * windowed) / 6.0,
        1e-12,
    );
    near(
        cost.matmul_saved(),
        1.0 - (1.5 + 1.5 * density) / 6.0,
        1e-12,
    );
}

#[test]
fn text_widens_the_band() {
    // 4 image and 2 text tokens, half-width 1: 10 image pairs, and 36 − 16 that touch text.
    near(band_density(6, 2, 1), 30.0 / 36.0, 1e-12);
    let plan = Plan::all_full(1, 1);
    assert_eq!(plan.half_width(1024 + 333, 333), 128);
    assert_eq!(plan.half_width(1024, 0), 128);
    assert_eq!(plan.half_width(23, 0), 2);
    assert_eq!(plan.half_width(7, 0), 1);
    assert_eq!(plan.half_width(0, 9), 1);
}

proptest! {
    #[test]
    fn density_is_the_fraction_of_pairs_in_the_band(
        tokens in 1usize..40, text in 0usize..45, half_width in 0usize..50, at_start: bool,
    ) {
        let text = text.min(tokens);
        let is_text = |i: usize| if at_start { i < text } else { i >= tokens - text };
        let mut pairs = 0;
        for i in 0..tokens {
            for j in 0..tokens {
                pairs += usize::from(i.abs_diff(j) <= half_width || is_text(i) || is_text(j));
            }
        }
        let expected = pairs as f64 / (tokens * tokens) as f64;
        prop_assert!((band_density(tokens, text, half_width) - expected).abs() < 1e-12);
    }

    #[test]
    fn shares_are_fractions_and_finite(
        tokens: u16, text: u16, width: u16, half_width: usize,
    ) {
        let work = Workload { tokens: tokens.into(), text: text.into(), width: width.into(), rows: 1 };
        let density = band_density(work.tokens, work.text, half_width);
        for action in Action::ALL {
            for share in [action.matmul_share(density), action.module_share(density, &work)] {
                prop_assert!((0.0..=1.0).contains(&share), "{action}: {share}");
            }
        }
    }
}
