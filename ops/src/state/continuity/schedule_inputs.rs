//! Inputs that move with the steps, such as a second time or a schedule of strengths: they are no conditioning.
//!
//! Nothing is left out of the comparison for that. Such an input must be what it is known to be at either run's timestep:
//! * **at once**, the planned timestep before or after the one that is fed, in every row;
//! * **detected**, what it was at that timestep in a generation in which it moved at every step. What a run shows counts
//!   for later runs only, so that it cannot vouch for itself.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use super::digest::Digest;
use super::latents::CONTINUES;
use super::run_signature::{InputDigest, RunSignature};
use crate::state::schedule::{At, Schedule, Side};

/// After this many changes in a row an input that moves every step is no conditioning.
const CHANGES_TO_DETECT: u32 = 2;

/// Timesteps at which a schedule input is remembered; beyond that it is recorded anew.
const MOST_TIMESTEPS: usize = 4096;

/// What is known of a model's inputs that move.
#[derive(Debug)]
pub(super) struct ScheduleInputDetector {
    schedule: Arc<Schedule>,
    streaks: [Streak; 2],
    /// Per input, if it moves, what it was at each timestep and branch.
    records: Vec<Option<HashMap<(u64, usize), Digest>>>,
}

/// Runs in a row, and the inputs that changed at every one of them.
#[derive(Debug, Default)]
struct Streak {
    /// The runs in a row so far, as many as detection takes.
    runs: Vec<(At, RunSignature)>,
    /// Per input, the direction of its changes and how many there were in a row.
    changes: Vec<Option<(Ordering, u32)>>,
}

impl ScheduleInputDetector {
    pub fn new(schedule: Arc<Schedule>) -> Self {
        ScheduleInputDetector {
            schedule,
            streaks: [Streak::default(), Streak::default()],
            records: Vec::new(),
        }
    }

    /// The same knowledge without the run that was seen last.
    pub fn forget_runs(&mut self) {
        self.streaks = [Streak::default(), Streak::default()];
    }

    /// Whether input `i` says nothing against `b` being of the generation that showed `a`.
    pub fn fits(&self, i: usize, a: (&InputDigest, At), b: (&InputDigest, At)) -> bool {
        a.0.same(b.0) || self.matches_record(i, a, b) || self.is_beside(a, b)
    }

    /// Whether what [`ScheduleInputDetector::fits`] does not allow may be one generation all the same: an input that moves
    /// has moved. Where steps are only counted any number may be such an input.
    pub fn may_fit(&self, i: usize, a: (&InputDigest, At), b: (&InputDigest, At)) -> bool {
        let detected = self.records.get(i).is_some_and(Option::is_some);
        let may_move = detected || !self.schedule.is_certain();
        self.fits(i, a, b) || (may_move && a.0.direction(b.0).is_some())
    }

    /// The runs in a row that the last one of its branch follows.
    pub fn streak_before(&self, branch: usize) -> &[(At, RunSignature)] {
        let runs = &self.streaks[branch].runs;
        &runs[..runs.len().saturating_sub(1)]
    }

    fn matches_record(&self, i: usize, a: (&InputDigest, At), b: (&InputDigest, At)) -> bool {
        let Some(Some(record)) = self.records.get(i) else {
            return false;
        };
        let on = |(input, at): (&InputDigest, At)| {
            input.digest.is_some() && record.get(&self.key(at)).copied() == input.digest
        };
        on(a) && on(b)
    }

    fn is_beside(&self, a: (&InputDigest, At), b: (&InputDigest, At)) -> bool {
        let (Some(from), Some(to)) = (&a.0.scalars, &b.0.scalars) else {
            return false;
        };
        let step = |at: At| at.place / self.schedule.runs_per_step();
        let listed = |at: At| self.schedule.lists(step(at), at.value);
        // Of two steps one at most is at an end of the list, where there is no neighbour to compare with.
        from.len() == to.len()
            && step(a.1) != step(b.1)
            && listed(a.1)
            && listed(b.1)
            && [Side::Before, Side::After].into_iter().any(|side| {
                self.schedule.is_beside(step(a.1), side, from)
                    && self.schedule.is_beside(step(b.1), side, to)
            })
    }

    fn key(&self, at: At) -> (u64, usize) {
        (at.value.to_bits(), at.place % self.schedule.runs_per_step())
    }

    /// Shows it an anonymous run, served or not; whether an input was detected by it.
    pub fn observe(&mut self, at: At, signature: &RunSignature) -> bool {
        let count = signature.conditioning.len();
        self.records.resize(count, None);
        let branch = at.place % self.schedule.runs_per_step();
        let mut streak = std::mem::take(&mut self.streaks[branch]);
        streak.changes.resize(count, None);
        let follows = streak
            .runs
            .last()
            .is_some_and(|last| self.is_next(last, at, signature));
        // The last run of a streak counts once it has had its answer.
        if let Some(last) = streak.runs.last()
            && (follows || streak.runs.len() > 1)
        {
            self.record(last);
        }
        let mut detected_now = false;
        if follows {
            for i in 0..count {
                let (then, last) = streak.runs.last().expect("it is followed");
                let (a, b) = (&last.conditioning[i], &signature.conditioning[i]);
                let known = self.is_beside((a, *then), (b, at));
                let direction = a.direction(b).filter(|_| !known);
                let change = &mut streak.changes[i];
                *change = direction.map(|direction| match *change {
                    Some((same, times)) if same == direction => (direction, times + 1),
                    _ => (direction, 1),
                });
                if change.is_some_and(|(_, times)| times >= CHANGES_TO_DETECT)
                    && self.records[i].is_none()
                {
                    self.records[i] = Some(HashMap::new());
                    detected_now = true;
                }
            }
        } else {
            streak.changes.fill(None);
            streak.runs.clear();
        }
        streak.runs.push((at, signature.clone()));
        if detected_now {
            let before = streak.runs.len() - 1;
            streak.runs[..before]
                .iter()
                .for_each(|run| self.record(run));
        }
        if streak.runs.len() > CHANGES_TO_DETECT as usize + 1 {
            streak.runs.remove(0);
        }
        self.streaks[branch] = streak;
        detected_now
    }

    /// Whether a run may be the next step of the generation whose last run was `last`, moving inputs aside.
    fn is_next(&self, last: &(At, RunSignature), at: At, signature: &RunSignature) -> bool {
        let (before, shown) = last;
        let per_step = self.schedule.runs_per_step();
        let next = before.place + per_step == at.place
            || (!self.schedule.lists(at.place / per_step, at.value)
                && self
                    .schedule
                    .may_reach(before.place, before.value, at.place, at.value));
        next && shown.conditioning.len() == signature.conditioning.len()
            && shown.latents.distance(&signature.latents) < CONTINUES
            && shown
                .conditioning
                .iter()
                .zip(&signature.conditioning)
                .all(|(a, b)| a.same(b) || a.direction(b).is_some())
    }

    /// What the schedule inputs were in a run.
    fn record(&mut self, (at, signature): &(At, RunSignature)) {
        let key = self.key(*at);
        for (record, input) in self.records.iter_mut().zip(&signature.conditioning) {
            let (Some(record), Some(digest)) = (record, input.digest) else {
                continue;
            };
            if record.len() >= MOST_TIMESTEPS {
                record.clear();
            }
            // Without memory for it the input is not known at this timestep.
            if record.try_reserve(1).is_ok() {
                record.insert(key, digest);
            }
        }
    }

    #[cfg(test)]
    pub fn detected(&self) -> Vec<bool> {
        self.records.iter().map(Option::is_some).collect()
    }
}
