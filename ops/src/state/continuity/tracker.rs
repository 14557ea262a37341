//! What is remembered about anonymous runs: the generation in the slot, and those that are pending beside it.
//!
//! Owns every change of that; `matching` has the questions.

use std::collections::VecDeque;
use std::sync::Arc;

use super::digest::{Digest, digest_of};
use super::latents::CONTINUES;
use super::pending::PendingGeneration;
use super::run_signature::RunSignature;
use super::schedule_inputs::ScheduleInputDetector;
use crate::state::schedule::{At, Schedule};

/// A run that is not served is taken to continue the generation it is this much nearer to than to any other. Successive
/// states of one generation are at about 1 : 2.
const NEARER: f64 = 0.6;

/// Generations that are remembered, of 16 KiB each at most. Where inputs move and are not detected yet every run leaves one.
const MAX_PENDING: usize = 256;

/// Runs of others that a generation may miss at least, however short the plan.
const MIN_IDLE_RUNS: usize = 16;

/// An unfinished generation that has not had a run while others had as many as this many generations have is over.
const MAX_IDLE_GENERATIONS: u64 = 4;

/// What is remembered about anonymous runs, besides the caches.
#[derive(Debug)]
pub struct ContinuityTracker {
    pub(super) schedule: Arc<Schedule>,
    /// Anonymous runs so far.
    pub(super) turn: u64,
    /// Turns after which a generation that has not come by again is over.
    pub(super) max_idle_turns: u64,
    /// Two generations were seen at once: nothing is served until one starts anew, or is taken up again.
    pub ambiguous: bool,
    /// The generation that has the caches.
    pub(super) slot: Option<PendingGeneration>,
    /// Boxed, so that the list is short however many there are.
    pub(super) pending: VecDeque<Box<PendingGeneration>>,
    pub(super) last_id: u64,
    /// Where the run at hand goes on if it is not served: what [`ContinuityTracker::forget_streak`] found out of the runs
    /// before it.
    pub(super) resume_at: Option<(usize, Option<Digest>)>,
    /// When the last of those that there was no room for was seen. While it may come by nobody is served.
    pub(super) last_dropped: Option<u64>,
    pub(super) schedule_inputs: ScheduleInputDetector,
}

impl ContinuityTracker {
    pub fn new(schedule: Arc<Schedule>) -> Self {
        ContinuityTracker {
            turn: 0,
            max_idle_turns: MAX_IDLE_GENERATIONS * schedule.runs().max(MIN_IDLE_RUNS) as u64,
            ambiguous: false,
            slot: None,
            pending: VecDeque::new(),
            last_id: 0,
            resume_at: None,
            last_dropped: None,
            schedule_inputs: ScheduleInputDetector::new(Arc::clone(&schedule)),
            schedule,
        }
    }

    /// Another generation begins, or is taken up, in the slot. The one that is there is remembered if it has runs to come.
    pub fn begin(&mut self) {
        if let Some(slot) = self.slot.take()
            && !self.ambiguous
            // Where places are certain one that is over is remembered too: its last run may be sent again.
            && (self.schedule.is_certain() || !self.is_last(slot.at))
        {
            self.remember(slot);
        }
        self.ambiguous = false;
    }

    /// The slot's generation is over.
    pub fn end(&mut self) {
        self.slot = None;
        self.ambiguous = false;
    }

    /// Nobody has come by for long: everything but what is known of the model is forgotten.
    pub fn forget(&mut self) {
        self.end();
        self.turn = 0;
        self.pending.clear();
        self.last_dropped = None;
        self.schedule_inputs.forget_runs();
    }

    /// The slot cannot be trusted any more.
    pub fn mark_ambiguous(&mut self) {
        self.begin();
        self.ambiguous = true;
    }

    /// A run of the slot's generation, which began at `first`, has completed.
    pub fn advance(&mut self, at: At, first: usize, signature: RunSignature) {
        let branch = self.branch(at);
        let history = match &self.slot {
            Some(slot) => slot.history_after(&signature),
            None => digest_of([Some(0), signature.digest()]),
        };
        let shown = Some((signature.conditioning, at));
        match &mut self.slot {
            Some(slot) => {
                if branch == 0 {
                    slot.moved = Some(slot.latents.distance(&signature.latents));
                }
                slot.at = at;
                slot.seen = self.turn;
                slot.conditioning[branch] = shown;
                slot.latents = signature.latents;
                slot.history = history;
            }
            None => {
                let mut conditioning = [None, None];
                conditioning[branch] = shown;
                self.last_id += 1;
                self.slot = Some(PendingGeneration {
                    id: self.last_id,
                    ancestors: Vec::new(),
                    at,
                    first,
                    seen: self.turn,
                    conditioning,
                    latents: signature.latents,
                    moved: None,
                    history,
                });
            }
        }
    }

    /// A run that was not served has come by. `in_flight` is the run that owns the slot at the moment.
    pub fn note(&mut self, at: At, signature: &RunSignature, in_flight: Option<&RunSignature>) {
        let pending = self
            .pending
            .iter()
            .enumerate()
            .filter(|(_, generation)| self.may_be(generation, at, signature))
            .map(|(i, generation)| {
                (
                    Some(i).filter(|_| !self.is_repeat(generation, at)),
                    &generation.latents,
                )
            });
        // It may as well continue the slot.
        let slot = self.slot.iter();
        let slot = slot.filter(|slot| self.may_be(slot, at, signature));
        let slot = slot.map(|slot| &slot.latents);
        let slot = slot.chain(in_flight.map(|run| &run.latents));
        let mut near: Vec<(Option<usize>, f64)> = pending
            .chain(slot.map(|latents| (None, latents)))
            .map(|(i, latents)| (i, latents.distance(&signature.latents)))
            .filter(|(_, distance)| *distance < CONTINUES)
            .collect();
        near.sort_by(|a, b| a.1.total_cmp(&b.1));
        // The generation that it continues is no longer where it was, if there is no other. In doubt all stay.
        let continued = match near[..] {
            [(Some(index), _)] => Some((index, true)),
            [(Some(index), nearest), (_, next), ..] if nearest < NEARER * next => {
                Some((index, false))
            }
            _ => None,
        };
        let before = continued.and_then(|(index, alone)| match alone {
            true => self.pending.remove(index).map(|generation| *generation),
            false => self
                .pending
                .get(index)
                .map(|generation| PendingGeneration::clone(generation)),
        });
        let mut ancestors = Vec::new();
        if let Some(before) = &before {
            ancestors.clone_from(&before.ancestors);
            ancestors.push(before.id);
        }
        let (first, history) = match (&before, self.resume_at.take()) {
            (Some(before), _) => (before.first, before.history),
            (None, Some(resumed)) => resumed,
            (None, None) => (at.place, None),
        };
        self.last_id += 1;
        let mut conditioning = [None, None];
        conditioning[self.branch(at)] = Some((signature.conditioning.clone(), at));
        self.remember(PendingGeneration {
            id: self.last_id,
            ancestors,
            at,
            first,
            seen: self.turn,
            conditioning,
            latents: signature.latents.clone(),
            moved: before
                .as_ref()
                .map(|b| b.latents.distance(&signature.latents)),
            history: digest_of([history, signature.digest()]),
        });
    }

    /// The run that was noted last with this signature is in the slot after all.
    pub fn restore(&mut self, signature: &RunSignature) {
        let noted = self
            .pending
            .iter()
            .rposition(|generation| generation.latents == signature.latents);
        if let Some(index) = noted {
            self.pending.remove(index);
        }
    }

    fn remember(&mut self, mut generation: PendingGeneration) {
        // The two runs of a step have conditioning of their own. That of one says nothing about the other, so with two
        // generations that are not in the slot are told apart by their latents only.
        if self.schedule.runs_per_step() > 1 {
            generation.conditioning = [None, None];
        }
        if self.pending.len() == MAX_PENDING {
            let dropped = self.pending.pop_front().map(|generation| generation.seen);
            self.last_dropped = self.last_dropped.max(dropped);
        }
        self.pending.push_back(Box::new(generation));
    }

    /// A pending generation moves into the slot, which has nothing of it yet. Returns the place of its first run.
    pub fn take_up(&mut self, generation: usize) -> usize {
        let generation = self
            .pending
            .remove(generation)
            .map(|generation| *generation);
        self.begin();
        let first = generation.as_ref().map_or(0, |generation| generation.first);
        self.slot = generation;
        first
    }

    /// Detects which inputs move with the steps. To be shown every anonymous run, served or not.
    pub fn observe(&mut self, at: At, signature: &RunSignature) {
        self.turn += 1;
        let (turn, max_idle_turns) = (self.turn, self.max_idle_turns);
        self.resume_at = None;
        let may_come = |seen: &u64| turn - seen <= max_idle_turns;
        self.pending.retain(|generation| may_come(&generation.seen));
        self.last_dropped = self.last_dropped.filter(may_come);
        if self.schedule_inputs.observe(at, signature) {
            self.forget_streak(at, signature);
        }
    }

    /// An input was found to move: until now every run of this generation looked like another one. What they left is
    /// forgotten, if nothing else is near that could be another generation's.
    fn forget_streak(&mut self, at: At, signature: &RunSignature) {
        let branch = self.branch(at);
        let streak = self.schedule_inputs.streak_before(branch);
        let left = |(at, run): &(At, RunSignature), position: &PendingGeneration| {
            let shown = position.conditioning[branch].as_ref();
            position.at == *at
                && position.latents.identical(&run.latents)
                && shown.is_some_and(|(conditioning, _)| *conditioning == run.conditioning)
        };
        let of_streak = |position: &PendingGeneration| streak.iter().any(|run| left(run, position));
        let near = |position: &&PendingGeneration| {
            position.latents.distance(&signature.latents) < CONTINUES
        };
        let pending = self.pending.iter().map(|generation| &**generation);
        let all = pending.chain(&self.slot);
        let near: Vec<&PendingGeneration> = all.filter(near).collect();
        // Two that were left by one run are two generations.
        let runs = streak
            .iter()
            .filter(|run| near.iter().any(|p| left(run, p)));
        if runs.count() != near.len() || !near.iter().all(|position| of_streak(position)) {
            return;
        }
        let pending: Vec<bool> = self
            .pending
            .iter()
            .map(|generation| of_streak(generation))
            .collect();
        let slot = self.slot.as_ref().is_some_and(of_streak);
        // Where all of its runs are known it goes on from there.
        if let (true, Some(begun)) = (slot, &self.slot)
            && begun.at == streak[0].0
        {
            let fed = streak[1..].iter().map(|(_, run)| run.digest());
            let history = fed.fold(begun.history, |history, run| digest_of([history, run]));
            self.resume_at = Some((begun.first, history));
        }
        let mut pending = pending.into_iter();
        self.pending.retain(|_| !pending.next().unwrap_or(false));
        if slot {
            self.slot = None;
        }
    }
}
