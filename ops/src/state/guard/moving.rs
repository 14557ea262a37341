//! Inputs that move with the steps, such as a second time or a schedule of strengths: they are no conditioning.
//!
//! Nothing is left out of the comparison for that. Such an input must be what it is known to be at either run's timestep:
//! * **at once**, the planned timestep before or after the one that is fed, in every row;
//! * **learnt**, what it was at that timestep in a generation in which it moved at every step. What a run shows counts
//!   for later runs only, so that it cannot vouch for itself.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use super::digest::Digest;
use super::evidence::{Evidence, Fingerprint};
use super::{At, CONTINUES};
use crate::state::schedule::{Schedule, Side};

/// After this many changes in a row an input that moves every step is no conditioning.
const CHANGES_TO_LEARN: u32 = 2;

/// Timesteps at which a learnt input is remembered; beyond that it is learnt anew.
const MOST_TIMESTEPS: usize = 4096;

/// What is known of a model's inputs that move.
#[derive(Debug)]
pub(super) struct Moving {
    schedule: Arc<Schedule>,
    watch: [Watch; 2],
    /// Per input, if it moves, what it was at each timestep and branch.
    tracks: Vec<Option<HashMap<(u64, usize), Digest>>>,
}

/// Looks for inputs that change at every step.
#[derive(Debug, Default)]
struct Watch {
    /// The runs in a row so far, as many as learning takes.
    row: Vec<(At, Evidence)>,
    /// Per input, the direction of its changes and how many there were in a row.
    changes: Vec<Option<(Ordering, u32)>>,
}

impl Moving {
    pub fn new(schedule: Arc<Schedule>) -> Self {
        Moving {
            schedule,
            watch: [Watch::default(), Watch::default()],
            tracks: Vec::new(),
        }
    }

    /// The same knowledge without the run that was seen last.
    pub fn forget_runs(&mut self) {
        self.watch = [Watch::default(), Watch::default()];
    }

    /// Whether input `i` says nothing against `b` being of the generation that showed `a`.
    pub fn fits(&self, i: usize, a: (&Fingerprint, At), b: (&Fingerprint, At)) -> bool {
        a.0.same(b.0) || self.is_on_track(i, a, b) || self.is_beside(a, b)
    }

    /// Whether what [`Moving::fits`] does not allow may be one generation all the same: an input that moves has moved. Where
    /// steps are only counted any number may be such an input.
    pub fn may_fit(&self, i: usize, a: (&Fingerprint, At), b: (&Fingerprint, At)) -> bool {
        let learnt = self.tracks.get(i).is_some_and(Option::is_some);
        let may_move = learnt || !self.schedule.is_certain();
        self.fits(i, a, b) || (may_move && a.0.direction(b.0).is_some())
    }

    /// The runs in a row that the last one of its branch follows.
    pub fn row_before(&self, branch: usize) -> &[(At, Evidence)] {
        let row = &self.watch[branch].row;
        &row[..row.len().saturating_sub(1)]
    }

    fn is_on_track(&self, i: usize, a: (&Fingerprint, At), b: (&Fingerprint, At)) -> bool {
        let Some(Some(track)) = self.tracks.get(i) else {
            return false;
        };
        let on = |(print, at): (&Fingerprint, At)| {
            print.digest.is_some() && track.get(&self.key(at)).copied() == print.digest
        };
        on(a) && on(b)
    }

    fn is_beside(&self, a: (&Fingerprint, At), b: (&Fingerprint, At)) -> bool {
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

    /// Shows it an anonymous run, served or not; whether an input was learnt by it.
    pub fn watch(&mut self, at: At, evidence: &Evidence) -> bool {
        let count = evidence.conditioning.len();
        self.tracks.resize(count, None);
        let branch = at.place % self.schedule.runs_per_step();
        let mut watch = std::mem::take(&mut self.watch[branch]);
        watch.changes.resize(count, None);
        let follows = watch
            .row
            .last()
            .is_some_and(|last| self.is_next(last, at, evidence));
        // The last run of a row counts once it has had its answer.
        if let Some(last) = watch.row.last()
            && (follows || watch.row.len() > 1)
        {
            self.record(last);
        }
        let mut learnt_now = false;
        if follows {
            for i in 0..count {
                let (then, last) = watch.row.last().expect("it is followed");
                let (a, b) = (&last.conditioning[i], &evidence.conditioning[i]);
                let known = self.is_beside((a, *then), (b, at));
                let direction = a.direction(b).filter(|_| !known);
                let change = &mut watch.changes[i];
                *change = direction.map(|direction| match *change {
                    Some((same, times)) if same == direction => (direction, times + 1),
                    _ => (direction, 1),
                });
                if change.is_some_and(|(_, times)| times >= CHANGES_TO_LEARN)
                    && self.tracks[i].is_none()
                {
                    self.tracks[i] = Some(HashMap::new());
                    learnt_now = true;
                }
            }
        } else {
            watch.changes.fill(None);
            watch.row.clear();
        }
        watch.row.push((at, evidence.clone()));
        if learnt_now {
            let before = watch.row.len() - 1;
            watch.row[..before].iter().for_each(|run| self.record(run));
        }
        if watch.row.len() > CHANGES_TO_LEARN as usize + 1 {
            watch.row.remove(0);
        }
        self.watch[branch] = watch;
        learnt_now
    }

    /// Whether a run may be the next step of the generation whose last run was `last`, moving inputs aside.
    fn is_next(&self, last: &(At, Evidence), at: At, evidence: &Evidence) -> bool {
        let (before, shown) = last;
        let per_step = self.schedule.runs_per_step();
        let next = before.place + per_step == at.place
            || (!self.schedule.lists(at.place / per_step, at.value)
                && self
                    .schedule
                    .may_reach(before.place, before.value, at.place, at.value));
        next && shown.conditioning.len() == evidence.conditioning.len()
            && shown.latents.distance(&evidence.latents) < CONTINUES
            && shown
                .conditioning
                .iter()
                .zip(&evidence.conditioning)
                .all(|(a, b)| a.same(b) || a.direction(b).is_some())
    }

    /// What the learnt inputs were in a run.
    fn record(&mut self, (at, evidence): &(At, Evidence)) {
        let key = self.key(*at);
        for (track, print) in self.tracks.iter_mut().zip(&evidence.conditioning) {
            let (Some(track), Some(digest)) = (track, print.digest) else {
                continue;
            };
            if track.len() >= MOST_TIMESTEPS {
                track.clear();
            }
            // Without memory for it the input is not known at this timestep.
            if track.try_reserve(1).is_ok() {
                track.insert(key, digest);
            }
        }
    }

    #[cfg(test)]
    pub fn learnt(&self) -> Vec<bool> {
        self.tracks.iter().map(Option::is_some).collect()
    }
}
