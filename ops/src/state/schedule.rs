//! Which place in the plan a timestep means.
//!
//! A place is the index of a run in a generation: the step, or twice the step plus the branch with `cfg: separate`.
//! With a list of timesteps the place follows from the value; without one from the order of the runs. Nothing here
//! counts calls: a place is only an answer, and the request decides whether it continues what it has.

use std::cmp::Ordering;

/// Relative error up to which a fed timestep still is the planned one: twice what rounding to bfloat16 does.
const TOLERANCE: f64 = 4e-3;

/// Never accept more than this part of the gap to the neighbouring planned value. Below one half, so that a value
/// belongs to one planned value at most.
const GAP_PART: f64 = 0.45;

/// What the runs of a generation looked like so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trail {
    /// Place of the last run that completed.
    pub place: Option<usize>,
    /// Place at which the generation started: not 0 for image-to-image.
    pub first_place: Option<usize>,
    first_value: Option<f64>,
    last_value: Option<f64>,
    direction: Option<Ordering>,
}

impl Trail {
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
pub enum Place {
    At(usize),
    /// The plan says nothing about this timestep: not in its list, or beyond its last step.
    Outside,
}

/// Finds places; made once per session.
#[derive(Debug)]
pub struct Schedule {
    values: Option<Vec<Planned>>,
    runs_per_step: usize,
    runs: usize,
}

#[derive(Clone, Copy, Debug)]
struct Planned {
    value: f64,
    tolerance: f64,
}

impl Schedule {
    pub fn new(timesteps: Option<&[f64]>, steps: usize, runs_per_step: usize) -> Self {
        Schedule {
            values: timesteps.map(with_tolerances),
            runs_per_step,
            runs: steps * runs_per_step,
        }
    }

    /// The place of a run with timestep `value` (finite) after `trail`.
    ///
    /// `start` says that a generation begins with this run. `second` says whether the run may be the second one of
    /// its step under `cfg: separate`.
    pub fn locate(&self, value: f64, trail: &Trail, start: bool, second: bool) -> Place {
        match &self.values {
            Some(values) => self.by_value(values, value, trail, start, second),
            None => self.by_order(value, trail, start, second),
        }
    }

    fn by_value(
        &self,
        planned: &[Planned],
        value: f64,
        trail: &Trail,
        start: bool,
        second: bool,
    ) -> Place {
        let fits = |step: usize| {
            planned
                .get(step)
                .is_some_and(|p| (p.value - value).abs() <= p.tolerance)
        };
        let last = trail.place.filter(|_| !start);
        if let Some(last) = last {
            // A value may occur twice (Heun, `separate`): the run that is due wins.
            let due = last + 1;
            let is_second = due % self.runs_per_step != 0;
            if due < self.runs && fits(due / self.runs_per_step) && (second || !is_second) {
                return Place::At(due);
            }
        }
        let mut found = None;
        for step in (0..planned.len()).filter(|&step| fits(step)) {
            let place = step * self.runs_per_step;
            if last.is_some_and(|last| place > last) {
                return Place::At(place);
            }
            found.get_or_insert(place);
        }
        found.map_or(Place::Outside, Place::At)
    }

    fn by_order(&self, value: f64, trail: &Trail, start: bool, second: bool) -> Place {
        let (Some(place), Some(last), Some(first)) =
            (trail.place, trail.last_value, trail.first_value)
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
            order => value == first || (trail.direction.is_some() && order != trail.direction),
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

    fn within(&self, place: usize) -> Place {
        if place < self.runs {
            Place::At(place)
        } else {
            Place::Outside
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

    fn walk(schedule: &Schedule, values: &[f64]) -> Vec<Place> {
        let mut trail = Trail::default();
        values
            .iter()
            .map(|&value| {
                let place = schedule.locate(value, &trail, false, true);
                match place {
                    Place::At(0) => {
                        trail = Trail::default();
                        trail.advance(0, value);
                    }
                    Place::At(at) => trail.advance(at, value),
                    Place::Outside => trail.observe(value),
                }
                place
            })
            .collect()
    }

    fn at(places: &[usize]) -> Vec<Place> {
        places.iter().map(|&place| Place::At(place)).collect()
    }

    #[test]
    fn planned_values_are_found_in_order_and_again_from_the_start() {
        let s = Schedule::new(Some(&[900.0, 500.0, 100.0]), 3, 1);
        assert_eq!(
            walk(&s, &[900.0, 500.0, 100.0, 900.0, 500.0]),
            at(&[0, 1, 2, 0, 1])
        );
    }

    #[test]
    fn a_repeated_value_is_the_run_that_is_due() {
        let heun = Schedule::new(Some(&[9.0, 5.0, 5.0, 1.0, 1.0]), 5, 1);
        assert_eq!(
            walk(&heun, &[9.0, 5.0, 5.0, 1.0, 1.0, 9.0]),
            at(&[0, 1, 2, 3, 4, 0])
        );
        let separate = Schedule::new(Some(&[9.0, 5.0]), 2, 2);
        assert_eq!(
            walk(&separate, &[9.0, 9.0, 5.0, 5.0, 9.0]),
            at(&[0, 1, 2, 3, 0])
        );
    }

    #[test]
    fn the_second_run_of_a_step_may_be_ruled_out() {
        let s = Schedule::new(Some(&[9.0, 5.0]), 2, 2);
        let mut trail = Trail::default();
        trail.advance(0, 9.0);
        assert_eq!(s.locate(9.0, &trail, false, true), Place::At(1));
        assert_eq!(s.locate(9.0, &trail, false, false), Place::At(0));
    }

    #[test]
    fn a_skipped_step_is_found_ahead_and_a_repeated_one_behind() {
        let s = Schedule::new(Some(&[9.0, 7.0, 5.0, 3.0]), 4, 1);
        assert_eq!(walk(&s, &[9.0, 5.0, 7.0]), at(&[0, 2, 1]));
    }

    #[test]
    fn values_that_are_not_planned_are_outside() {
        let s = Schedule::new(Some(&[999.0, 998.0, 10.0]), 3, 1);
        assert_eq!(
            walk(&s, &[999.0, 998.5, 500.0, 998.0]),
            vec![Place::At(0), Place::Outside, Place::Outside, Place::At(1)]
        );
    }

    #[test]
    fn without_a_list_order_decides_and_a_jump_back_starts_over() {
        let s = Schedule::new(None, 4, 1);
        assert_eq!(
            walk(&s, &[9.0, 7.0, 7.0, 5.0, 9.0, 7.0, 8.0]),
            at(&[0, 1, 2, 3, 0, 1, 0])
        );
        let rising = Schedule::new(None, 3, 1);
        assert_eq!(
            walk(&rising, &[0.1, 0.5, 0.9, 0.1, 0.5]),
            at(&[0, 1, 2, 0, 1])
        );
    }

    #[test]
    fn without_a_list_runs_beyond_the_last_step_are_outside_until_a_start_over() {
        let s = Schedule::new(None, 2, 1);
        assert_eq!(
            walk(&s, &[9.0, 8.0, 7.0, 6.0, 9.0]),
            vec![
                Place::At(0),
                Place::At(1),
                Place::Outside,
                Place::Outside,
                Place::At(0)
            ]
        );
    }

    #[test]
    fn without_a_list_a_missing_second_run_does_not_shift_the_rest() {
        let s = Schedule::new(None, 3, 2);
        assert_eq!(walk(&s, &[9.0, 9.0, 8.0, 7.0, 7.0]), at(&[0, 1, 2, 4, 5]));
    }

    proptest! {
        #[test]
        fn values_rounded_to_bfloat16_or_float16_keep_their_step(
            steps in 2usize..60, first in 1.0f64..1000.0, end in 0.0f64..0.5
        ) {
            let list: Vec<f64> = (0..steps)
                .map(|i| first * (1.0 - (1.0 - end) * i as f64 / (steps - 1) as f64))
                .collect();
            let schedule = Schedule::new(Some(&list), steps, 1);
            let mut trail = Trail::default();
            for (step, &value) in list.iter().enumerate() {
                let gap = first * (1.0 - end) / (steps - 1) as f64;
                for rounded in [half::bf16::from_f64(value).to_f64(), half::f16::from_f64(value).to_f64()] {
                    if (rounded - value).abs() < 0.44 * gap {
                        prop_assert_eq!(schedule.locate(rounded, &trail, false, true), Place::At(step));
                    }
                }
                trail.advance(step, value);
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
