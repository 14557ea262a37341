//! Which place in the plan a timestep means.
//!
//! A place is the index of a run in a generation: the step, or twice the step plus the branch with `cfg: separate`.
//! With a list of timesteps the place follows from the value; without one from the order of the runs. Nothing here
//! counts calls: a place is only an answer, and the request decides whether it continues what it has.
//!
//! A plan may serve other schedules over the same range ([`SchedulePolicy::Any`]). Then a value that is not planned takes
//! the row of the planned value before it, a row may serve several steps or none, and what goes on is what moves the plan's way.
//!
//! | module | owns |
//! |---|---|
//! | `timesteps` | the planned values and their tolerances |
//! | `progress` | where a run and its generation stand |
//! | `locate` | which place a timestep means |

mod locate;
mod progress;
#[cfg(test)]
mod tests;
mod timesteps;

use std::cmp::Ordering;

pub use self::progress::{At, PlanPosition, Progress};
use self::timesteps::{Planned, with_tolerances};

/// Values that differ by this part of the largest planned one are the same.
const SAME: f64 = 1e-6;

/// Which timesteps a plan serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SchedulePolicy {
    /// Those in its list.
    #[default]
    Planned,
    /// Any, in the direction of its list.
    Any,
}

/// A neighbour in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Before,
    After,
}

/// Finds places; made once per session.
#[derive(Debug)]
pub struct Schedule {
    pub(super) values: Option<Vec<Planned>>,
    pub(super) policy: SchedulePolicy,
    pub(super) runs_per_step: usize,
    pub(super) runs: usize,
}

impl Schedule {
    /// Without a list `fed` changes nothing.
    pub fn new(
        timesteps: Option<&[f64]>,
        steps: usize,
        runs_per_step: usize,
        policy: SchedulePolicy,
    ) -> Self {
        Schedule {
            values: timesteps.map(with_tolerances),
            policy,
            runs_per_step,
            runs: steps * runs_per_step,
        }
    }

    pub fn runs_per_step(&self) -> usize {
        self.runs_per_step
    }

    /// Runs of a whole generation, as planned.
    pub fn runs(&self) -> usize {
        self.runs
    }

    /// Whether places follow from timesteps rather than from what came before.
    pub fn is_certain(&self) -> bool {
        self.values.is_some()
    }

    /// Whether one row of the plan may serve several steps.
    pub fn rows_repeat(&self) -> bool {
        self.any().is_some()
    }

    /// Whether the plan lists `value` for `step`; without a list every value is as good as planned.
    pub fn lists(&self, step: usize, value: f64) -> bool {
        let planned = |values: &Vec<Planned>| values.get(step).is_some_and(|p| p.fits(value));
        self.values.as_ref().is_none_or(planned)
    }

    /// Whether a run at `place` is the next one after `progress`.
    pub fn follows(&self, place: usize, value: f64, progress: &Progress) -> bool {
        let Some(last) = progress.place else {
            return false;
        };
        if place == last + 1 {
            return true;
        }
        let whole_steps = place.is_multiple_of(self.runs_per_step)
            && (last + 1).is_multiple_of(self.runs_per_step);
        self.any().is_some()
            && whole_steps
            && place / self.runs_per_step >= last / self.runs_per_step
            && self.goes_on(value, progress)
    }

    /// Whether a generation begins with a run at `place`, as far as the timestep shows.
    pub fn begins(&self, place: usize, value: f64, progress: &Progress) -> bool {
        let again = self.any().is_some() && self.goes_on(value, progress);
        place == 0 && !again
    }

    /// Whether a run at `place` comes no later in a generation than the last one of `progress`.
    pub fn is_behind(&self, place: usize, value: f64, progress: &Progress) -> bool {
        let Some(last) = progress.place else {
            return false;
        };
        place <= last && !(self.any().is_some() && self.goes_on(value, progress))
    }

    /// Whether `value` belongs to the step of the last run of `progress`.
    pub fn repeats(&self, place: usize, value: f64, progress: &Progress) -> bool {
        match (self.any(), progress.last_value) {
            (Some(_), Some(last)) => self.beyond(value, last) == Some(Ordering::Equal),
            _ => progress.place == Some(place),
        }
    }

    /// Whether two runs are at one place, and where a row serves several steps at one of them.
    pub fn is_same_step(&self, a: usize, a_value: f64, b: usize, b_value: f64) -> bool {
        let same_time = || self.beyond(a_value, b_value) == Some(Ordering::Equal);
        a == b && (self.any().is_none() || same_time())
    }

    /// Whether a generation whose last run was at `last` with `last_value` may have one at `place` with `value`. Generations
    /// go forward or send their last run again, but not every run of theirs need have come by here; and which of the two
    /// runs of a step one was may have been a wrong guess.
    pub fn may_reach(&self, last: usize, last_value: f64, place: usize, value: f64) -> bool {
        match self.any() {
            Some(_) => self.beyond(value, last_value).is_some_and(Ordering::is_ge),
            None => place == last || (last + 1) / self.runs_per_step <= place / self.runs_per_step,
        }
    }

    /// The part of the range of timesteps between two values; all of it if there is no list.
    pub fn part(&self, from: f64, to: f64) -> f64 {
        let range = self.values.iter().flatten();
        let range = range.fold(0.0f64, |max, p| max.max(p.value.abs()));
        if range > 0.0 {
            (from - to).abs() / range
        } else {
            1.0
        }
    }

    /// Whether all of `numbers` are the planned value on that side of `step`; beyond the ends of the list, what is no nearer.
    pub fn is_beside(&self, step: usize, side: Side, numbers: &[f64]) -> bool {
        let Some(values) = self.values.as_deref().filter(|list| step < list.len()) else {
            return false;
        };
        let target = match side {
            Side::Before => step.checked_sub(1),
            Side::After => Some(step + 1),
        };
        match (target.and_then(|at| values.get(at)), side) {
            (Some(planned), _) => numbers.iter().all(|&x| planned.fits(x)),
            (None, Side::Before) => {
                let first = values[0];
                let ahead = |x| self.beyond(first.value, x).is_some_and(Ordering::is_ge);
                numbers.iter().all(|&x| first.fits(x) || ahead(x))
            }
            (None, Side::After) => {
                let last = values[step];
                let past = |x| self.beyond(x, last.value).is_some_and(Ordering::is_ge);
                numbers.iter().all(|&x| last.fits(x) || past(x))
            }
        }
    }

    /// How old what was left at `written` is at `now`, beyond what the plan has between the steps `writer` and `reader`.
    pub fn is_too_old(&self, written: f64, now: f64, writer: usize, reader: usize) -> bool {
        let Some(values) = self.any() else {
            return false;
        };
        let (Some(from), Some(to)) = (values.get(writer), values.get(reader)) else {
            return true;
        };
        let allowed = (to.value - from.value).abs() + to.tolerance + from.tolerance;
        let age = (now - written).abs();
        age.is_nan() || age > allowed
    }

    /// The list, if any value may be fed.
    pub(super) fn any(&self) -> Option<&[Planned]> {
        self.values
            .as_deref()
            .filter(|_| self.policy == SchedulePolicy::Any)
    }

    /// How `value` lies to `other` in the direction of the list: `Greater` is later. Values that are one planned value's are
    /// equal.
    pub(super) fn beyond(&self, value: f64, other: f64) -> Option<Ordering> {
        let values = self.values.as_deref()?;
        let (first, last) = (values.first()?.value, values.last()?.value);
        let largest = values.iter().fold(0.0f64, |max, p| max.max(p.value.abs()));
        let one = |p: &Planned| p.fits(value) && p.fits(other);
        if (value - other).abs() <= SAME * largest || values.iter().any(one) {
            return Some(Ordering::Equal);
        }
        let order = value.partial_cmp(&other)?;
        Some(if last < first { order.reverse() } else { order })
    }

    /// Whether `value` comes after the last of `progress`.
    fn goes_on(&self, value: f64, progress: &Progress) -> bool {
        progress.place.is_some()
            && progress
                .last_value
                .is_some_and(|last| self.beyond(value, last) == Some(Ordering::Greater))
    }
}
