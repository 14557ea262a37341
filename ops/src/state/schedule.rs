//! Which place in the plan a timestep means.
//!
//! A place is the index of a run in a generation: the step, or twice the step plus the branch with `cfg: separate`.
//! With a list of timesteps the place follows from the value; without one from the order of the runs. Nothing here
//! counts calls: a place is only an answer, and the request decides whether it continues what it has.
//!
//! A plan may serve other schedules over the same range ([`SchedulePolicy::Any`]). Then a value that is not planned takes
//! the row of the planned value before it, a row may serve several steps or none, and what goes on is what moves the plan's way.

use std::cmp::Ordering;

/// Relative error up to which a fed timestep still is the planned one: twice what rounding to bfloat16 does.
const TOLERANCE: f64 = 4e-3;

/// Never accept more than this part of the gap to the neighbouring planned value. Below one half, so that a value
/// belongs to one planned value at most.
const GAP_PART: f64 = 0.45;

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

/// What the runs of a generation looked like so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Place of the last run that completed.
    pub place: Option<usize>,
    /// Place at which the generation started: not 0 for image-to-image.
    pub first_place: Option<usize>,
    first_value: Option<f64>,
    last_value: Option<f64>,
    direction: Option<Ordering>,
}

impl Progress {
    /// Of a generation that started at `first_place` and is taken up again.
    pub fn resumed(first_place: usize) -> Self {
        Progress {
            first_place: Some(first_place),
            ..Progress::default()
        }
    }

    /// The run at `place` with timestep `value` has completed.
    pub fn advance(&mut self, place: usize, value: f64) {
        self.place = Some(place);
        self.first_place.get_or_insert(place);
        self.observe(value);
    }

    /// A run with timestep `value` was seen, whatever its place: later starts are recognised by it.
    pub fn observe(&mut self, value: f64) {
        self.first_value.get_or_insert(value);
        if let Some(last) = self.last_value
            && self.direction.is_none()
            && value != last
        {
            self.direction = value.partial_cmp(&last);
        }
        self.last_value = Some(value);
    }
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanPosition {
    At(usize),
    /// The plan says nothing about this timestep: not in its list, or beyond its last step.
    OffPlan,
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
    values: Option<Vec<Planned>>,
    policy: SchedulePolicy,
    runs_per_step: usize,
    runs: usize,
}

#[derive(Clone, Copy, Debug)]
struct Planned {
    value: f64,
    tolerance: f64,
}

impl Planned {
    fn fits(&self, value: f64) -> bool {
        (self.value - value).abs() <= self.tolerance
    }
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

    /// The list, if any value may be fed.
    fn any(&self) -> Option<&[Planned]> {
        self.values
            .as_deref()
            .filter(|_| self.policy == SchedulePolicy::Any)
    }

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

    /// How `value` lies to `other` in the direction of the list: `Greater` is later. Values that are one planned value's are
    /// equal.
    fn beyond(&self, value: f64, other: f64) -> Option<Ordering> {
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

fn with_tolerances(values: &[f64]) -> Vec<Planned> {
    let largest = values.iter().fold(0.0f64, |max, v| max.max(v.abs()));
    values
        .iter()
        .map(|&value| {
            let gap = values
                .iter()
                .map(|other| (other - value).abs())
                .filter(|&gap| gap > 0.0)
                .fold(f64::INFINITY, f64::min);
            let rounding = (TOLERANCE * value.abs()).max(1e-6 * largest);
            Planned {
                value,
                tolerance: rounding.min(GAP_PART * gap),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn walk(schedule: &Schedule, values: &[f64]) -> Vec<PlanPosition> {
        let mut progress = Progress::default();
        values
            .iter()
            .map(|&value| {
                let place = schedule.locate(value, &progress, false, true);
                match place {
                    PlanPosition::At(0) => {
                        progress = Progress::default();
                        progress.advance(0, value);
                    }
                    PlanPosition::At(at) => progress.advance(at, value),
                    PlanPosition::OffPlan => progress.observe(value),
                }
                place
            })
            .collect()
    }

    fn at(places: &[usize]) -> Vec<PlanPosition> {
        places
            .iter()
            .map(|&place| PlanPosition::At(place))
            .collect()
    }

    #[test]
    fn planned_values_are_found_in_order_and_again_from_the_start() {
        let s = Schedule::new(Some(&[900.0, 500.0, 100.0]), 3, 1, SchedulePolicy::Planned);
        assert_eq!(
            walk(&s, &[900.0, 500.0, 100.0, 900.0, 500.0]),
            at(&[0, 1, 2, 0, 1])
        );
    }

    #[test]
    fn a_repeated_value_is_the_run_that_is_due() {
        let heun = Schedule::new(
            Some(&[9.0, 5.0, 5.0, 1.0, 1.0]),
            5,
            1,
            SchedulePolicy::Planned,
        );
        assert_eq!(
            walk(&heun, &[9.0, 5.0, 5.0, 1.0, 1.0, 9.0]),
            at(&[0, 1, 2, 3, 4, 0])
        );
        let separate = Schedule::new(Some(&[9.0, 5.0]), 2, 2, SchedulePolicy::Planned);
        assert_eq!(
            walk(&separate, &[9.0, 9.0, 5.0, 5.0, 9.0]),
            at(&[0, 1, 2, 3, 0])
        );
    }

    #[test]
    fn the_second_run_of_a_step_may_be_ruled_out() {
        let s = Schedule::new(Some(&[9.0, 5.0]), 2, 2, SchedulePolicy::Planned);
        let mut progress = Progress::default();
        progress.advance(0, 9.0);
        assert_eq!(s.locate(9.0, &progress, false, true), PlanPosition::At(1));
        assert_eq!(s.locate(9.0, &progress, false, false), PlanPosition::At(0));
    }

    #[test]
    fn a_skipped_step_is_found_ahead_and_a_repeated_one_behind() {
        let s = Schedule::new(Some(&[9.0, 7.0, 5.0, 3.0]), 4, 1, SchedulePolicy::Planned);
        assert_eq!(walk(&s, &[9.0, 5.0, 7.0]), at(&[0, 2, 1]));
    }

    #[test]
    fn values_that_are_not_planned_are_outside() {
        let s = Schedule::new(Some(&[999.0, 998.0, 10.0]), 3, 1, SchedulePolicy::Planned);
        assert_eq!(
            walk(&s, &[999.0, 998.5, 500.0, 998.0]),
            vec![
                PlanPosition::At(0),
                PlanPosition::OffPlan,
                PlanPosition::OffPlan,
                PlanPosition::At(1)
            ]
        );
    }

    #[test]
    fn without_a_list_order_decides_and_a_jump_back_starts_over() {
        let s = Schedule::new(None, 4, 1, SchedulePolicy::Planned);
        assert_eq!(
            walk(&s, &[9.0, 7.0, 7.0, 5.0, 9.0, 7.0, 8.0]),
            at(&[0, 1, 2, 3, 0, 1, 0])
        );
        let rising = Schedule::new(None, 3, 1, SchedulePolicy::Planned);
        assert_eq!(
            walk(&rising, &[0.1, 0.5, 0.9, 0.1, 0.5]),
            at(&[0, 1, 2, 0, 1])
        );
    }

    #[test]
    fn without_a_list_runs_beyond_the_last_step_are_outside_until_a_start_over() {
        let s = Schedule::new(None, 2, 1, SchedulePolicy::Planned);
        assert_eq!(
            walk(&s, &[9.0, 8.0, 7.0, 6.0, 9.0]),
            vec![
                PlanPosition::At(0),
                PlanPosition::At(1),
                PlanPosition::OffPlan,
                PlanPosition::OffPlan,
                PlanPosition::At(0)
            ]
        );
    }

    #[test]
    fn without_a_list_a_missing_second_run_does_not_shift_the_rest() {
        let s = Schedule::new(None, 3, 2, SchedulePolicy::Planned);
        assert_eq!(walk(&s, &[9.0, 9.0, 8.0, 7.0, 7.0]), at(&[0, 1, 2, 4, 5]));
    }

    fn any(list: &[f64], runs_per_step: usize) -> Schedule {
        Schedule::new(Some(list), list.len(), runs_per_step, SchedulePolicy::Any)
    }

    #[test]
    fn any_value_takes_the_row_of_the_planned_one_before_it() {
        let s = any(&[900.0, 700.0, 500.0, 300.0, 100.0], 1);
        assert_eq!(
            walk(&s, &[950.0, 800.0, 650.0, 500.0, 350.0, 200.0, 50.0]),
            at(&[0, 0, 1, 2, 2, 3, 4])
        );
        assert_eq!(walk(&s, &[900.0, 500.0, 100.0]), at(&[0, 2, 4]));
        let rising = any(&[0.0, 0.4, 0.8], 1);
        assert_eq!(walk(&rising, &[0.0, 0.3, 0.5, 0.9]), at(&[0, 0, 1, 2]));
        assert!(s.lists(1, 700.0) && !s.lists(1, 650.0));
    }

    #[test]
    fn any_schedule_goes_on_while_it_moves_the_plan_s_way() {
        let s = any(&[900.0, 700.0, 500.0], 1);
        let mut progress = Progress::default();
        assert!(s.begins(0, 950.0, &progress));
        progress.advance(0, 950.0);
        assert!(s.follows(0, 850.0, &progress) && !s.begins(0, 850.0, &progress));
        assert!(s.begins(0, 950.0, &progress) && s.is_behind(0, 950.0, &progress));
        progress.advance(0, 850.0);
        assert!(
            s.follows(2, 400.0, &progress),
            "a coarser schedule leaves rows out"
        );
        progress.advance(2, 400.0);
        assert!(s.follows(2, 300.0, &progress) && !s.is_behind(2, 300.0, &progress));
        assert!(!s.follows(1, 600.0, &progress) && s.is_behind(1, 600.0, &progress));
        assert!(!s.follows(2, 400.0, &progress) && s.repeats(2, 400.0, &progress));
    }

    #[test]
    fn any_schedule_in_two_runs_per_step() {
        let s = any(&[900.0, 500.0], 2);
        assert_eq!(
            walk(
                &s,
                &[900.0, 900.0, 800.0, 800.0, 450.0, 450.0, 300.0, 300.0]
            ),
            at(&[0, 1, 0, 1, 2, 3, 2, 3])
        );
    }

    #[test]
    fn what_is_older_than_planned_is_too_old() {
        let s = any(&[900.0, 700.0, 500.0], 1);
        assert!(!s.is_too_old(900.0, 700.0, 0, 1));
        assert!(!s.is_too_old(800.0, 650.0, 0, 1));
        assert!(s.is_too_old(900.0, 650.0, 0, 1));
        assert!(!s.is_too_old(900.0, 500.0, 0, 2));
        let planned = Schedule::new(Some(&[900.0, 700.0]), 2, 1, SchedulePolicy::Planned);
        assert!(!planned.is_too_old(900.0, 100.0, 0, 1));
    }

    #[test]
    fn neighbours_in_the_list_are_known() {
        let s = Schedule::new(Some(&[1.0, 0.8, 0.6]), 3, 1, SchedulePolicy::Planned);
        assert!(
            s.is_beside(0, Side::After, &[0.8, 0.8]) && !s.is_beside(0, Side::After, &[0.8, 0.6])
        );
        assert!(s.is_beside(1, Side::Before, &[1.0]) && s.is_beside(1, Side::After, &[0.6001]));
        assert!(s.is_beside(2, Side::After, &[0.0]) && !s.is_beside(2, Side::After, &[0.8]));
        assert!(s.is_beside(0, Side::Before, &[1.2]) && !s.is_beside(0, Side::Before, &[0.5]));
        assert!(
            !Schedule::new(None, 3, 1, SchedulePolicy::Planned).is_beside(0, Side::After, &[0.8])
        );
    }

    proptest! {
        #[test]
        fn values_rounded_to_bfloat16_or_float16_keep_their_step(
            steps in 2usize..60, first in 1.0f64..1000.0, end in 0.0f64..0.5
        ) {
            let list: Vec<f64> = (0..steps)
                .map(|i| first * (1.0 - (1.0 - end) * i as f64 / (steps - 1) as f64))
                .collect();
            let schedule = Schedule::new(Some(&list), steps, 1, SchedulePolicy::Planned);
            let mut progress = Progress::default();
            for (step, &value) in list.iter().enumerate() {
                let gap = first * (1.0 - end) / (steps - 1) as f64;
                for rounded in [half::bf16::from_f64(value).to_f64(), half::f16::from_f64(value).to_f64()] {
                    if (rounded - value).abs() < 0.44 * gap {
                        prop_assert_eq!(schedule.locate(rounded, &progress, false, true), PlanPosition::At(step));
                    }
                }
                progress.advance(step, value);
            }
        }

        #[test]
        fn a_value_never_means_two_different_planned_values(
            list in prop::collection::vec(-1000.0f64..1000.0, 1..20), value in -1100.0f64..1100.0
        ) {
            let planned = with_tolerances(&list);
            let mut hits: Vec<f64> = planned.iter()
                .filter(|p| (p.value - value).abs() <= p.tolerance).map(|p| p.value).collect();
            hits.dedup();
            prop_assert!(hits.windows(2).all(|w| w[0] == w[1]), "{:?}", hits);
        }
    }
}
