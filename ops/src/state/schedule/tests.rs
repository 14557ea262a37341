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
    assert!(s.is_beside(0, Side::After, &[0.8, 0.8]) && !s.is_beside(0, Side::After, &[0.8, 0.6]));
    assert!(s.is_beside(1, Side::Before, &[1.0]) && s.is_beside(1, Side::After, &[0.6001]));
    assert!(s.is_beside(2, Side::After, &[0.0]) && !s.is_beside(2, Side::After, &[0.8]));
    assert!(s.is_beside(0, Side::Before, &[1.2]) && !s.is_beside(0, Side::Before, &[0.5]));
    assert!(!Schedule::new(None, 3, 1, SchedulePolicy::Planned).is_beside(0, Side::After, &[0.8]));
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
}
