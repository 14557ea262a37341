//! Algorithm 1 over a toy transformer, against an independent implementation and against itself.

mod journal;
mod losses;
mod rederive;
mod toy;

use std::ops::ControlFlow;

use ditfastattn_plans::{
    Action, Cfg, Effort, Found, LossTable, Metric, PAPER_ORDER, SearchError, Settings,
    candidates_in_order, search,
};
use proptest::prelude::*;
use toy::{Call, Resuming, Sizes, Toy};

pub type Change = fn(&mut Settings);

pub fn settings(sizes: &Sizes, cfg: Cfg, delta: f64, metric: Metric) -> Settings {
    Settings {
        model_hash: format!("toy-{}", sizes.seed),
        inputs_hash: "latents".to_owned(),
        model: None,
        steps: sizes.steps,
        delta,
        metric,
        window: 0.125,
        cfg,
        timesteps: None,
        text: None,
        candidates: candidates_in_order(&PAPER_ORDER, sizes.layers, cfg),
    }
}

pub fn go_on(_: &ditfastattn_plans::Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

pub fn run(sizes: Sizes, settings: &Settings) -> (Found, Toy) {
    let mut toy = Toy::new(sizes, settings.cfg);
    let table = LossTable::new(settings.clone()).unwrap();
    let found = search(&mut toy, table, &mut (), &mut go_on).unwrap();
    (found, toy)
}

pub fn cases() -> impl Strategy<Value = (Sizes, Settings)> {
    let cfgs = prop::sample::select(vec![Cfg::CondFirst, Cfg::UncondFirst, Cfg::None]);
    let sizes = (1usize..5, 1usize..6, 1usize..3, any::<u32>());
    let metrics = prop::sample::select(Metric::ALL.to_vec());
    (sizes, cfgs, 0.0f64..0.4, metrics).prop_map(|(sizes, cfg, delta, metric)| {
        let (layers, steps, samples, seed) = sizes;
        let sizes = Sizes {
            layers,
            steps,
            samples,
            seed,
        };
        (sizes, settings(&sizes, cfg, delta, metric))
    })
}

/// Algorithm 1 as the paper writes it down, without any of the driver's notions.
fn by_the_book(mut toy: Toy, settings: &Settings) -> (Vec<Vec<Action>>, Vec<Call>) {
    let layers = settings.candidates.len();
    let mut plan = Vec::new();
    for step in 0..settings.steps {
        let mut row = vec![Action::Full; layers];
        if step > 0 {
            let raw = toy.output(step, &row);
            toy.calls.push((step, row.clone(), "base"));
            for i in 1..=layers {
                for candidate in &settings.candidates[i - 1] {
                    row[i - 1] = *candidate;
                    let trial = toy.output(step, &row);
                    toy.calls.push((step, row.clone(), "trial"));
                    let loss = settings.metric.loss(&raw, &trial).unwrap();
                    if loss.unwrap_or(f64::INFINITY) < i as f64 * settings.delta / layers as f64 {
                        break;
                    }
                    row[i - 1] = Action::Full;
                }
            }
        }
        toy.calls.push((step, row.clone(), "commit"));
        toy.advance(step, &row);
        plan.push(row);
    }
    (plan, toy.calls)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_search_is_the_papers((sizes, settings) in cases()) {
        let (found, toy) = run(sizes, &settings);
        let (expected, calls) = by_the_book(Toy::new(sizes, settings.cfg), &settings);
        prop_assert_eq!(&found.plan.steps, &expected);
        // A search of a single step has nothing to decide and runs nothing.
        if settings.steps > 1 {
            prop_assert_eq!(&toy.calls, &calls);
            prop_assert_eq!(found.table.naive_forwards(), calls.len() as f64);
        }
        prop_assert_eq!(found.plan.validate(), Ok(()));
        prop_assert_eq!(found.effort.naive_forwards(), toy.calls.len() as f64);
        prop_assert_eq!(found.effort.forwards, toy.calls.len() as f64);
        prop_assert_eq!(found.table.trials(), found.effort.trials);
    }

    /// Resuming at the layer on trial, and committing the last base, changes nothing but the work.
    #[test]
    fn a_denoiser_that_resumes_finds_the_same((sizes, settings) in cases()) {
        let (plain, toy) = run(sizes, &settings);
        let mut resuming = Resuming::new(Toy::new(sizes, settings.cfg));
        let table = LossTable::new(settings.clone()).unwrap();
        let found = search(&mut resuming, table, &mut (), &mut go_on).unwrap();
        prop_assert_eq!(&found.table, &plain.table);
        prop_assert_eq!(resuming.toy.latents, toy.latents);
        prop_assert_eq!(resuming.toy.caches, toy.caches);
        prop_assert_eq!(found.effort.naive_forwards(), plain.effort.naive_forwards());
        prop_assert!(found.effort.forwards <= plain.effort.forwards);
        if settings.steps > 1 {
            // Trials resume, commits after the first step are free.
            let trials: f64 = found.table.cells().iter().map(|cell| {
                cell.tried.len() as f64 * (sizes.layers - cell.layer) as f64 / sizes.layers as f64
            }).sum();
            let expected = trials + found.effort.bases as f64 + 1.0;
            prop_assert!((found.effort.forwards - expected).abs() < 1e-9);
        }
    }

    #[test]
    fn no_threshold_no_sharing((sizes, mut settings) in cases()) {
        settings.delta = 0.0;
        let (found, _) = run(sizes, &settings);
        prop_assert!(found.plan.steps.iter().flatten().all(|a| *a == Action::Full));
    }

    #[test]
    fn an_unlimited_threshold_takes_every_first_candidate((sizes, mut settings) in cases()) {
        settings.delta = 1e300;
        let (found, _) = run(sizes, &settings);
        let later = &found.plan.steps[1..];
        prop_assert!(later.iter().flatten().all(|a| *a == settings.candidates[0][0]));
    }
}

#[test]
fn the_number_of_forward_passes_is_that_of_the_authors() {
    // T = 50, M = 28: at most 2T + (T − 1)·4·M, at least 2T + (T − 1)·M; less one dense run, since
    // the first step has nothing to compare.
    let sizes = Sizes {
        layers: 28,
        steps: 50,
        samples: 1,
        seed: 1,
    };
    let (none, _) = run(sizes, &settings(&sizes, Cfg::CondFirst, 0.0, Metric::Mrae));
    assert_eq!(none.effort.naive_forwards(), 5588.0 - 1.0);
    let (all, _) = run(sizes, &settings(&sizes, Cfg::CondFirst, 1e9, Metric::Mrae));
    assert_eq!(all.effort.naive_forwards(), 1472.0 - 1.0);
    assert_eq!(
        all.effort,
        Effort {
            bases: 49,
            trials: 49 * 28,
            commits: 50,
            forwards: 1471.0
        }
    );
    let mut resuming = Resuming::new(Toy::new(sizes, Cfg::CondFirst));
    let table = LossTable::new(none.table.settings().clone()).unwrap();
    let found = search(&mut resuming, table, &mut (), &mut go_on).unwrap();
    let saved = found.effort.naive_forwards() / found.effort.forwards;
    assert!(saved > 1.9, "{saved}");
}

#[test]
fn a_reference_that_is_not_finite_ends_the_search() {
    let sizes = Sizes {
        layers: 2,
        steps: 3,
        samples: 1,
        seed: 1,
    };
    let settings = settings(&sizes, Cfg::None, 0.1, Metric::Mrae);
    let mut toy = Toy::new(sizes, Cfg::None);
    toy.latents[0][2] = f32::NAN;
    let table = LossTable::new(settings).unwrap();
    let error = search(&mut toy, table, &mut (), &mut go_on).unwrap_err();
    assert!(matches!(error, SearchError::Reference(1)), "{error}");
}

#[test]
fn settings_that_cannot_be_searched_are_refused() {
    let sizes = Sizes {
        layers: 2,
        steps: 3,
        samples: 1,
        seed: 1,
    };
    let good = settings(&sizes, Cfg::CondFirst, 0.1, Metric::Mrae);
    assert_eq!(good.validate(), Ok(()));
    let broken: [(&str, Change); 10] = [
        ("at least one step", |s| s.steps = 0),
        ("at least one step", |s| s.candidates.clear()),
        ("at most", |s| s.steps = usize::MAX),
        ("delta", |s| s.delta = -0.1),
        ("delta", |s| s.delta = f64::INFINITY),
        ("window", |s| s.window = 0.0),
        ("one timestep per step (3), found 1", |s| {
            s.timesteps = Some(vec![1.0]);
        }),
        ("finite", |s| {
            s.timesteps = Some(vec![1.0, f64::NAN, 0.0]);
        }),
        ("layer 1 has the candidate full", |s| {
            s.candidates[1].push(Action::Full);
        }),
        ("cfg is none", |s| s.cfg = Cfg::None),
    ];
    for (message, break_it) in broken {
        let mut settings = good.clone();
        break_it(&mut settings);
        let error = LossTable::new(settings).unwrap_err().to_string();
        assert!(error.contains(message), "{error} should say {message}");
    }
    let mut twice = good;
    twice.candidates[0].push(Action::Ast);
    assert!(twice.validate().unwrap_err().to_string().contains("twice"));
}
