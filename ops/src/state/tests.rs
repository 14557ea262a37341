//! The state machine with symbols in place of tensors.
//!
//! Clients run generations in random order, with every fault we know of, and each keeps a naive history of what its own
//! runs computed. Whatever the state machine serves must be the latest tensor of that history, of the same generation and
//! without a gap; what it serves to a client that behaves must be all that the plan says.

mod inputs;
mod recovery;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ditfastattn_plans::{Action, Cfg, Plan};
use proptest::prelude::*;

use super::call::{Call, FeedShapes};
use super::continuity::{Feed, RunSignature, Values};
use super::schedule::SchedulePolicy;
use super::session::Session;
use super::{Cached, CompiledPlan, Lease, Limits, Process, Rows, Run, Work};

/// A tensor that only knows where it comes from.
#[derive(Debug)]
struct Symbol {
    maker: Maker,
    layer: usize,
    kind: Kind,
    _lease: Lease,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Residual,
    Output,
}

/// The run that made a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Maker {
    client: usize,
    generation: usize,
    place: usize,
    /// Unique in the test.
    run: usize,
}

type Tensor = Arc<Symbol>;

impl Cached for Tensor {}

const UNIT: usize = 10;

struct Bench {
    session: Arc<Session<Tensor>>,
    process: Arc<Process<Tensor>>,
    clock: Arc<AtomicU64>,
    plan: Plan,
    runs: usize,
}

/// What a client knows of one layer in one branch: the runs that made its latest residual and output.
#[derive(Clone, Copy, Debug, Default)]
struct Latest {
    residual: Option<Maker>,
    output: Option<Maker>,
}

#[derive(Clone, Debug)]
struct Client {
    id: i64,
    index: usize,
    generation: usize,
    place: usize,
    rows: usize,
    latest: HashMap<(usize, usize), Latest>,
    /// The last run that completed; a gap after it forbids serving anything older.
    last: Option<usize>,
}

/// A run that has begun, and what it will mean to its client if it completes.
struct Open {
    run: Arc<Run<Tensor>>,
    maker: Maker,
    served: usize,
}

impl Bench {
    fn new(plan: Plan, bytes: u64) -> Bench {
        Bench::serving(plan, bytes, SchedulePolicy::Planned)
    }

    fn serving(plan: Plan, bytes: u64, fed: SchedulePolicy) -> Bench {
        let clock = Arc::new(AtomicU64::new(0));
        let reader = Arc::clone(&clock);
        let limits = Limits {
            bytes,
            idle_ms: 1_000_000,
        };
        let process = Process::new(limits, move || reader.load(Ordering::Relaxed));
        let compiled_plan = CompiledPlan::new(plan.clone(), &[]);
        Bench {
            session: Session::new(Arc::clone(&process), compiled_plan, fed),
            process,
            clock,
            plan,
            runs: 0,
        }
    }

    fn runs_per_step(&self) -> usize {
        if self.plan.cfg == Cfg::Separate { 2 } else { 1 }
    }

    fn places(&self) -> usize {
        self.plan.step_count() * self.runs_per_step()
    }

    fn timestep(&self, place: usize) -> f64 {
        let step = place / self.runs_per_step();
        self.plan
            .timesteps
            .as_ref()
            .map_or(1000.0 - step as f64, |list| list[step])
    }

    fn begin(&mut self, client: &Client, call: impl FnOnce(&mut Call)) -> Open {
        self.clock.fetch_add(1, Ordering::Relaxed);
        let mut whole = Call {
            timestep: Some(self.timestep(client.place)),
            request: client.id,
            start: false,
            end: false,
            rows: client.rows,
            shapes: FeedShapes(vec![(1, vec![client.rows, 4])]),
            signature: None,
        };
        call(&mut whole);
        let (run, _) = self.session.begin(whole).expect("memory");
        self.runs += 1;
        assert_eq!(
            self.process.run(run.ticket()).map(|r| r.ticket()),
            Ok(run.ticket())
        );
        Open {
            run,
            maker: Maker {
                client: client.index,
                generation: client.generation,
                place: client.place,
                run: self.runs,
            },
            served: 0,
        }
    }

    /// Runs the layers `layers` of a run, checking everything that is served against the client's history.
    fn layers(&mut self, open: &mut Open, client: &mut Client, layers: std::ops::Range<usize>) {
        let branch = open.maker.place % self.runs_per_step();
        let step = open.maker.place / self.runs_per_step();
        for layer in layers {
            let directive = open.run.directive(layer).expect("a layer of the plan");
            let planned = self.plan.action(step, layer);
            let contiguous = client.last.is_some_and(|last| last + 1 == open.maker.place);
            let mut latest = client
                .latest
                .get(&(layer, branch))
                .copied()
                .unwrap_or_default();
            let make = |kind| {
                open.run.reserve(UNIT).map(|lease| {
                    Arc::new(Symbol {
                        maker: open.maker,
                        layer,
                        kind,
                        _lease: lease,
                    })
                })
            };
            let fits = |tensor: &Tensor, kind: Kind, expected: Option<Maker>| {
                assert_eq!((tensor.layer, tensor.kind), (layer, kind));
                assert_eq!(Some(tensor.maker), expected, "step {step} layer {layer}");
                assert_eq!(
                    (tensor.maker.client, tensor.maker.generation),
                    (client.index, client.generation)
                );
                assert!(contiguous, "served across a gap");
            };
            let computed = match directive.work {
                Work::Reuse => {
                    let output = open
                        .run
                        .output(layer, 0)
                        .expect("promised by the directive");
                    if planned == Action::Ast {
                        fits(&output, Kind::Output, latest.output);
                    } else {
                        // The second run of a step takes over from the first.
                        assert!(branch == 1 && planned.uses_halves());
                        let first = client.latest[&(layer, 0)];
                        fits(&output, Kind::Output, first.output);
                        latest.output = first.output;
                        if planned == Action::Asc {
                            latest.residual = first.residual;
                        }
                    }
                    open.served += 1;
                    false
                }
                Work::Window => {
                    let residual = open.run.residual(layer).expect("promised by the directive");
                    fits(&residual.tensor, Kind::Residual, latest.residual);
                    assert!(planned.is_windowed());
                    open.served += 1;
                    true
                }
                Work::Full => {
                    // A lost `ast` is no refresh of R if the plan's R is still there.
                    if directive.capture || planned.is_full() || latest.residual.is_none() {
                        latest.residual = Some(open.maker);
                    }
                    if directive.capture
                        && let Some(tensor) = make(Kind::Residual)
                    {
                        open.run.capture(layer, tensor, directive.rows);
                    }
                    true
                }
            };
            if computed {
                latest.output = Some(open.maker);
            }
            assert!(
                directive.rows == Rows::All
                    || (planned.uses_halves() && client.rows.is_multiple_of(2))
            );
            let output = (directive.keep && computed)
                .then(|| make(Kind::Output))
                .flatten();
            open.run.finish(layer, 0, 1, output);
            client.latest.insert((layer, branch), latest);
        }
    }

    /// A whole run that completes.
    fn complete(&mut self, client: &mut Client, call: impl FnOnce(&mut Call)) -> Open {
        let mut open = self.begin(client, call);
        let layers = self.plan.layers();
        self.layers(&mut open, client, 0..layers);
        client.last = Some(open.maker.place);
        open
    }

    fn get(&self, name: &str) -> u64 {
        let all = self.session.counters.all();
        let found = all.iter().find(|(n, _)| *n == name);
        found.unwrap_or_else(|| panic!("no counter {name}")).1
    }
}

impl Client {
    fn new(id: i64, index: usize, rows: usize) -> Client {
        Client {
            id,
            index,
            generation: 0,
            place: 0,
            rows,
            latest: HashMap::new(),
            last: None,
        }
    }

    /// Another generation, at `place`.
    fn restart(&mut self, place: usize) {
        self.generation += 1;
        self.place = place;
        self.latest.clear();
        self.last = None;
    }
}

fn action() -> impl Strategy<Value = Action> {
    prop::sample::select(Action::ALL.to_vec())
}

fn plan() -> impl Strategy<Value = Plan> {
    let cfg = prop::sample::select(Cfg::ALL.to_vec());
    (1usize..5, 2usize..9, cfg, any::<bool>())
        .prop_flat_map(|(layers, steps, cfg, listed)| {
            let rows = prop::collection::vec(prop::collection::vec(action(), layers), steps);
            (rows, Just(cfg), Just(listed))
        })
        .prop_map(|(mut rows, cfg, listed)| {
            for (step, row) in rows.iter_mut().enumerate() {
                for action in row {
                    if step == 0 && !action.is_full() {
                        *action = Action::Full;
                    }
                    if cfg == Cfg::None {
                        *action = match *action {
                            Action::Asc => Action::Full,
                            Action::WaRsAsc => Action::WaRs,
                            other => other,
                        };
                    }
                }
            }
            let timesteps =
                listed.then(|| (0..rows.len()).map(|i| 1000.0 - 50.0 * i as f64).collect());
            let plan = Plan {
                cfg,
                timesteps,
                steps: rows,
                ..Plan::all_full(1, 1)
            };
            plan.validate().expect("the strategy makes valid plans");
            plan
        })
}

/// What a client does next.
#[derive(Clone, Copy, Debug)]
enum Move {
    Run,
    /// Skips runs of the plan.
    Skip(usize),
    /// Begins and goes on without an answer for the previous run: never finishes.
    Vanish(usize),
    /// An op fails.
    Fail(usize),
    Restart {
        flagged: bool,
    },
    StartMidway(usize),
    Reshape,
    Unplanned,
    Again,
}

fn moves() -> impl Strategy<Value = Vec<(usize, Move)>> {
    let one = prop_oneof![
        12 => Just(Move::Run),
        1 => (1usize..3).prop_map(Move::Skip),
        1 => (0usize..4).prop_map(Move::Vanish),
        1 => (0usize..4).prop_map(Move::Fail),
        1 => any::<bool>().prop_map(|flagged| Move::Restart { flagged }),
        1 => (1usize..6).prop_map(Move::StartMidway),
        1 => Just(Move::Reshape),
        1 => Just(Move::Unplanned),
        1 => Just(Move::Again),
    ];
    prop::collection::vec((0usize..3, one), 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Requests with ids, interleaved, with every fault: whatever is served is right.
    #[test]
    fn what_is_served_is_always_the_latest_of_the_same_generation(
        plan in plan(), moves in moves(), budget in prop::sample::select(vec![0u64, 45, 200, 1 << 40])
    ) {
        // Without a list of timesteps places cannot be told apart after a skip: only orderly clients then.
        let listed = plan.timesteps.is_some();
        let mut bench = Bench::new(plan, budget);
        let layers = bench.plan.layers();
        let mut clients: Vec<Client> = (0..3).map(|i| Client::new(i as i64 + 1, i, 2)).collect();
        for (who, next) in moves {
            let mut client = clients[who].clone();
            match next {
                Move::Skip(n) if listed => {
                    let per_step = bench.runs_per_step();
                    client.place = (client.place.div_ceil(per_step) + n) * per_step;
                }
                // Half a step again would look like its other half.
                Move::Again if listed && client.place.is_multiple_of(bench.runs_per_step()) => {
                    client.place = client.place.saturating_sub(bench.runs_per_step());
                    client.last = None;
                }
                Move::Restart { .. } => client.restart(0),
                Move::StartMidway(at) if listed => client.restart(at * bench.runs_per_step()),
                Move::Reshape => client.rows += 1,
                _ => {}
            }
            if client.place >= bench.places() {
                client.restart(0);
            }
            // A start over after the first half of a first step would look like its other half.
            let separate = bench.runs_per_step() == 2;
            let start = match next {
                Move::Restart { flagged } => flagged || separate,
                Move::StartMidway(_) => listed || client.place == 0,
                _ => separate && client.place == 0,
            };
            match next {
                Move::Unplanned => {
                    let open = bench.begin(&client, |call| call.timestep = Some(f64::NAN));
                    for layer in 0..layers {
                        prop_assert_eq!(open.run.directive(layer).expect("layer").work, Work::Full);
                        open.run.finish(layer, 0, 1, None);
                    }
                    continue;
                }
                Move::Fail(after) => {
                    let mut open = bench.begin(&client, |call| call.start = start);
                    let mut shadow = client.clone();
                    bench.layers(&mut open, &mut shadow, 0..after.min(layers - 1));
                    open.run.fail();
                    prop_assert!(bench.process.run(open.run.ticket()).is_err());
                    // Its caches are gone: nothing older may be served until recomputed.
                    client.latest.clear();
                }
                Move::Vanish(after) => {
                    let mut open = bench.begin(&client, |call| call.start = start);
                    let mut shadow = client.clone();
                    bench.layers(&mut open, &mut shadow, 0..after.min(layers - 1));
                    client.latest.clear();
                }
                _ => {
                    bench.complete(&mut client, |call| call.start = start);
                    client.place += 1;
                }
            }
            clients[who] = client;
        }
        // Nothing leaks: sessions take everything with them.
        let Bench { session, process, .. } = bench;
        drop(session);
        prop_assert_eq!((process.bytes(), process.runs_in_flight()), (0, 0));
        prop_assert!(process.peak_bytes() <= budget);
    }

    /// A client that behaves gets all that the plan says, and leaves nothing behind.
    #[test]
    fn an_orderly_generation_follows_the_plan(plan in plan(), rows in 1usize..5) {
        let mut bench = Bench::new(plan.clone(), 1 << 40);
        let mut client = Client::new(5, 0, rows);
        let halves = rows % 2 == 0 && rows > 0;
        for _ in 0..2 {
            client.restart(0);
            while client.place < bench.places() {
                let step = client.place / bench.runs_per_step();
                let second = client.place % bench.runs_per_step() == 1;
                let open = bench.complete(&mut client, |_| {});
                for layer in 0..plan.layers() {
                    let got = open.run.directive(layer).expect("layer");
                    let planned = plan.action(step, layer);
                    let batched = matches!(plan.cfg, Cfg::CondFirst | Cfg::UncondFirst);
                    let work = match planned {
                        _ if second && planned.uses_halves() => Work::Reuse,
                        Action::Full | Action::Asc => Work::Full,
                        Action::WaRs | Action::WaRsAsc => Work::Window,
                        Action::Ast => Work::Reuse,
                    };
                    let half = planned.uses_halves() && batched && halves;
                    prop_assert_eq!((got.work, got.rows == Rows::Half), (work, half));
                }
                client.place += 1;
            }
            prop_assert_eq!(bench.process.bytes(), 0);
        }
        for counter in ["misses", "discontinuities", "contested", "collisions", "unplanned", "dense_steps"] {
            prop_assert_eq!(bench.get(counter), 0, "{}", counter);
        }
        prop_assert_eq!(bench.get("generations"), 2);
    }

    /// The same, with several requests whose layers interleave: as if each were alone.
    #[test]
    fn requests_in_flight_at_once_do_not_disturb_one_another(
        plan in plan(), order in prop::collection::vec((0usize..4, 1usize..4), 1..120)
    ) {
        let mut bench = Bench::new(plan, 1 << 40);
        let layers = bench.plan.layers();
        let mut clients: Vec<Client> = (0..4).map(|i| Client::new(100 + i as i64, i, 2)).collect();
        let mut open: Vec<Option<(Open, usize)>> = (0..4).map(|_| None).collect();
        for (who, work) in order {
            let client = &mut clients[who];
            if open[who].is_none() {
                if client.place >= bench.places() {
                    client.restart(0);
                }
                open[who] = Some((bench.begin(client, |_| {}), 0));
                continue;
            }
            let (run, done) = open[who].as_mut().expect("just checked");
            let until = (*done + work).min(layers);
            bench.layers(run, client, *done..until);
            *done = until;
            if until == layers {
                client.last = Some(client.place);
                client.place += 1;
                open[who] = None;
            }
        }
        for counter in ["misses", "discontinuities", "collisions", "recomputes"] {
            prop_assert_eq!(bench.get(counter), 0, "{}", counter);
        }
    }
}

// ---- anonymous runs ---------------------------------------------------------------------------------------------------

/// A stand-in for noise: deterministic, in [-1, 1).
fn noise(seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..300)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Latents on the way from noise to an image. The schedule fixes how much noise is left at a step, whoever runs it.
#[derive(Clone, Debug)]
struct Picture {
    seed: u64,
    prompt: u64,
    /// Moves the image a little, as guidance does.
    guidance: f32,
    /// The step at which the generation starts, from the image of `init` and noise.
    first: usize,
    init: u64,
}

impl Picture {
    fn new(seed: u64, prompt: u64) -> Picture {
        Picture {
            seed,
            prompt,
            guidance: 0.0,
            first: 0,
            init: 0,
        }
    }

    fn signature(&self, step: usize) -> RunSignature {
        let steps = 20;
        let noise_left = 1.0 - step as f32 / steps as f32;
        // Until it has moved, a generation that starts midway has the image it was given.
        let own = (step - self.first.min(step)) as f32 / steps as f32;
        let (from, given) = (noise(self.seed), noise(50 + self.init));
        let (image, meaning) = (noise(60 + self.prompt), noise(70 + self.prompt));
        let latents: Vec<f32> = (0..from.len())
            .map(|i| {
                let target = image[i] + self.guidance * meaning[i];
                let start = if self.first > 0 { given[i] } else { target };
                let image = start + own * (target - start);
                noise_left * from[i] + (1.0 - noise_left) * image
            })
            .collect();
        let bytes: Vec<u8> = latents.iter().flat_map(|x| x.to_le_bytes()).collect();
        let prompt = self.prompt.to_le_bytes();
        let feed = |bytes, values| Feed {
            dims: &[],
            element: 1,
            bytes: Some(bytes),
            values,
        };
        let latents = feed(&bytes[..], Values::F32(&latents));
        RunSignature::new(latents, &[feed(&prompt[..], Values::Other)], 2).expect("memory")
    }
}

fn picture() -> impl Strategy<Value = Picture> {
    // Few seeds, prompts and images, so that clients share most of them; guidance that differs by a hair or a lot.
    let guidance = prop::sample::select(vec![0.0f32, 0.001, 0.1, 0.11, 1.0]);
    let first = prop::sample::select(vec![0usize, 0, 0, 1, 2]);
    (0u64..2, 0u64..2, guidance, first, 0u64..2).prop_map(
        |(seed, prompt, guidance, first, init)| Picture {
            seed,
            prompt,
            guidance,
            first,
            init,
        },
    )
}

/// The unconditional run of a step has the same latents and another prompt.
fn with_branch(mut signature: RunSignature, branch: usize) -> RunSignature {
    if branch == 1 {
        let bytes = [branch as u8];
        let nothing = Feed {
            dims: &[],
            element: 1,
            bytes: Some(&bytes),
            values: Values::Other,
        };
        let other = RunSignature::new(nothing, &[nothing], 1).expect("memory");
        signature.conditioning = other.conditioning;
    }
    signature
}

/// Two generations whose latents and conditioning are equal at every step so far are one: their caches are equal too.
/// Unconditional runs (branch 1) have the same conditioning whatever the prompt.
fn same_so_far(a: &Picture, b: &Picture, step: usize, branch: usize) -> bool {
    let shown = |picture: &Picture, s| with_branch(picture.signature(s), branch);
    a.first == b.first && (a.first..=step).all(|s| shown(a, s) == shown(b, s))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 768, ..ProptestConfig::default() })]

    /// Whatever anonymous clients do, nobody is served from another's caches.
    #[test]
    fn anonymous_generations_never_mix(
        plan in plan(),
        pictures in prop::collection::vec(picture(), 2..4),
        order in prop::collection::vec((0usize..4, prop::bool::weighted(0.1)), 1..80),
    ) {
        // Without a list, a generation whose first run vanished looks like one that starts later, and one client's start
        // over may go unnoticed: its generations may meet, but clients must not.
        let listed = plan.timesteps.is_some();
        let mut bench = Bench::new(plan, 1 << 40);
        let layers = bench.plan.layers();
        let per_step = bench.runs_per_step();
        let steps = bench.plan.step_count();
        // Without a list nobody can start midway.
        let first = |who: usize| if listed { pictures[who].first.min(steps - 1) * per_step } else { 0 };
        let pictures: Vec<Picture> = pictures
            .iter()
            .enumerate()
            .map(|(who, picture)| {
                let first = first(who) / per_step;
                // Who starts midway with the noise of another's generation, at its next step and with its prompt, looks
                // like that step: only dfa_start or a request id can tell.
                let seed = if first > 0 { 10 + who as u64 } else { picture.seed };
                Picture { first, seed, ..picture.clone() }
            })
            .collect();
        let mut places: Vec<usize> = (0..pictures.len()).map(first).collect();
        let mut generations = vec![0usize; pictures.len()];
        for (who, vanish) in order {
            let who = who % pictures.len();
            if places[who] >= bench.places() {
                places[who] = pictures[who].first * per_step;
                generations[who] += 1;
            }
            let place = places[who];
            let mut client = Client::new(0, who, 2);
            client.generation = generations[who];
            client.place = place;
            let picture = &pictures[who];
            // The other branch has another prompt.
            let signature = with_branch(picture.signature(place / per_step), place % per_step);
            let open = bench.begin(&client, |call| call.signature = Some(signature));
            for layer in 0..if vanish && listed { layers - 1 } else { layers } {
                let directive = open.run.directive(layer).expect("layer");
                let served = match directive.work {
                    Work::Full => None,
                    Work::Window => Some(open.run.residual(layer).expect("promised").tensor),
                    Work::Reuse => Some(open.run.output(layer, 0).expect("promised")),
                };
                if let Some(tensor) = served {
                    let from = tensor.maker;
                    // What was made before two pictures part is of both.
                    let made_at = from.place / per_step;
                    let twins = same_so_far(
                        &pictures[from.client], &pictures[who], made_at, from.place % per_step,
                    );
                    prop_assert!(
                        from.client == who && (from.generation == generations[who] || !listed) || twins,
                        "client {} at {} was served what client {} made at {}",
                        who, place, from.client, from.place
                    );
                }
                let make = |kind| open.run.reserve(UNIT).map(|lease| Arc::new(Symbol {
                    maker: open.maker, layer, kind, _lease: lease,
                }));
                if directive.capture && let Some(tensor) = make(Kind::Residual) {
                    open.run.capture(layer, tensor, directive.rows);
                }
                let output = directive.keep.then(|| make(Kind::Output)).flatten();
                open.run.finish(layer, 0, 1, output);
            }
            places[who] += 1;
        }
    }

    /// One anonymous client alone, generation after generation: served as planned.
    #[test]
    fn a_lone_anonymous_client_is_served(plan in plan(), picture in picture()) {
        let mut bench = Bench::new(plan, 1 << 40);
        let per_step = bench.runs_per_step();
        for _ in 0..3 {
            let mut client = Client::new(0, 0, 2);
            let picture = Picture { first: 0, ..picture.clone() };
            while client.place < bench.places() {
                let step = client.place / per_step;
                let signature = picture.signature(step);
                let signature = with_branch(signature, client.place % per_step);
                bench.complete(&mut client, |call| call.signature = Some(signature));
                client.place += 1;
            }
        }
        prop_assert_eq!(bench.get("contested"), 0);
        prop_assert_eq!(bench.get("generations"), 3);
    }
}

// ---- single behaviours ------------------------------------------------------------------------------------------------

use Action::{Asc, Ast, Full, WaRs, WaRsAsc};

fn bench(cfg: Cfg, rows: &[&[Action]]) -> Bench {
    let plan = Plan {
        cfg,
        timesteps: Some((0..rows.len()).map(|i| 900.0 - 50.0 * i as f64).collect()),
        steps: rows.iter().map(|row| row.to_vec()).collect(),
        ..Plan::all_full(1, 1)
    };
    Bench::new(plan, 1 << 40)
}

fn works(open: &Open, layers: usize) -> Vec<Work> {
    (0..layers)
        .map(|layer| open.run.directive(layer).expect("layer").work)
        .collect()
}

#[test]
fn a_lost_output_keeps_the_residual_of_the_plan() {
    // The output of step 1 does not fit the budget; the residual of step 0 does.
    let mut b = bench(Cfg::None, &[&[Full], &[WaRs], &[Ast], &[WaRs]]);
    let mut client = Client::new(1, 0, 2);
    b.complete(&mut client, |_| {});
    client.place = 1;
    let open = b.begin(&client, |_| {});
    // The layer keeps nothing, as if the budget had refused it.
    open.run.finish(0, 0, 1, None);
    client.place = 2;
    client.last = Some(1);
    let third = b.begin(&client, |_| {});
    let directive = third.run.directive(0).expect("layer");
    assert_eq!((directive.work, directive.capture), (Work::Full, false));
    third.run.finish(0, 0, 1, None);
    client.place = 3;
    let fourth = b.begin(&client, |_| {});
    let residual = fourth.run.residual(0).expect("R of step 0");
    assert_eq!(residual.tensor.maker.place, 0);
    assert_eq!(b.get("misses"), 1);
}

#[test]
fn a_refresh_that_could_not_be_kept_leaves_no_stale_residual() {
    let mut b = bench(Cfg::None, &[&[Full], &[WaRs], &[Full], &[WaRs]]);
    let mut client = Client::new(1, 0, 2);
    b.complete(&mut client, |_| {});
    client.place = 1;
    b.complete(&mut client, |_| {});
    client.place = 2;
    let open = b.begin(&client, |_| {});
    open.run.finish(0, 0, 1, None);
    client.place = 3;
    let open = b.begin(&client, |_| {});
    assert_eq!(works(&open, 1), [Work::Full]);
}

#[test]
fn a_second_run_of_the_same_request_is_dense_and_does_not_disturb_the_first() {
    let mut b = bench(Cfg::None, &[&[Full, Full], &[Ast, WaRs], &[Ast, Ast]]);
    let mut client = Client::new(1, 0, 2);
    b.complete(&mut client, |_| {});
    client.place = 1;
    let mut first = b.begin(&client, |_| {});
    let second = b.begin(&client, |_| {});
    assert_eq!(works(&second, 2), [Work::Full, Work::Full]);
    b.layers(&mut first, &mut client, 0..1);
    for layer in 0..2 {
        second.run.finish(layer, 0, 1, None);
    }
    b.layers(&mut first, &mut client, 1..2);
    assert_eq!(first.served, 2);
    client.last = Some(1);
    client.place = 2;
    let third = b.complete(&mut client, |_| {});
    assert_eq!(third.served, 2);
    assert_eq!((b.get("collisions"), b.get("aborted")), (1, 0));
}

#[test]
fn a_run_that_vanished_is_found_dead_by_the_next_one_that_completes() {
    let mut b = bench(Cfg::None, &[&[Full, Full], &[Ast, WaRs], &[Ast, Ast]]);
    let mut client = Client::new(1, 0, 2);
    b.complete(&mut client, |_| {});
    client.place = 1;
    let mut vanished = b.begin(&client, |_| {});
    b.layers(&mut vanished, &mut client.clone(), 0..1);
    client.latest.clear();
    let retry = b.complete(&mut client, |_| {});
    assert_eq!(works(&retry, 2), [Work::Full, Work::Full]);
    client.place = 2;
    let next = b.complete(&mut client, |_| {});
    assert_eq!(next.served, 2, "the retry kept what the next step needs");
    assert_eq!((b.get("collisions"), b.get("aborted")), (1, 1));
    // The dead run's ticket holds for a while, in case it is only slow, and then no more.
    assert!(b.process.run(vanished.run.ticket()).is_ok());
    b.clock.fetch_add(61_000, Ordering::Relaxed);
    client.restart(0);
    b.complete(&mut client, |_| {});
    assert!(b.process.run(vanished.run.ticket()).is_err());
    assert_eq!(b.process.runs_in_flight(), 0);
}

#[test]
fn an_anonymous_generation_that_was_cut_off_does_not_cost_the_next_one() {
    for (cut, same_seed) in [(0, false), (0, true), (2, false)] {
        let rows: Vec<&[Action]> = vec![&[Full], &[Ast], &[WaRs], &[Ast], &[WaRs], &[Ast]];
        let mut b = bench(Cfg::None, &rows);
        let first = Picture::new(1, 0);
        let second = Picture::new(if same_seed { 1 } else { 2 }, 0);
        let mut client = Client::new(0, 0, 2);
        for place in 0..cut {
            client.place = place;
            b.complete(&mut client, |call| {
                call.signature = Some(first.signature(place))
            });
        }
        client.place = cut;
        b.begin(&client, |call| call.signature = Some(first.signature(cut)));
        client.restart(0);
        for place in 0..rows.len() {
            client.place = place;
            let open = b.complete(&mut client, |call| {
                call.signature = Some(second.signature(place))
            });
            assert_eq!(
                open.served,
                usize::from(place > 0),
                "cut at {cut}, step {place}"
            );
        }
        assert_eq!((b.get("contested"), b.get("aborted")), (0, 1));
    }
}

#[test]
fn a_slow_run_that_was_taken_for_dead_still_finishes() {
    let mut b = bench(Cfg::None, &[&[Full, Full], &[Ast, WaRs], &[Ast, Ast]]);
    let mut client = Client::new(1, 0, 2);
    b.complete(&mut client, |_| {});
    client.place = 1;
    let slow = b.begin(&client, |_| {});
    let mut other = client.clone();
    other.latest.clear();
    b.complete(&mut other, |_| {});
    assert_eq!(works(&slow, 2), [Work::Reuse, Work::Window]);
    assert!(slow.run.output(0, 0).is_some(), "its output is still there");
    assert!(
        slow.run.residual(1).is_none(),
        "its residual went: the layer computes in full"
    );
    slow.run.finish(0, 0, 1, None);
    slow.run.finish(1, 0, 1, None);
    other.place = 2;
    assert_eq!(b.complete(&mut other, |_| {}).served, 2);
}

#[test]
fn start_takes_a_request_away_from_a_run_in_flight() {
    let mut b = bench(Cfg::None, &[&[Full], &[Ast]]);
    let mut client = Client::new(1, 0, 2);
    let old = b.begin(&client, |_| {});
    client.generation = 1;
    b.complete(&mut client, |call| call.start = true);
    old.run.finish(0, 0, 1, None);
    client.place = 1;
    assert_eq!(b.complete(&mut client, |_| {}).served, 1);
    assert_eq!(b.get("collisions"), 0);
}

#[test]
fn end_forgets_the_request() {
    let mut b = bench(Cfg::None, &[&[Full], &[Ast], &[Ast]]);
    let mut client = Client::new(1, 0, 2);
    b.complete(&mut client, |_| {});
    assert_eq!(b.session.live_requests(), 1);
    client.place = 1;
    b.complete(&mut client, |call| call.end = true);
    assert_eq!((b.session.live_requests(), b.process.bytes()), (0, 0));
}

#[test]
fn idle_requests_are_forgotten() {
    let mut b = bench(Cfg::None, &[&[Full], &[Ast], &[Ast]]);
    for id in 1..100 {
        b.complete(&mut Client::new(id, 0, 2), |_| {});
    }
    assert_eq!(b.session.live_requests(), 99);
    b.clock.fetch_add(1_000_001, Ordering::Relaxed);
    b.complete(&mut Client::new(1000, 0, 2), |_| {});
    assert_eq!((b.session.live_requests(), b.get("idle_reclaims")), (1, 99));
    assert_eq!(b.process.bytes(), UNIT as u64);
}

#[test]
fn abandoned_requests_make_room_for_working_ones() {
    let mut b = bench(Cfg::None, &[&[Full], &[Ast], &[WaRs], &[Ast]]);
    b.process = Process::new(
        Limits {
            bytes: 3 * UNIT as u64,
            idle_ms: 1_000_000,
        },
        || 0,
    );
    let clock = Arc::clone(&b.clock);
    let limits = Limits {
        bytes: 2 * UNIT as u64,
        idle_ms: 1_000_000,
    };
    b.process = Process::new(limits, move || clock.load(Ordering::Relaxed));
    let compiled_plan = CompiledPlan::new(b.plan.clone(), &[]);
    b.session = Session::new(
        Arc::clone(&b.process),
        compiled_plan,
        SchedulePolicy::Planned,
    );
    // One request fills the budget and is abandoned.
    b.complete(&mut Client::new(1, 0, 2), |_| {});
    assert_eq!(b.process.bytes(), 2 * UNIT as u64);
    // The next one has to go without at first, since the other may be at work, and then takes its place.
    let mut client = Client::new(2, 1, 2);
    b.complete(&mut client, |_| {});
    assert_eq!(b.get("evictions"), 0);
    client.latest.clear();
    client.place = 1;
    b.complete(&mut client, |_| {});
    assert_eq!(b.get("evictions"), 1);
    client.place = 2;
    assert_eq!(b.complete(&mut client, |_| {}).served, 1);
}

#[test]
fn the_number_of_requests_is_bounded() {
    let mut b = bench(Cfg::None, &[&[Full], &[Full]]);
    for id in 1..=5000 {
        b.complete(&mut Client::new(id, 0, 2), |_| {});
    }
    assert_eq!(b.session.live_requests(), 4096);
}

#[test]
fn the_second_run_of_a_first_step_takes_nothing_unless_the_request_has_an_id() {
    for (id, expected) in [(0, Work::Full), (7, Work::Reuse)] {
        let mut b = bench(Cfg::Separate, &[&[Asc], &[WaRsAsc]]);
        let picture = Picture::new(1, 0);
        let mut client = Client::new(id, 0, 1);
        let first = picture.signature(0);
        b.complete(&mut client, |call| call.signature = Some(first.clone()));
        client.place = 1;
        let second = with_branch(first, 1);
        let open = b.begin(&client, |call| call.signature = Some(second));
        assert_eq!(works(&open, 1), [expected]);
    }
}

#[test]
fn a_layer_with_two_sinks_is_kept_when_both_are() {
    let mut b = bench(Cfg::None, &[&[Full], &[Ast]]);
    let mut client = Client::new(1, 0, 2);
    let open = b.begin(&client, |_| {});
    let make = || {
        let lease = open.run.reserve(UNIT).expect("room");
        Arc::new(Symbol {
            maker: open.maker,
            layer: 0,
            kind: Kind::Output,
            _lease: lease,
        })
    };
    open.run.finish(0, 1, 2, Some(make()));
    assert_eq!(b.process.runs_in_flight(), 1);
    open.run.finish(0, 0, 2, Some(make()));
    assert_eq!(b.process.runs_in_flight(), 0);
    client.place = 1;
    let next = b.begin(&client, |_| {});
    assert!(next.run.skips(0));
    assert!(next.run.output(0, 0).is_some() && next.run.output(0, 1).is_some());
}

#[test]
fn tickets_cannot_be_made_up() {
    let mut b = bench(Cfg::None, &[&[Full]]);
    let open = b.begin(&Client::new(1, 0, 2), |_| {});
    let [id, check] = open.run.ticket();
    for forged in [
        [id, check ^ 1],
        [id + 1, check],
        [0, 0],
        [-1, -1],
        [i64::MIN, i64::MAX],
    ] {
        assert!(b.process.run(forged).is_err(), "{forged:?}");
    }
    open.run.finish(0, 0, 1, None);
    assert!(b.process.run([id, check]).is_err(), "finished");
}

#[test]
fn resetting_zeroes_the_counters_and_nothing_else() {
    let mut b = bench(Cfg::None, &[&[Full], &[Ast], &[Ast]]);
    let mut client = Client::new(1, 0, 2);
    b.complete(&mut client, |_| {});
    client.place = 1;
    let mut open = b.begin(&client, |_| {});
    b.process.reset();
    assert_eq!(b.get("steps"), 0);
    b.layers(&mut open, &mut client, 0..1);
    assert_eq!(open.served, 1);
    assert_eq!(
        (b.session.live_requests(), b.process.bytes()),
        (1, UNIT as u64)
    );
    client.last = Some(1);
    client.place = 2;
    b.process.reset();
    assert_eq!(b.complete(&mut client, |_| {}).served, 1);
    assert_eq!((b.get("steps"), b.get("layers_reused")), (1, 1));
}

#[test]
fn threads_share_a_session() {
    let rows: Vec<&[Action]> = vec![&[Full, Full], &[Ast, WaRs], &[WaRs, Ast], &[Ast, Ast]];
    let b = bench(Cfg::None, &rows);
    std::thread::scope(|scope| {
        for id in 1..=8 {
            let (session, process, clock, plan) = (
                Arc::clone(&b.session),
                Arc::clone(&b.process),
                Arc::clone(&b.clock),
                b.plan.clone(),
            );
            scope.spawn(move || {
                let mut own = Bench {
                    session,
                    process,
                    clock,
                    plan,
                    runs: id as usize * 1_000_000,
                };
                let mut client = Client::new(id, id as usize, 2);
                for _ in 0..50 {
                    client.restart(0);
                    while client.place < own.places() {
                        own.complete(&mut client, |_| {});
                        client.place += 1;
                    }
                }
            });
        }
    });
    assert_eq!(b.get("steps"), 8 * 50 * 4);
    assert_eq!(
        (b.get("misses"), b.get("collisions"), b.process.bytes()),
        (0, 0, 0)
    );
}
