//! What one foreign run, a repeated timestep or another schedule costs: its own step, and at most one more.

use super::*;

/// A plan in which every step but the first serves something.
fn lazy(steps: usize) -> Vec<Vec<Action>> {
    let row = |step: usize| match step {
        0 => Action::Full,
        step if step % 2 == 1 => Action::Ast,
        _ => Action::WaRs,
    };
    (0..steps).map(|step| vec![row(step)]).collect()
}

fn lazy_bench(steps: usize, fed: SchedulePolicy) -> Bench {
    let plan = Plan {
        timesteps: Some((0..steps).map(|i| 1000.0 - 50.0 * i as f64).collect()),
        steps: lazy(steps),
        ..Plan::all_full(1, 1)
    };
    Bench::serving(plan, 1 << 40, fed)
}

/// Runs an anonymous step and says what its layer did.
fn step(b: &mut Bench, at: usize, signature: RunSignature) -> Work {
    run(b, at, b.timestep(at), signature)
}

fn run(b: &mut Bench, at: usize, timestep: f64, signature: RunSignature) -> Work {
    let mut client = Client::new(0, 0, 2);
    client.place = at;
    let open = b.begin(&client, |call| {
        call.signature = Some(signature);
        call.timestep = Some(timestep);
    });
    let work = works(&open, 1)[0];
    b.finish(&open, 1);
    work
}

fn served(works: &[Work]) -> Vec<bool> {
    works.iter().map(|work| *work != Work::Full).collect()
}

#[test]
fn a_health_check_between_two_steps_costs_its_own_step() {
    let mut b = lazy_bench(8, SchedulePolicy::Planned);
    let (picture, check) = (Picture::new(1, 0), Picture::new(2, 7));
    let mut got = Vec::new();
    for at in 0..8 {
        got.push(step(&mut b, at, picture.signature(at)));
        if at == 3 {
            assert_eq!(step(&mut b, 5, check.signature(5)), Work::Full);
        }
    }
    assert_eq!(
        served(&got),
        [false, true, true, true, true, true, true, true]
    );
    assert_eq!((b.get("contested"), b.get("discontinuities")), (1, 0));
}

#[test]
fn a_health_check_at_the_first_timestep_costs_two_steps() {
    let mut b = lazy_bench(8, SchedulePolicy::Planned);
    let (picture, check) = (Picture::new(1, 0), Picture::new(2, 7));
    let mut got = Vec::new();
    for at in 0..8 {
        got.push(step(&mut b, at, picture.signature(at)));
        if at == 2 {
            step(&mut b, 0, check.signature(0));
        }
    }
    assert_eq!(
        served(&got),
        [false, true, true, false, false, true, true, true]
    );
    assert_eq!((b.get("contested"), b.get("discontinuities")), (1, 1));
}

#[test]
fn guidance_that_ends_midway_costs_two_steps() {
    let mut b = lazy_bench(8, SchedulePolicy::Planned);
    let (with, without) = (Picture::new(1, 0), Picture::new(1, 3));
    let signature = |at: usize| {
        let mut signature = with.signature(at);
        if at >= 4 {
            // The conditional half alone: other conditioning, other shapes.
            signature.conditioning = without.signature(at).conditioning;
        }
        signature
    };
    let got: Vec<Work> = (0..8).map(|at| step(&mut b, at, signature(at))).collect();
    assert_eq!(
        served(&got),
        [false, true, true, true, false, false, true, true]
    );
    assert_eq!((b.get("contested"), b.get("discontinuities")), (1, 1));
}

#[test]
fn a_timestep_that_is_evaluated_twice_is_caught_up_with() {
    let mut b = lazy_bench(6, SchedulePolicy::Planned);
    let predicted = Picture::new(1, 0);
    let corrected = Picture {
        guidance: 0.01,
        ..predicted.clone()
    };
    let mut got = vec![step(&mut b, 0, predicted.signature(0))];
    for at in 1..6 {
        got.push(step(&mut b, at, predicted.signature(at)));
        got.push(step(&mut b, at, corrected.signature(at)));
    }
    let expected = [true, false].repeat(5);
    assert_eq!(served(&got[1..]), expected);
    assert_eq!((b.get("contested"), b.get("discontinuities")), (0, 5));
    assert_eq!(b.get("generations"), 1);
}

#[test]
fn a_step_that_moves_far_is_caught_up_with() {
    // An abandoned generation of the same prompt is not clearly further than a step of this one.
    let mut b = lazy_bench(8, SchedulePolicy::Planned);
    step(&mut b, 0, Picture::new(2, 0).signature(0));
    let picture = Picture::new(1, 0);
    // It jumps over most of the schedule's way between its first two runs.
    let shown = |at: usize| picture.signature(if at == 0 { 0 } else { at + 7 });
    let got: Vec<Work> = (0..8).map(|at| step(&mut b, at, shown(at))).collect();
    assert!(!served(&got)[1]);
    assert!(served(&got)[3..].iter().all(|&served| served), "{got:?}");
}

#[test]
fn the_plan_s_own_schedule_is_the_same_under_any() {
    let picture = Picture::new(1, 0);
    for fed in [SchedulePolicy::Planned, SchedulePolicy::Any] {
        let mut b = lazy_bench(8, fed);
        for _ in 0..2 {
            let got: Vec<Work> = (0..8)
                .map(|at| step(&mut b, at, picture.signature(at)))
                .collect();
            let expected = lazy(8).iter().map(|row| row[0] != Full).collect::<Vec<_>>();
            assert_eq!(served(&got), expected, "{fed:?}");
        }
        for counter in [
            "off_schedule",
            "contested",
            "discontinuities",
            "misses",
            "recomputes",
        ] {
            assert_eq!(b.get(counter), 0, "{counter}");
        }
        assert_eq!(b.get("generations"), 2);
    }
}

#[test]
fn twice_as_many_steps_use_what_is_no_older_than_planned() {
    for anonymous in [true, false] {
        let mut b = lazy_bench(8, SchedulePolicy::Any);
        let picture = Picture::new(1, 0);
        let mut got = Vec::new();
        for half in 0..16 {
            let (at, timestep) = (half / 2, 1000.0 - 25.0 * half as f64);
            let work = match anonymous {
                true => run(&mut b, at, timestep, picture.signature(half)),
                false => {
                    let mut client = Client::new(7, 0, 2);
                    client.place = at;
                    let open = b.begin(&client, |call| call.timestep = Some(timestep));
                    let work = works(&open, 1)[0];
                    b.finish(&open, 1);
                    work
                }
            };
            got.push(work);
        }
        // Row 0 twice; from then on every cache is as old as in the plan or younger.
        let expected: Vec<bool> = (0..16).map(|half| half > 1).collect();
        assert_eq!(served(&got), expected);
        assert_eq!(b.get("off_schedule"), 8);
        assert_eq!((b.get("unplanned"), b.get("generations")), (0, 1));
        assert_eq!(b.get("contested") + b.get("discontinuities"), 0);
        assert_eq!(b.get("recomputes"), 0);
    }
}

#[test]
fn half_as_many_steps_compute_what_is_older_than_planned() {
    let mut b = lazy_bench(9, SchedulePolicy::Any);
    let picture = Picture::new(1, 0);
    let got: Vec<Work> = (0..3)
        .map(|i| {
            run(
                &mut b,
                4 * i,
                1000.0 - 200.0 * i as f64,
                picture.signature(4 * i),
            )
        })
        .collect();
    // R of row 0 is no older at row 4 than planned; all windows of the plan read that one.
    assert_eq!(got, [Work::Full, Work::Window, Work::Window]);
    let mut b = lazy_bench(9, SchedulePolicy::Any);
    // `ast` of row 3 is one step old in the plan, three here.
    step(&mut b, 0, picture.signature(0));
    assert_eq!(step(&mut b, 3, picture.signature(3)), Work::Full);
    assert_eq!((b.get("discontinuities"), b.get("off_schedule")), (0, 0));
    assert_eq!(b.get("recomputes"), 1);
}

#[test]
fn a_second_run_of_other_shapes_computes_its_own() {
    let mut b = bench(
        Cfg::Separate,
        &[&[Full, Full], &[Asc, WaRsAsc], &[Ast, WaRsAsc], &[Asc, Asc]],
    );
    let mut client = Client::new(7, 0, 1);
    for place in 0..8 {
        client.place = place;
        let tokens = if place % 2 == 0 { 11 } else { 5 };
        let open = b.begin(&client, |call| {
            call.shapes = FeedShapes(vec![(1, vec![1, 4]), (1, vec![1, tokens])]);
        });
        let got = works(&open, 2);
        let expected = match place {
            0 | 1 | 6 | 7 => [Work::Full, Work::Full],
            2 | 3 => [Work::Full, Work::Window],
            _ => [Work::Reuse, Work::Window],
        };
        assert_eq!(got, expected, "place {place}");
        // Every tensor is the branch's own.
        for (layer, work) in got.iter().enumerate() {
            let from = match work {
                Work::Full => continue,
                Work::Window => open.run.residual(layer).expect("promised").tensor.maker,
                Work::Reuse => open.run.output(layer, 0).expect("promised").maker,
            };
            assert_eq!(from.place % 2, place % 2);
        }
        b.finish(&open, 2);
    }
    assert_eq!((b.get("misses"), b.get("shape_changes")), (0, 0));
    assert_eq!(
        b.get("recomputes"),
        5,
        "each asc and wa-rs+asc of a second run"
    );
}

impl Bench {
    /// Finishes layers without looking at what is served.
    fn finish(&self, open: &Open, layers: usize) {
        for layer in 0..layers {
            let directive = open.run.directive(layer).expect("layer");
            let make = |kind| {
                Arc::new(Symbol {
                    maker: open.maker,
                    layer,
                    kind,
                    _lease: open.run.reserve(UNIT).expect("room"),
                })
            };
            if directive.capture {
                open.run
                    .capture(layer, make(Kind::Residual), directive.rows);
            }
            let keep = directive.keep && directive.work != Work::Reuse;
            open.run
                .finish(layer, 0, 1, keep.then(|| make(Kind::Output)));
        }
    }
}
