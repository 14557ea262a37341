//! What a plan costs, in multiply-accumulates (MACs), and what it saves.
//!
//! Two accountings, because the paper uses both: *matmul* counts QKᵀ and PV alone (its Figures 8
//! and 9), *module* adds the Q, K, V and output projections (its Table 2). A step that captures R
//! costs what a full one does: capture is one pass over the keys. What that means in seconds is in
//! `time`.

use crate::{Action, Plan};

/// The sizes that decide what a layer costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Tokens of a sequence, text included.
    pub tokens: usize,
    /// How many of them are text.
    pub text: usize,
    /// Channels of the hidden state (d); heads × head dim is taken to be the same.
    pub width: usize,
    /// Batch rows of a whole step, both halves of guidance included.
    pub rows: usize,
}

impl Workload {
    /// The band of this half-width holds every token pair, so that windowed actions compute what
    /// their full counterparts do.
    pub fn window_covers(&self, half_width: usize) -> bool {
        self.tokens.saturating_sub(self.text) <= half_width.saturating_add(1)
    }

    /// MACs of QKᵀ and PV in one dense layer at one step: 2·N²·d per row.
    pub fn matmul_macs(&self) -> f64 {
        let (n, d) = (self.tokens as f64, self.width as f64);
        2.0 * n * n * d * self.rows as f64
    }

    /// MACs of the projections in one dense layer at one step: 4·N·d² per row.
    pub fn projection_macs(&self) -> f64 {
        let (n, d) = (self.tokens as f64, self.width as f64);
        4.0 * n * d * d * self.rows as f64
    }
}

/// The sizes of one layer, for models whose layers differ (spatial and temporal layers, joint
/// attention with dual layers, grouped keys). `LayerWork::from(work)` is a layer in module form
/// with square projections.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerWork {
    /// Tokens, width and rows as this layer sees them. `width` is heads × head dim of the queries.
    pub work: Workload,
    /// MACs per token of the Q, K, V and output projections together: 4·d² if all four are d × d
    /// matrices. With a hidden state of width c and h_kv of h heads' keys and values:
    /// `2·c·d + 2·c·d·h_kv/h`. Two streams of equal width project each token once.
    pub projection_per_token: f64,
    /// ASC and AST spare the projections too. False in core form, where only softmax(QKᵀ)V is
    /// replaced.
    pub shares_projections: bool,
}

impl From<Workload> for LayerWork {
    fn from(work: Workload) -> LayerWork {
        let d = work.width as f64;
        LayerWork {
            work,
            projection_per_token: 4.0 * d * d,
            shares_projections: true,
        }
    }
}

impl LayerWork {
    /// MACs of the projections in this layer at one dense step.
    pub fn projection_macs(&self) -> f64 {
        self.projection_per_token * self.work.tokens as f64 * self.work.rows as f64
    }

    /// MACs of the whole module at one dense step.
    pub fn module_macs(&self) -> f64 {
        self.work.matmul_macs() + self.projection_macs()
    }

    /// Share of the projections' MACs that an action leaves.
    pub fn projection_share(&self, action: Action) -> f64 {
        match action {
            Action::Asc | Action::WaRsAsc if self.shares_projections => 0.5,
            Action::Ast if self.shares_projections => 0.0,
            _ => 1.0,
        }
    }

    /// Share of the module's MACs that an action leaves, with `density` of the pairs in the band.
    pub fn module_share(&self, action: Action, density: f64) -> f64 {
        let (matmul, projection) = (self.work.matmul_macs(), self.projection_macs());
        if matmul + projection == 0.0 {
            return action.matmul_share(1.0);
        }
        let rest =
            matmul * action.matmul_share(density) + projection * self.projection_share(action);
        rest / (matmul + projection)
    }
}

/// As many sizes as a plan has layers were expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the plan has {expected} layers, but sizes are given for {found}; give them for each layer"
)]
pub struct LayerCount {
    /// Layers of the plan.
    pub expected: usize,
    /// Sizes given.
    pub found: usize,
}

pub(crate) fn one_per_layer<T>(layers: usize, given: &[T]) -> Result<(), LayerCount> {
    let (expected, found) = (layers, given.len());
    match found == expected {
        true => Ok(()),
        false => Err(LayerCount { expected, found }),
    }
}

/// The fraction of the N² token pairs that lie in the band, exactly.
///
/// Image tokens i and j see each other iff |i − j| ≤ `half_width`; text tokens see all and are
/// seen by all. For `half_width = w·N` and no text this tends to [`band_density_limit`]. An empty
/// sequence counts as dense.
pub fn band_density(tokens: usize, text: usize, half_width: usize) -> f64 {
    let all = tokens as f64;
    let image = tokens.saturating_sub(text) as f64;
    let w = (half_width as f64).min((image - 1.0).max(0.0));
    if tokens == 0 {
        return 1.0;
    }
    // 2w + 1 keys for each query, less the corners that hang over the ends.
    let in_band = image * (2.0 * w + 1.0) - w * (w + 1.0);
    (in_band + all * all - image * image) / (all * all)
}

/// The density of a band whose half-width is the fraction `window` of very many tokens, none of
/// them text: 2w − w², which is 15/64 for the paper's 1/8.
pub fn band_density_limit(window: f64) -> f64 {
    let window = window.clamp(0.0, 1.0);
    window * (2.0 - window)
}

impl Action {
    /// Share of the dense matmul MACs, with `density` of the pairs in the band.
    pub fn matmul_share(self, density: f64) -> f64 {
        match self {
            Action::Full => 1.0,
            Action::Asc => 0.5,
            Action::WaRs => density,
            Action::WaRsAsc => density / 2.0,
            Action::Ast => 0.0,
        }
    }

    /// Share of the dense module MACs, projections included: (2d + ρN)/(2d + N) for `wa-rs`
    /// with density ρ, width d and N tokens (Table 2 of the paper).
    pub fn module_share(self, density: f64, work: &Workload) -> f64 {
        LayerWork::from(*work).module_share(self, density)
    }
}

/// How often each action occurs in a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts([usize; 5]);

impl Counts {
    /// Layer-steps with this action.
    pub fn of(&self, action: Action) -> usize {
        self.0[action as usize]
    }

    /// All layer-steps.
    pub fn total(&self) -> usize {
        self.0.iter().sum()
    }

    /// The fraction of layer-steps with this action; 0 for an empty plan.
    pub fn share(&self, action: Action) -> f64 {
        self.of(action) as f64 / self.total().max(1) as f64
    }
}

/// What the attention layers of one generation cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// How often each action occurs.
    pub counts: Counts,
    /// MACs of QKᵀ and PV without a plan.
    pub dense_matmul_macs: f64,
    /// MACs of QKᵀ and PV under the plan.
    pub matmul_macs: f64,
    /// MACs of the modules without a plan.
    pub dense_module_macs: f64,
    /// MACs of the modules under the plan.
    pub module_macs: f64,
    /// Layer-steps with a windowed action whose band holds every token pair. They are counted in
    /// `counts` by their name, and in the MACs as `full` and `asc`, which is what they compute.
    pub covered: usize,
}

impl Cost {
    /// Fraction of the matmul MACs that the plan saves.
    pub fn matmul_saved(&self) -> f64 {
        saved(self.matmul_macs, self.dense_matmul_macs)
    }

    /// Fraction of the module MACs that the plan saves.
    pub fn module_saved(&self) -> f64 {
        saved(self.module_macs, self.dense_module_macs)
    }

    /// Predicted time of a generation as a fraction of the time without a plan, if the attention
    /// modules take `attention_share` of that (measured, or assumed) and time follows the module's
    /// MACs (Amdahl's law). [`Plan::times`] knows more.
    pub fn time_share(&self, attention_share: f64) -> f64 {
        1.0 - attention_share * self.module_saved()
    }
}

fn saved(rest: f64, dense: f64) -> f64 {
    if dense > 0.0 { 1.0 - rest / dense } else { 0.0 }
}

impl Plan {
    /// How often each action occurs.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for action in self.steps.iter().flatten() {
            counts.0[*action as usize] += 1;
        }
        counts
    }

    /// What all attention layers of one generation cost, with and without this plan.
    ///
    /// `work.text` is taken as it is: where the plan leaves `text` to the graph, the caller knows.
    pub fn cost(&self, work: &Workload) -> Cost {
        let layer = LayerWork::from(*work);
        self.sum_cost(|_| &layer)
    }

    /// [`Plan::cost`] of a model whose layers differ in size.
    ///
    /// # Errors
    ///
    /// When `layers` are not as many as the plan has.
    pub fn cost_by_layer(&self, layers: &[LayerWork]) -> Result<Cost, LayerCount> {
        one_per_layer(self.layers(), layers)?;
        Ok(self.sum_cost(|layer| &layers[layer]))
    }

    fn sum_cost<'a>(&self, work: impl Fn(usize) -> &'a LayerWork) -> Cost {
        let mut cost = Cost {
            counts: self.counts(),
            dense_matmul_macs: 0.0,
            matmul_macs: 0.0,
            dense_module_macs: 0.0,
            module_macs: 0.0,
            covered: 0,
        };
        for layer in 0..self.layers() {
            let work = work(layer);
            let (matmul, module) = (work.work.matmul_macs(), work.module_macs());
            let half_width = self.half_width(work.work.tokens, work.work.text);
            let density = band_density(work.work.tokens, work.work.text, half_width);
            let covers = work.work.window_covers(half_width);
            for step in 0..self.step_count() {
                let action = self.action(step, layer);
                cost.dense_matmul_macs += matmul;
                cost.matmul_macs += matmul * action.matmul_share(density);
                cost.dense_module_macs += module;
                cost.module_macs += module * work.module_share(action, density);
                cost.covered += usize::from(covers && action.is_windowed());
            }
        }
        cost
    }
}
