//! A plan in the form the state machine asks it: per step and layer, what to do and what must survive.

use ditfastattn_plans::{Action, Cfg, Liveness, Plan};

/// A plan, its liveness, and which layers were rewritten around the attention core only.
#[derive(Debug)]
pub struct CompiledPlan {
    plan: Plan,
    live: Liveness,
    core: Vec<bool>,
    halves_in_graph: bool,
}

impl CompiledPlan {
    /// `core_layers` lists the layers in the core form; they serve `ast` themselves instead of being skipped.
    pub fn new(plan: Plan, core_layers: &[usize]) -> Self {
        let core = (0..plan.layers())
            .map(|layer| core_layers.contains(&layer))
            .collect();
        CompiledPlan {
            live: plan.liveness(),
            plan,
            core,
            halves_in_graph: false,
        }
    }

    /// The same for a graph that makes guidance's halves of each row itself.
    pub fn with_halves_in_graph(self, halves_in_graph: bool) -> Self {
        CompiledPlan {
            halves_in_graph,
            ..self
        }
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub fn layers(&self) -> usize {
        self.plan.layers()
    }

    pub fn action(&self, step: usize, layer: usize) -> Action {
        self.plan.action(step, layer)
    }

    pub fn is_core(&self, layer: usize) -> bool {
        self.core.get(layer).copied().unwrap_or(false)
    }

    /// Runs that make up one step: two with `cfg: separate`, else one.
    pub fn runs_per_step(&self) -> usize {
        if self.plan.cfg == Cfg::Separate { 2 } else { 1 }
    }

    /// Runs of a whole generation.
    pub fn runs(&self) -> usize {
        self.plan.step_count() * self.runs_per_step()
    }

    /// Whether the batch of one run holds both halves of guidance.
    pub fn batch_has_halves(&self) -> bool {
        matches!(self.plan.cfg, Cfg::CondFirst | Cfg::UncondFirst)
    }

    /// Whether a run of `rows` rows really has both halves.
    pub fn has_halves(&self, rows: usize) -> bool {
        let fed = rows >= 2 && rows.is_multiple_of(2);
        self.batch_has_halves() && (fed || self.halves_in_graph)
    }

    /// Whether the conditional half is the first one.
    pub fn conditional_first(&self) -> bool {
        self.plan.cfg != Cfg::UncondFirst
    }

    /// The step whose R the windows of `step` add, as planned.
    pub fn residual_writer(&self, step: usize, layer: usize) -> Option<usize> {
        (0..step).rfind(|&before| self.action(before, layer).is_full())
    }

    /// The step whose output `step` serves, as planned.
    pub fn output_writer(&self, step: usize, layer: usize) -> Option<usize> {
        (0..step).rfind(|&before| self.action(before, layer) != Action::Ast)
    }

    /// R is read after `step`.
    pub fn residual_live_after(&self, step: usize, layer: usize) -> bool {
        self.live.residual_live_after(step, layer)
    }

    /// The output of this run is read by the branch itself at the next step.
    pub fn output_live_after(&self, step: usize, layer: usize) -> bool {
        self.live.output_live_after(step, layer)
    }

    /// The output of the first run of `step` is read by the second run.
    pub fn output_shared_within(&self, step: usize, layer: usize) -> bool {
        self.live.output_shared_within(step, layer)
    }
}
