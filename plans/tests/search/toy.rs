//! A diffusion transformer of a few numbers, with real residuals, shared outputs and halves.
//!
//! One implementation of its arithmetic, two ways to run it: [`Toy`] from the start at every
//! call, [`Resuming`] only what differs from the base, checking on the way that the search keeps
//! its promises.

use ditfastattn_plans::{Action, Cfg, Denoiser, Forward, Trial};

/// Both halves of guidance, three channels each.
pub type State = [f32; 6];

/// A call to the toy: the step, the row and what for.
pub type Call = (usize, Vec<Action>, &'static str);

#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub layers: usize,
    pub steps: usize,
    pub samples: usize,
    pub seed: u32,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cache {
    pub residual: Option<State>,
    pub output: Option<State>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Toy {
    pub sizes: Shape,
    pub cfg: Cfg,
    /// Per sample.
    pub latents: Vec<State>,
    /// Per sample and layer.
    pub caches: Vec<Vec<Cache>>,
    pub calls: Vec<Call>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub layers: usize,
    pub steps: usize,
    pub seed: u32,
}

/// A number in −1..1 that depends on all arguments.
fn hash(seed: u32, a: usize, b: usize) -> f32 {
    let mut x = seed ^ (a as u32).wrapping_mul(0x9E37_79B9) ^ (b as u32).wrapping_mul(0x85EB_CA6B);
    for _ in 0..3 {
        x ^= x >> 15;
        x = x.wrapping_mul(0x2C1B_3C6D);
        x ^= x >> 12;
    }
    x as f32 / u32::MAX as f32 * 2.0 - 1.0
}

fn map2(a: State, b: State, f: impl Fn(f32, f32) -> f32) -> State {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Toy {
    pub fn new(sizes: Sizes, cfg: Cfg) -> Toy {
        let latent = |sample| std::array::from_fn(|i| hash(sizes.seed, 1000 + sample, i));
        Toy {
            sizes: Shape {
                layers: sizes.layers,
                steps: sizes.steps,
                seed: sizes.seed,
            },
            cfg,
            latents: (0..sizes.samples).map(latent).collect(),
            caches: vec![vec![Cache::default(); sizes.layers]; sizes.samples],
            calls: Vec::new(),
        }
    }

    /// The layer's dense output and the part of it that lies inside the band.
    fn attention(&self, step: usize, layer: usize, x: State) -> (State, State) {
        let t = step as f32 / self.sizes.steps as f32;
        let gain = 1.0 + hash(self.sizes.seed, layer, 77);
        let o = std::array::from_fn(|i| {
            let mixed = x[i] + 0.5 * x[(i + 1) % 3 + i / 3 * 3];
            (gain * mixed + 0.3 * t + hash(self.sizes.seed, layer, i)).tanh()
        });
        let w = std::array::from_fn(|i| o[i] * (0.8 + 0.1 * (x[i] * 3.0 + t).sin()));
        (o, w)
    }

    /// The conditional half in both halves.
    fn halved(&self, x: State) -> State {
        match self.cfg {
            Cfg::UncondFirst => [x[3], x[4], x[5], x[3], x[4], x[5]],
            _ => [x[0], x[1], x[2], x[0], x[1], x[2]],
        }
    }

    /// One layer: its next hidden state and the cache after it.
    pub fn layer(
        &self,
        step: usize,
        layer: usize,
        action: Action,
        x: State,
        cache: &Cache,
    ) -> (State, Cache) {
        let (o, w) = self.attention(step, layer, x);
        let residual = map2(o, w, |o, w| o - w);
        let old = || cache.residual.expect("a residual of an earlier step");
        let (out, residual) = match action {
            Action::Full => (o, Some(residual)),
            Action::Asc => (self.halved(o), Some(self.halved(residual))),
            Action::WaRs => (map2(w, old(), |w, r| w + r), cache.residual),
            Action::WaRsAsc => (self.halved(map2(w, old(), |w, r| w + r)), cache.residual),
            Action::Ast => (
                cache.output.expect("an output of an earlier step"),
                cache.residual,
            ),
        };
        let gate = 0.4 + 0.1 * hash(self.sizes.seed, layer, step + 500);
        let cache = Cache {
            residual,
            output: Some(out),
        };
        (map2(x, out, |x, o| x + gate * o), cache)
    }

    fn run(&self, step: usize, row: &[Action]) -> (Vec<State>, Vec<Vec<Cache>>) {
        let samples = self.latents.iter().zip(&self.caches);
        samples
            .map(|(latent, caches)| {
                let mut x = *latent;
                let mut after = Vec::new();
                for (layer, (action, cache)) in row.iter().zip(caches).enumerate() {
                    let (next, cache) = self.layer(step, layer, *action, x, cache);
                    x = next;
                    after.push(cache);
                }
                (x, after)
            })
            .unzip()
    }

    pub fn output(&self, step: usize, row: &[Action]) -> Vec<Vec<f32>> {
        let (outputs, _) = self.run(step, row);
        outputs.into_iter().map(|x| x.to_vec()).collect()
    }

    pub fn advance(&mut self, step: usize, row: &[Action]) {
        let (outputs, caches) = self.run(step, row);
        self.caches = caches;
        for (latent, noise) in self.latents.iter_mut().zip(outputs) {
            *latent = map2(*latent, noise, |x, n| x - 0.15 * n);
        }
    }

    fn forward(&mut self, step: usize, row: Vec<Action>, what: &'static str) -> Forward {
        let samples = self.output(step, &row);
        self.calls.push((step, row, what));
        Forward {
            samples,
            forwards: 1.0,
        }
    }
}

impl Denoiser for Toy {
    type Error = std::convert::Infallible;

    fn base(&mut self, step: usize, chosen: &[Action]) -> Result<Forward, Self::Error> {
        let mut row = chosen.to_vec();
        row.resize(self.sizes.layers, Action::Full);
        Ok(self.forward(step, row, "base"))
    }

    fn trial(&mut self, trial: &Trial<'_>) -> Result<Forward, Self::Error> {
        let row = trial.row(self.sizes.layers);
        Ok(self.forward(trial.step, row, "trial"))
    }

    fn commit(&mut self, step: usize, row: &[Action]) -> Result<f64, Self::Error> {
        self.calls.push((step, row.to_vec(), "commit"));
        self.advance(step, row);
        Ok(1.0)
    }
}

/// What one run of a step left: the row, what went into each layer and what came out at last,
/// per sample, and the caches it would leave behind.
#[derive(Clone)]
struct Run {
    step: usize,
    row: Vec<Action>,
    inputs: Vec<Vec<State>>,
    caches: Vec<Vec<Cache>>,
}

/// Runs only the layers that differ from the base.
pub struct Resuming {
    pub toy: Toy,
    base: Option<Run>,
    latest: Option<Run>,
}

impl Resuming {
    pub fn new(toy: Toy) -> Resuming {
        Resuming {
            toy,
            base: None,
            latest: None,
        }
    }

    /// Runs a row from `layer` on, on top of `inputs[..=layer]` and `caches[..layer]`.
    fn run(&mut self, step: usize, row: Vec<Action>, from: Option<(&Run, usize)>) -> (Run, f64) {
        let layers = row.len();
        let first = from.map_or(0, |(_, layer)| layer);
        let mut run = Run {
            step,
            row,
            inputs: Vec::new(),
            caches: Vec::new(),
        };
        for sample in 0..self.toy.latents.len() {
            let (mut inputs, mut caches) = match from {
                Some((base, layer)) => (
                    base.inputs[sample][..=layer].to_vec(),
                    base.caches[sample][..layer].to_vec(),
                ),
                None => (vec![self.toy.latents[sample]], Vec::new()),
            };
            for layer in first..layers {
                let (action, x) = (run.row[layer], inputs[layer]);
                let cache = &self.toy.caches[sample][layer];
                let (next, cache) = self.toy.layer(step, layer, action, x, cache);
                inputs.push(next);
                caches.push(cache);
            }
            run.inputs.push(inputs);
            run.caches.push(caches);
        }
        (run, (layers - first) as f64 / layers as f64)
    }

    fn forward(run: &Run, forwards: f64) -> Forward {
        let last = |inputs: &Vec<State>| inputs[run.row.len()].to_vec();
        Forward {
            samples: run.inputs.iter().map(last).collect(),
            forwards,
        }
    }
}

impl Denoiser for Resuming {
    type Error = std::convert::Infallible;

    fn base(&mut self, step: usize, chosen: &[Action]) -> Result<Forward, Self::Error> {
        let mut row = chosen.to_vec();
        row.resize(self.toy.sizes.layers, Action::Full);
        let (run, forwards) = self.run(step, row, None);
        let forward = Resuming::forward(&run, forwards);
        self.base = Some(run);
        self.latest = None;
        Ok(forward)
    }

    fn trial(&mut self, trial: &Trial<'_>) -> Result<Forward, Self::Error> {
        let base = self.base.take().expect("a base comes before every trial");
        assert_eq!(base.step, trial.step);
        assert_eq!(&base.row[..trial.layer()], trial.prefix);
        let rest = &base.row[trial.layer()..];
        assert!(rest.iter().all(|action| *action == Action::Full));
        let row = trial.row(base.row.len());
        let (run, forwards) = self.run(trial.step, row, Some((&base, trial.layer())));
        let forward = Resuming::forward(&run, forwards);
        self.base = Some(base);
        self.latest = Some(run);
        Ok(forward)
    }

    fn accept(&mut self, trial: &Trial<'_>) -> Result<f64, Self::Error> {
        let run = self
            .latest
            .take()
            .expect("a trial comes before accepting it");
        assert_eq!(run.row, trial.row(run.row.len()));
        self.base = Some(run);
        Ok(0.0)
    }

    fn commit(&mut self, step: usize, row: &[Action]) -> Result<f64, Self::Error> {
        let base = self.base.take().filter(|b| b.step == step && b.row == row);
        let (run, forwards) = match base {
            Some(run) => (run, 0.0),
            None => self.run(step, row.to_vec(), None),
        };
        self.toy.caches = run.caches;
        for (latent, inputs) in self.toy.latents.iter_mut().zip(run.inputs) {
            *latent = map2(*latent, inputs[row.len()], |x, n| x - 0.15 * n);
        }
        Ok(forwards)
    }
}
