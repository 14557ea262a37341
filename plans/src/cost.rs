//! What a plan costs, in multiply-accumulates (MACs), and what it saves.
//!
//! Two accountings, because the paper uses both: *matmul* counts QKᵀ and PV alone (its Figures 8
//! and 9), *module* adds the Q, K, V and output projections (its Table 2). Latency is another
//! matter and is not predicted here. A step that captures R costs what a full one does: capture
//! is one pass over the keys.

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

/// The fraction of the N² token pairs that lie in the band, exactly.
///
/// Image tokens i and j see each other iff |i − j| ≤ `half_width`; text tokens see all and are
/// seen by all. For `half_width = w·N` and no text this tends to 2w − w²: 15/64 for the paper's
/// w = 1/8. An empty sequence counts as dense.
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
        let (n, d) = (work.tokens as f64, work.width as f64);
        let windowed = if n + d == 0.0 {
            1.0
        } else {
            (2.0 * d + density * n) / (2.0 * d + n)
        };
        match self {
            Action::Full => 1.0,
            Action::Asc => 0.5,
            Action::WaRs => windowed,
            Action::WaRsAsc => windowed / 2.0,
            Action::Ast => 0.0,
        }
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
        let counts = self.counts();
        let density = band_density(
            work.tokens,
            work.text,
            self.half_width(work.tokens, work.text),
        );
        let matmul = work.matmul_macs();
        let module = matmul + work.projection_macs();
        let sum = |share: &dyn Fn(Action) -> f64| -> f64 {
            Action::ALL
                .into_iter()
                .map(|action| counts.of(action) as f64 * share(action))
                .sum()
        };
        Cost {
            counts,
            dense_matmul_macs: counts.total() as f64 * matmul,
            matmul_macs: sum(&|action| action.matmul_share(density)) * matmul,
            dense_module_macs: counts.total() as f64 * module,
            module_macs: sum(&|action| action.module_share(density, work)) * module,
        }
    }
}
