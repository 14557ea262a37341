//! What one layer does in one run, decided before any layer runs.
//!
//! The plan says what should happen, the caches what can: a missing tensor turns `ast` and `wa-rs` into full attention.

use ditfastattn_plans::Action;

use super::cached::Cached;
use super::caches::LayerCaches;
use super::compiled_plan::CompiledPlan;
use super::directive::{Directive, Rows, Work};
use super::schedule::Schedule;

/// How a run follows the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// As planned.
    Planned,
    /// The caches are gone: everything full on all rows, keeping what later steps read.
    Recapture,
    /// Not part of a generation we know: everything full, nothing kept.
    Dense,
}

/// What was lost against the plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shortfall {
    /// A tensor that the plan counts on is not cached.
    pub missing: bool,
    /// The layer computes more than planned, for whatever reason.
    pub recompute: bool,
}

/// Whether the second run of a step may take the outputs of the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    Allowed,
    /// Nothing shows that both are of one step.
    Unknown,
    /// They are fed tensors of different shapes.
    Unlike,
}

/// One run, as far as decisions about its layers go.
#[derive(Debug)]
pub(super) struct DecisionContext<'a> {
    pub compiled_plan: &'a CompiledPlan,
    pub schedule: &'a Schedule,
    /// The timestep that is fed.
    pub now: f64,
    pub mode: Mode,
    pub step: usize,
    pub branch: usize,
    /// The batch really has two halves: guidance is batched and the rows are even.
    pub halves: bool,
    pub sharing: Sharing,
}

impl DecisionContext<'_> {
    /// What `layer` does. Moves the first run's tensors over if the second run takes them.
    pub fn decide<T: Cached>(
        &self,
        layer: usize,
        caches: &mut LayerCaches<T>,
    ) -> (Directive, Shortfall) {
        let compiled_plan = self.compiled_plan;
        let planned = compiled_plan.action(self.step, layer);
        if self.mode != Mode::Planned {
            let shortfall = Shortfall {
                missing: false,
                recompute: planned != Action::Full,
            };
            return (self.full(layer, Rows::All), shortfall);
        }

        let rows = if planned.uses_halves() && self.halves {
            Rows::Half
        } else {
            Rows::All
        };
        let whole = planned.uses_halves() && compiled_plan.batch_has_halves() && !self.halves;
        let shortfall = Shortfall {
            missing: false,
            recompute: whole,
        };
        let old_residual = self.is_residual_too_old(layer, caches);
        let has_residual = caches.residual[self.branch].is_some() && !old_residual;
        let second = self.branch == 1;
        if second && planned.uses_halves() {
            if self.sharing == Sharing::Allowed && !caches.output[0].is_empty() {
                caches.take_from_first(planned.is_full());
                return (
                    self.directive(layer, Work::Reuse, Rows::All),
                    Shortfall::default(),
                );
            }
            // The first run's output is not there, or does not fit: this run computes its own.
            let directive = if planned.is_windowed() && has_residual {
                self.directive(layer, Work::Window, Rows::All)
            } else {
                self.full(layer, Rows::All)
            };
            return (directive, Shortfall::of(self.sharing != Sharing::Unlike));
        }
        match planned {
            Action::Full | Action::Asc => (self.full(layer, rows), shortfall),
            Action::WaRs | Action::WaRsAsc if has_residual => {
                (self.directive(layer, Work::Window, rows), shortfall)
            }
            Action::WaRs | Action::WaRsAsc => {
                (self.full(layer, Rows::All), Shortfall::of(!old_residual))
            }
            Action::Ast => {
                let old = self.is_output_too_old(layer, caches);
                if caches.output[self.branch].is_empty() || old {
                    let mut directive = self.full(layer, Rows::All);
                    if has_residual && !old {
                        directive.capture = false;
                        directive.preserve_residual = true;
                    }
                    (directive, Shortfall::of(!old))
                } else {
                    (
                        self.directive(layer, Work::Reuse, Rows::All),
                        Shortfall::default(),
                    )
                }
            }
        }
    }

    /// Whether the layer's R is older than the plan's is at this row; only where the plan serves other schedules.
    fn is_residual_too_old<T>(&self, layer: usize, caches: &LayerCaches<T>) -> bool {
        let writer = self.compiled_plan.residual_writer(self.step, layer);
        caches.residual[self.branch].is_some()
            && self.is_too_old(caches.residual_at[self.branch], writer)
    }

    /// The same for its output.
    fn is_output_too_old<T>(&self, layer: usize, caches: &LayerCaches<T>) -> bool {
        let writer = self.compiled_plan.output_writer(self.step, layer);
        !caches.output[self.branch].is_empty()
            && self.is_too_old(caches.output_at[self.branch], writer)
    }

    fn is_too_old(&self, written: f64, writer: Option<usize>) -> bool {
        let writer = writer.unwrap_or(self.step);
        (self.schedule).is_too_old(written, self.now, writer, self.step)
    }

    fn full(&self, layer: usize, rows: Rows) -> Directive {
        let mut directive = self.directive(layer, Work::Full, rows);
        directive.capture = directive.residual_live;
        directive
    }

    fn directive(&self, layer: usize, work: Work, rows: Rows) -> Directive {
        let kept = self.mode != Mode::Dense;
        let planned = self.mode == Mode::Planned;
        // Under another schedule the row may come again.
        let planned_action = self.compiled_plan.action(self.step, layer);
        let again = self.schedule.rows_repeat();
        let output_live = kept
            && (self.compiled_plan.output_live_after(self.step, layer)
                || (again && planned_action == Action::Ast));
        let residual_live = kept
            && (self.compiled_plan.residual_live_after(self.step, layer)
                || (again && planned_action.is_windowed()));
        let shared = planned && self.compiled_plan.output_shared_within(self.step, layer);
        Directive {
            work,
            rows,
            capture: false,
            keep: output_live || (shared && self.branch == 0),
            residual_live,
            preserve_residual: false,
            first_output_live: output_live,
        }
    }
}

impl Shortfall {
    /// The layer computes more than planned, for want of a tensor or for another reason.
    fn of(missing: bool) -> Self {
        Shortfall {
            missing,
            recompute: true,
        }
    }
}
