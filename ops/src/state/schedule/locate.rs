//! From a fed timestep to a place in the plan: by its value where the plan lists timesteps, else by the order of the runs.

use std::cmp::Ordering;

use super::Schedule;
use super::progress::{PlanPosition, Progress};
use super::timesteps::Planned;

impl Schedule {
    /// The place of a run with timestep `value` (finite) after `progress`.
    ///
    /// `start` says that a generation begins with this run. `second` says whether the run may be the second one of
    /// its step under `cfg: separate`.
    pub fn locate(
        &self,
        value: f64,
        progress: &Progress,
        start: bool,
        second: bool,
    ) -> PlanPosition {
        let Some(values) = &self.values else {
            return self.by_order(value, progress, start, second);
        };
        let place = self.by_value(values, value, progress, start, second);
        match (place, self.any()) {
            (PlanPosition::OffPlan, Some(values)) => {
                self.by_range(values, value, progress, start, second)
            }
            _ => place,
        }
    }

    fn by_value(
        &self,
        planned: &[Planned],
        value: f64,
        progress: &Progress,
        start: bool,
        second: bool,
    ) -> PlanPosition {
        let fits = |step: usize| planned.get(step).is_some_and(|p| p.fits(value));
        let last = progress.place.filter(|_| !start);
        if let Some(last) = last {
            // A value may occur twice (Heun, `separate`): the run that is due wins.
            let due = last + 1;
            let is_second = due % self.runs_per_step != 0;
            if due < self.runs && fits(due / self.runs_per_step) && (second || !is_second) {
                return PlanPosition::At(due);
            }
        }
        let mut found = None;
        for step in (0..planned.len()).filter(|&step| fits(step)) {
            let place = step * self.runs_per_step;
            if last.is_some_and(|last| place > last) {
                return PlanPosition::At(place);
            }
            found.get_or_insert(place);
        }
        found.map_or(PlanPosition::OffPlan, PlanPosition::At)
    }

    /// The row of the planned value before `value`, the first one if there is none.
    fn by_range(
        &self,
        planned: &[Planned],
        value: f64,
        progress: &Progress,
        start: bool,
        second: bool,
    ) -> PlanPosition {
        if let (Some(last), Some(last_value)) =
            (progress.place.filter(|_| !start), progress.last_value)
            && second
            && !(last + 1).is_multiple_of(self.runs_per_step)
            && self.beyond(value, last_value) == Some(Ordering::Equal)
        {
            return PlanPosition::At(last + 1);
        }
        let step = planned
            .iter()
            .rposition(|p| self.beyond(value, p.value).is_some_and(Ordering::is_ge));
        PlanPosition::At(step.unwrap_or(0) * self.runs_per_step)
    }

    fn by_order(&self, value: f64, progress: &Progress, start: bool, second: bool) -> PlanPosition {
        let (Some(place), Some(last), Some(first)) =
            (progress.place, progress.last_value, progress.first_value)
        else {
            return self.within(0);
        };
        let due_is_second = (place + 1) % self.runs_per_step != 0;
        let goes_back = match value.partial_cmp(&last) {
            Some(Ordering::Equal) => {
                // The same value again: the second run of the step, a Heun corrector, or, while the generation has
                // not moved at all, another generation.
                !(due_is_second && second) && last == first
            }
            order => {
                value == first || (progress.direction.is_some() && order != progress.direction)
            }
        };
        if start || goes_back {
            return self.within(0);
        }
        let due = match (due_is_second, value == last && second) {
            (false, _) | (true, true) => place + 1,
            // The second run of the step never came.
            (true, false) if value != last => place + 2,
            (true, false) => place,
        };
        self.within(due)
    }

    fn within(&self, place: usize) -> PlanPosition {
        if place < self.runs {
            PlanPosition::At(place)
        } else {
            PlanPosition::OffPlan
        }
    }
}
