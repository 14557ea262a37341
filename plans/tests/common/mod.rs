//! What several tests share: strategies for plans that are valid, the paper's workload.
#![allow(dead_code, reason = "every test binary uses its own part")]

use ditfastattn_plans::{Action, Cfg, Fingerprint, Plan, Side, TextTokens, Workload};
use proptest::prelude::*;

pub fn cfgs() -> impl Strategy<Value = Cfg> {
    prop::sample::select(Cfg::ALL.to_vec())
}

/// Valid rows for `layers` layers: the first has nothing to reuse, `asc` needs halves.
pub fn rows(cfg: Cfg, layers: usize, steps: usize) -> impl Strategy<Value = Vec<Vec<Action>>> {
    let allowed = move |first: bool| -> Vec<Action> {
        Action::ALL
            .into_iter()
            .filter(|a| (!first || a.is_full()) && (cfg != Cfg::None || !a.uses_halves()))
            .collect()
    };
    let row = move |first| prop::collection::vec(prop::sample::select(allowed(first)), layers);
    (row(true), prop::collection::vec(row(false), steps - 1)).prop_map(|(first, rest)| {
        let mut rows = vec![first];
        rows.extend(rest);
        rows
    })
}

fn count() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..4096, Just(u32::MAX as usize)]
}

fn finite() -> impl Strategy<Value = f64> {
    prop::num::f64::NORMAL | prop::num::f64::SUBNORMAL | prop::num::f64::ZERO
}

pub fn plans() -> impl Strategy<Value = Plan> {
    (cfgs(), 1usize..6, 1usize..9).prop_flat_map(|(cfg, layers, steps)| {
        (
            prop::option::of(any::<String>()),
            prop::option::of(finite().prop_map(f64::abs)),
            prop_oneof![Just(0.125), Just(1.0), 1e-9f64..1.0],
            prop::option::of(prop::collection::vec(finite(), steps)),
            prop::option::of((count(), any::<bool>())),
            prop::option::of(prop::array::uniform4(prop::option::of(count()))),
            rows(cfg, layers, steps),
        )
            .prop_map(
                move |(name, delta, window, timesteps, text, model, steps)| Plan {
                    name,
                    delta,
                    window,
                    cfg,
                    timesteps,
                    text: text.map(|(tokens, end)| TextTokens {
                        tokens,
                        side: if end { Side::End } else { Side::Start },
                    }),
                    model: model.map(|[layers, heads, head_dim, tokens]| Fingerprint {
                        layers,
                        heads,
                        head_dim,
                        tokens,
                    }),
                    steps,
                },
            )
    })
}

/// A layer of DiT-XL or PixArt with both halves of guidance.
pub fn work(tokens: usize) -> Workload {
    Workload {
        tokens,
        text: 0,
        width: 1152,
        rows: 2,
    }
}

pub fn near(found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance,
        "{found} is not {expected} ± {tolerance}"
    );
}
