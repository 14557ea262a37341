//! Anonymous clients that share everything but one thing, whatever it is: nobody gets another's cache.
//!
//! Latents are no help here: clients of one seed have the same ones, or are a hair apart. Each keeps what its runs were fed;
//! a tensor may come from another client only if both were fed the same bytes since their generations began.

use super::*;

/// An input of the model besides timestep and latents.
#[derive(Clone, Copy, Debug)]
enum Input {
    Bytes(usize),
    /// A number per row that stays, such as a guidance scale.
    Scale(f32),
    /// The planned timestep after the one that is fed, or before it.
    Next,
    Last,
    /// A schedule of its own: this factor per step.
    Decay(f32),
    /// Strings.
    Unreadable,
}

/// What makes a client another one.
#[derive(Clone, Copy, Debug)]
enum Difference {
    None,
    /// Of this input one byte (at this part of it), its shape or its type; of schedules, one of their values.
    Byte(usize, f64),
    Shape(usize),
    Type(usize),
    /// The timestep, within the schedule's tolerance.
    Timestep,
    /// The image, by a hair or a lot: guidance that the model is not fed.
    Image(f32),
}

/// How a client runs its steps.
#[derive(Clone, Copy, Debug)]
enum Habit {
    Plain,
    /// From this step on there is one row, and no unconditional half.
    GuidanceOff(usize),
    /// Every step but the first is evaluated twice.
    Heun,
    /// This step is left out.
    Skip(usize),
}

#[derive(Clone, Debug)]
struct Person {
    seed: u64,
    difference: Difference,
    habit: Habit,
}

/// What is fed for one input: bytes, numbers, shape and type.
struct Fed1 {
    bytes: Option<Vec<u8>>,
    numbers: Option<Vec<f32>>,
    dims: Vec<usize>,
    element: u32,
}

impl Input {
    fn fed(&self, index: usize, person: &Person, plan: &Plan, step: usize, rows: usize) -> Fed1 {
        let listed = |at: Option<usize>, end: f64| {
            let list = plan.timesteps.as_ref();
            at.and_then(|at| list.and_then(|list| list.get(at)).copied())
                .unwrap_or(end) as f32
        };
        let differs = |kind: fn(usize) -> Difference| {
            std::mem::discriminant(&kind(index)) == std::mem::discriminant(&person.difference)
                && match person.difference {
                    Difference::Byte(i, _) | Difference::Shape(i) | Difference::Type(i) => {
                        i == index
                    }
                    _ => false,
                }
        };
        let other = differs(|i| Difference::Byte(i, 0.0));
        let numbers = match *self {
            Input::Scale(x) => Some(vec![if other { x.next_up() } else { x }; rows]),
            Input::Next | Input::Last => {
                let x = match self {
                    Input::Next => listed(Some(step + 1), 0.0),
                    _ => listed(step.checked_sub(1), 1100.0),
                };
                Some(vec![if other { x * 1.0001 + 0.01 } else { x }; rows])
            }
            Input::Decay(factor) => {
                let factor = if other { factor * 0.7 } else { factor };
                Some(vec![factor.powi(step as i32); rows])
            }
            _ => None,
        };
        let bytes = match (*self, &numbers) {
            (Input::Unreadable, _) => None,
            (Input::Bytes(len), _) => {
                let mut bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
                if let (true, Difference::Byte(_, part)) = (other, person.difference)
                    && len > 0
                {
                    bytes[((len - 1) as f64 * part) as usize] ^= 0x40;
                }
                Some(bytes)
            }
            (_, Some(numbers)) => Some(numbers.iter().flat_map(|x| x.to_le_bytes()).collect()),
            (_, None) => Some(Vec::new()),
        };
        let len = bytes.as_ref().map_or(3, Vec::len);
        Fed1 {
            bytes,
            numbers,
            dims: if differs(Difference::Shape) {
                vec![1, len]
            } else {
                vec![len]
            },
            element: if differs(Difference::Type) { 7 } else { 1 },
        }
    }
}

impl Person {
    /// What its run shows at a step. `again` is the second evaluation of a timestep.
    fn shows(
        &self,
        inputs: &[Input],
        plan: &Plan,
        (step, branch, again): (usize, usize, bool),
        timestep: f64,
    ) -> (RunSignature, FeedShapes) {
        let rows = match self.habit {
            Habit::GuidanceOff(at) if step >= at => 1,
            _ => 2,
        };
        let hair = match self.difference {
            Difference::Image(hair) => hair,
            _ => 0.0,
        };
        let steps = 12.0;
        let left = 1.0 - step as f32 / steps;
        let correction = if again { 0.004 } else { 0.0 };
        let (from, image, meaning) = (noise(self.seed), noise(60), noise(70));
        let latents: Vec<f32> = (0..from.len() * rows / 2)
            .map(|i| {
                let target = image[i] + (hair + correction) * meaning[i];
                left * from[i] + (1.0 - left) * target
            })
            .collect();
        let latent_bytes: Vec<u8> = latents.iter().flat_map(|x| x.to_le_bytes()).collect();
        let time = timestep.to_le_bytes();
        let mut fed: Vec<Fed1> = inputs
            .iter()
            .enumerate()
            .map(|(i, input)| input.fed(i, self, plan, step, rows))
            .collect();
        // The prompt of the branch.
        fed.push(Fed1 {
            bytes: Some(vec![branch as u8]),
            numbers: None,
            dims: vec![1],
            element: 1,
        });
        let feeds: Vec<Feed<'_>> = fed
            .iter()
            .map(|one| Feed {
                dims: &one.dims,
                element: one.element,
                bytes: one.bytes.as_deref(),
                values: one
                    .numbers
                    .as_ref()
                    .map_or(Values::Other, |n| Values::F32(n)),
            })
            .collect();
        let whole = |bytes, values| Feed {
            dims: &[],
            element: 1,
            bytes: Some(bytes),
            values,
        };
        let signature =
            RunSignature::new(whole(&latent_bytes, Values::F32(&latents)), &feeds, rows)
                .expect("memory")
                .with_timestep(&whole(&time, Values::Other));
        let shapes = fed.iter().map(|one| (one.element, one.dims.clone()));
        let shapes = FeedShapes([(1, vec![rows, 150])].into_iter().chain(shapes).collect());
        (signature, shapes)
    }

    /// The steps of a generation, and which of them are second evaluations.
    fn course(&self, steps: usize, free: bool) -> Vec<(usize, bool)> {
        let all = (0..steps).map(|step| (step, false));
        match self.habit {
            Habit::Heun if free => (0..steps)
                .flat_map(|step| [(step, false), (step, true)])
                .filter(|&(step, again)| step > 0 || !again)
                .collect(),
            Habit::Skip(at) if free => all.filter(|&(step, _)| step != at || at == 0).collect(),
            _ => all.collect(),
        }
    }
}

fn input() -> impl Strategy<Value = Input> {
    prop_oneof![
        3 => prop::sample::select(vec![0usize, 1, 7, 240, 5000]).prop_map(Input::Bytes),
        2 => prop::sample::select(vec![0.8f32, 3.5, 950.0, 0.0]).prop_map(Input::Scale),
        1 => Just(Input::Next),
        1 => Just(Input::Last),
        1 => prop::sample::select(vec![0.9f32, 0.5]).prop_map(Input::Decay),
    ]
}

fn person(inputs: usize) -> impl Strategy<Value = Person> {
    let difference = prop_oneof![
        1 => Just(Difference::None),
        4 => (0..inputs, 0.0f64..=1.0).prop_map(|(i, part)| Difference::Byte(i, part)),
        1 => (0..inputs).prop_map(Difference::Shape),
        1 => (0..inputs).prop_map(Difference::Type),
        1 => Just(Difference::Timestep),
        3 => prop::sample::select(vec![0.001f32, 0.05, 1.0]).prop_map(Difference::Image),
    ];
    let habit = prop_oneof![
        4 => Just(Habit::Plain),
        1 => (1usize..6).prop_map(Habit::GuidanceOff),
        2 => Just(Habit::Heun),
        1 => (1usize..6).prop_map(Habit::Skip),
    ];
    (0u64..2, difference, habit).prop_map(|(seed, difference, habit)| Person {
        seed,
        difference,
        habit,
    })
}

/// A client, or a run of nobody that is known, as a health check is.
#[derive(Clone, Copy, Debug)]
enum Turn {
    Of(usize),
    Vanishes(usize),
    Stranger(usize),
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let one = prop_oneof![
        12 => (0usize..3).prop_map(Turn::Of),
        1 => (0usize..3).prop_map(Turn::Vanishes),
        1 => (0usize..9).prop_map(Turn::Stranger),
    ];
    prop::collection::vec((one, 1usize..5), 1..60).prop_map(|turns| {
        // Whoever has a turn often has several.
        let repeated = turns
            .into_iter()
            .flat_map(|(turn, times)| vec![turn; times]);
        repeated.collect()
    })
}

/// One run of a generation.
struct Fact {
    /// Its number in the test.
    run: usize,
    place: usize,
    fed: RunSignature,
    /// Nothing was served: what it left follows from what it was fed.
    whole: bool,
}

/// Whether what `maker` made is `own` too: both were fed the same bytes from a run on that computed everything itself.
fn is_shared(own: &[Fact], others: &[Fact], maker: &Maker) -> bool {
    let Some(until) = others.iter().position(|fact| fact.run == maker.run) else {
        return false;
    };
    let from = others[..=until].iter().rposition(|fact| fact.whole);
    let theirs = &others[from.unwrap_or(0)..=until];
    own.windows(theirs.len()).any(|mine| {
        let mut pairs = mine.iter().zip(theirs);
        pairs.all(|(a, b)| (a.place, &a.fed) == (b.place, &b.fed))
    })
}

fn cases() -> u32 {
    let asked = std::env::var("DFA_STATE_CASES").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(768)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn whoever_differs_in_any_byte_of_any_input_never_gets_another_s_cache(
        plan in plan(),
        any in any::<bool>(),
        inputs in prop::collection::vec(input(), 1..5),
        unreadable in prop::bool::weighted(0.1),
        people in prop::collection::vec(person(5), 2..4),
        turns in turns(),
    ) {
        // Who takes on another's conditioning midway, of the same seed and at its next step, looks like that step.
        let people: Vec<Person> = people
            .into_iter()
            .enumerate()
            .map(|(who, person)| match person.habit {
                Habit::GuidanceOff(_) => Person { seed: 10 + who as u64, ..person },
                _ => person,
            })
            .collect();
        let mut inputs = inputs;
        if unreadable {
            inputs.push(Input::Unreadable);
        }
        let listed = plan.timesteps.is_some();
        let fed = if any && plan.one_way().is_ok() { SchedulePolicy::Any } else { SchedulePolicy::Planned };
        let mut bench = Bench::serving(plan.clone(), 1 << 40, fed);
        let per_step = bench.runs_per_step();
        // Places that are counted, and second runs, need clients that are orderly.
        let free = listed && per_step == 1;
        let mut courses: HashMap<(usize, usize), Vec<Fact>> = HashMap::new();
        let mut next = vec![0usize; people.len()];
        let mut generations = vec![0usize; people.len()];
        for (number, turn) in turns.into_iter().enumerate() {
            let (who, stranger) = match turn {
                Turn::Of(who) | Turn::Vanishes(who) => (who % people.len(), None),
                Turn::Stranger(at) => (100 + number, Some(at % plan.step_count())),
            };
            let own = stranger.map(|_| Person {
                seed: 1000 + number as u64,
                difference: Difference::Byte(0, 0.5),
                habit: Habit::Plain,
            });
            let person = own.as_ref().unwrap_or_else(|| &people[who]);
            let course = person.course(plan.step_count(), free);
            let (step, again, branch, generation) = match stranger {
                Some(step) => (step, false, 0, 0),
                None => {
                    if next[who] >= course.len() * per_step {
                        next[who] = 0;
                        generations[who] += 1;
                    }
                    let (step, again) = course[next[who] / per_step];
                    (step, again, next[who] % per_step, generations[who])
                }
            };
            let place = step * per_step + branch;
            let mut timestep = bench.timestep(place);
            if let Difference::Timestep = person.difference {
                timestep *= 1.00001;
            }
            let (signature, shapes) =
                person.shows(&inputs, &plan, (step, branch, again), timestep);
            let mut client = Client::new(0, who, 2);
            client.generation = generation;
            client.place = place;
            let shown = signature.clone();
            let open = bench.begin(&client, |call| {
                call.signature = Some(shown);
                call.shapes = shapes;
                call.timestep = Some(timestep);
            });
            let key = (who, generation);
            let whole = (0..bench.plan.layers())
                .all(|layer| open.run.directive(layer).is_ok_and(|d| d.work == Work::Full));
            courses.entry(key).or_default().push(Fact {
                run: open.maker.run,
                place,
                fed: signature,
                whole,
            });
            let vanishes = matches!(turn, Turn::Vanishes(_)) && free;
            let layers = bench.plan.layers() - usize::from(vanishes);
            for layer in 0..layers {
                let directive = open.run.directive(layer).expect("layer");
                let served = match directive.work {
                    Work::Full => None,
                    Work::Window => Some(open.run.residual(layer).expect("promised").tensor),
                    Work::Reuse => Some(open.run.output(layer, 0).expect("promised")),
                };
                if let Some(tensor) = served {
                    let from = tensor.maker;
                    let theirs = &courses[&(from.client, from.generation)];
                    prop_assert!(!unreadable, "served though an input cannot be read");
                    prop_assert!(
                        from.client == who && (from.generation == generation || !listed)
                            || is_shared(&courses[&key], theirs, &from),
                        "client {} in generation {} at {} was served what client {} made at {} in {}",
                        who, generation, place, from.client, from.place, from.generation
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
            if stranger.is_none() {
                next[who] += 1;
            }
        }
    }
}
