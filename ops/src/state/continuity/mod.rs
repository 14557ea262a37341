//! Whether a run without a request id continues the generation that was seen last, and which one if not that.
//!
//! Anonymous clients share one slot, which has the caches. A run is served from it only if everything that can be seen
//! speaks for the same generation: the same conditioning byte for byte, latents that continue the last ones, and no other
//! unfinished generation that they might continue instead. In doubt the answer is no: that costs speed, and a wrong yes
//! would mix two images. Generations that are not in the slot are remembered as pending, to be told from it.
//!
//! What goes on and what is taken up again, and why that is safe:
//!
//! * **A foreign run leaves the slot alone.** One whose conditioning or latents are not the slot's is computed densely and
//!   becomes a pending one. The slot is where it was, and serves only the run that is due there, by its place in the plan: a
//!   generation that went on under another guise has another place by then. Where places are uncertain (no list of
//!   timesteps) the slot survives only what differs in both.
//! * **A run that may be the slot's or another's contests it.** The caches are dropped.
//! * **Computing in full is always safe**, so what [`Origin`] says decides about speed only: a run that clearly continues a
//!   known generation is computed in full and captures anew what later steps read; the slot is that generation's from then
//!   on, with nothing in it but what this run made. If it was taken for another's, that other one's next run comes at a
//!   place that the slot has passed, and is not served. A pending generation takes the slot only when the slot's own
//!   generation has not come by since that one did.
//! * **A timestep that is evaluated twice** (Heun) leaves the slot at the same place, so the argument above does not hold:
//!   of two clients that are a hair apart one could take the other's place. It is taken for the slot's own generation only
//!   if that began at the plan's first step, no other known generation is anywhere near, and the latents have moved far
//!   less than in a step.
//! * **A run at the step of another generation's last one** may be that one sent again, or a twin's: it is an obstacle to
//!   serving and never an origin. Finished generations are remembered for that too. A pending one is forgotten when something
//!   continues it only where nothing else is near; otherwise it stays, and is no obstacle to what came from it.
//! * **Generations that were fed the same bytes since they began are one**: their caches are equal. Whether they were is
//!   known by a digest of everything that each run was fed.
//!
//! The state is a session's, so nothing here needs to tell sessions apart: initializers that session options override, other
//! weights and other models are other sessions. Inputs that cannot be read (strings) equal nothing, themselves included.
//!
//! | module | owns |
//! |---|---|
//! | `feed` | tensors as they are fed |
//! | `digest` | whether two are the same, byte for byte |
//! | `latents` | how far apart latents are |
//! | `run_signature` | what one run shows |
//! | `schedule_inputs` | inputs that move with the steps |

mod digest;
mod feed;
mod latents;
mod run_signature;
mod schedule_inputs;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::Arc;

use self::digest::{Digest, digest_of};
use self::schedule_inputs::ScheduleInputDetector;
use super::schedule::Schedule;

pub use self::feed::{Feed, Values};
pub use self::latents::LatentSample;
pub use self::run_signature::{InputDigest, RunSignature};

/// Latents whose relative distance to the last ones is at least this do not continue them. Independent noise is at
/// √2 ≈ 1.41; one step of a 10-step schedule moves about 0.13, a whole generation about 1.
pub(super) const CONTINUES: f64 = 0.9;

/// Generations that start from one image (image-to-image) resemble one another whatever their noise. For those the bound
/// follows the schedule: a step over the part `p` of the range of timesteps moves latents by at most about 3.5·p (a
/// linear β schedule, where it is steepest).
fn reach_of_step(part: f64) -> f64 {
    (0.15 + 5.0 * part).min(CONTINUES)
}

/// Latents must be this much nearer to the slot's than to those of any other unfinished generation. One step moves all
/// generations of a schedule the same way, from their noise toward their image; to pass for the next step of another
/// one, two generations of one seed would have to differ along just that direction. Those that differ in their guidance
/// scale stay near each other for some steps, and count as ambiguous.
const CLEARLY_NEARER: f64 = 0.4;

/// A run that is not served is taken to continue the generation it is this much nearer to than to any other. Successive
/// states of one generation are at about 1 : 2.
const NEARER: f64 = 0.6;

/// A timestep that is evaluated twice corrects what a step did, by less than this part of it.
const CORRECTION: f64 = 0.4;

/// Generations that are remembered, of 16 KiB each at most. Where inputs move and are not detected yet every run leaves one.
const MAX_PENDING: usize = 256;

/// Runs of others that a generation may miss at least, however short the plan.
const MIN_IDLE_RUNS: usize = 16;

/// An unfinished generation that has not had a run while others had as many as this many generations have is over.
const MAX_IDLE_GENERATIONS: u64 = 4;

/// Where a run stands in the plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct At {
    pub place: usize,
    /// The timestep.
    pub value: f64,
}

/// Where an unfinished generation stands: its last run.
#[derive(Clone, Debug)]
struct PendingGeneration {
    /// Unique in the tracker.
    id: u64,
    /// Positions that it probably came from, and that may be another generation's all the same: no obstacle to this one.
    ancestors: Vec<u64>,
    at: At,
    /// The place of its first run, as far as it is known.
    first: usize,
    /// The turn at which it was seen last.
    seen: u64,
    /// Per branch, where it is known.
    conditioning: [Option<(Vec<InputDigest>, At)>; 2],
    latents: LatentSample,
    /// How far the last step moved the latents.
    moved: Option<f64>,
    /// Of everything that its runs were fed since they began; `None` if that is not known.
    history: Option<Digest>,
}

impl PendingGeneration {
    fn same_history(&self, other: Option<Digest>) -> bool {
        self.history.is_some() && self.history == other
    }

    fn history_after(&self, signature: &RunSignature) -> Option<Digest> {
        digest_of([self.history, signature.digest()])
    }
}

/// The generation that a run clearly continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Slot,
    /// One that is not in the slot.
    Pending(usize),
    Unknown,
}

/// What is remembered about anonymous runs, besides the caches.
#[derive(Debug)]
pub(super) struct ContinuityTracker {
    schedule: Arc<Schedule>,
    /// Anonymous runs so far.
    turn: u64,
    /// Turns after which a generation that has not come by again is over.
    max_idle_turns: u64,
    /// Two generations were seen at once: nothing is served until one starts anew, or is taken up again.
    pub ambiguous: bool,
    /// The generation that has the caches.
    slot: Option<PendingGeneration>,
    /// Boxed, so that the list is short however many there are.
    pending: VecDeque<Box<PendingGeneration>>,
    last_id: u64,
    /// Where the run at hand goes on if it is not served: what [`ContinuityTracker::forget_streak`] found out of the runs
    /// before it.
    resume_at: Option<(usize, Option<Digest>)>,
    /// When the last of those that there was no room for was seen. While it may come by nobody is served.
    last_dropped: Option<u64>,
    schedule_inputs: ScheduleInputDetector,
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

    /// Whether a run continues the slot's generation and no other. Others are told apart by their place too, if places
    /// are certain.
    pub fn continues(&self, at: At, signature: &RunSignature) -> bool {
        let Some(slot) = self.slot.as_ref().filter(|_| self.last_dropped.is_none()) else {
            return false;
        };
        let branch = self.branch(at);
        if branch == 1 && !self.same_step(signature) {
            return false;
        }
        // The second run of the first step shows its conditioning for the first time.
        if slot.conditioning[branch].is_none() && branch == 0 {
            return false;
        }
        if !self.fits(slot, at, signature) {
            return false;
        }
        // A step moves latents. Those that have not moved are another generation's of the same seed, whose timestep differs
        // by a little, where that looks like a later step: before the second one if steps are only counted, and in a row of
        // the plan that serves several.
        let may_be_same_step = match self.schedule.is_certain() {
            true => at.place == slot.at.place,
            false => slot.at.place <= slot.first + 1,
        };
        if branch == 0 && may_be_same_step && self.same_step(signature) {
            return false;
        }
        let own = slot.latents.distance(&signature.latents);
        let then = slot.history_after(signature);
        own < self.reach(slot, at)
            && self
                .pending
                .iter()
                .filter(|generation| self.may_be(generation, at, signature))
                // One that was fed what the slot was fed, or was with this run, is the same generation.
                .filter(|generation| !generation.same_history(slot.history))
                .filter(|generation| !generation.same_history(then))
                .filter(|generation| !slot.ancestors.contains(&generation.id))
                .map(|generation| generation.latents.distance(&signature.latents))
                .all(|other| match self.schedule.is_certain() {
                    true => own < CLEARLY_NEARER * other,
                    // The slot may have gone a step further than the other one: its next run would look like the
                    // slot's own. Only places could tell.
                    false => other >= CONTINUES,
                })
    }

    /// Whether a run that is not served is certainly not the slot's own.
    pub fn is_foreign(&self, at: At, signature: &RunSignature) -> bool {
        let Some(slot) = self.slot.as_ref().filter(|_| !self.ambiguous) else {
            return false;
        };
        let differs = !self.fits(slot, at, signature);
        let far = slot.latents.distance(&signature.latents) >= self.reach(slot, at);
        match self.schedule.is_certain() {
            true => differs || far,
            false => differs && far,
        }
    }

    /// The generation that a run clearly continues, wherever in it the run is. Only where places are certain and
    /// conditioning is known in full.
    pub fn origin(&self, at: At, signature: &RunSignature) -> Origin {
        let mut near = self.near(at, signature);
        near.sort_by(|a, b| a.1.total_cmp(&b.1));
        if let Some(&(nearest, ..)) = near.first() {
            let position = |origin| match origin {
                Origin::Slot => self.slot.as_ref(),
                Origin::Pending(i) => self.pending.get(i).map(|generation| &**generation),
                Origin::Unknown => None,
            };
            let ancestors = position(nearest).map_or(&[][..], |nearest| &nearest.ancestors);
            near.retain(|(other, ..)| position(*other).is_none_or(|p| !ancestors.contains(&p.id)));
        }
        match near[..] {
            [(origin, _, true)] => origin,
            [(origin, nearest, true), (_, next, _), ..] if nearest < CLEARLY_NEARER * next => {
                origin
            }
            _ => Origin::Unknown,
        }
    }

    /// Whether a run that continues the slot evaluates the timestep of its last run again.
    pub fn corrects(&self, at: At, signature: &RunSignature) -> bool {
        let Some(slot) = &self.slot else {
            return false;
        };
        slot.first == 0
            && self.near(at, signature).len() == 1
            && slot
                .moved
                .is_some_and(|step| slot.latents.distance(&signature.latents) < CORRECTION * step)
    }

    /// Known generations that a run may continue: how far they are, and whether a step may have moved latents that far.
    fn near(&self, at: At, signature: &RunSignature) -> Vec<(Origin, f64, bool)> {
        if !self.schedule.is_certain() || self.schedule.runs_per_step() > 1 {
            return Vec::new();
        }
        let passed = |slot: &&PendingGeneration| slot.at.place <= at.place;
        let slot = self.slot.iter().filter(|_| !self.ambiguous).filter(passed);
        let pending = self.pending.iter().enumerate();
        slot.map(|slot| (Origin::Slot, slot))
            .chain(pending.map(|(i, generation)| (Origin::Pending(i), &**generation)))
            .filter(|(_, position)| self.may_be(position, at, signature))
            .map(|(origin, position)| {
                let distance = position.latents.distance(&signature.latents);
                let sure =
                    distance < self.reach(position, at) && self.fits(position, at, signature);
                let repeat = origin != Origin::Slot && self.is_repeat(position, at);
                (origin, distance, sure && !repeat)
            })
            .filter(|(_, distance, _)| *distance < CONTINUES)
            .collect()
    }

    /// Whether the slot's generation, if there is one, has not come by since that pending one did.
    pub fn slot_is_idle_since(&self, generation: usize) -> bool {
        let (Some(slot), Some(generation)) = (&self.slot, self.pending.get(generation)) else {
            return true;
        };
        self.ambiguous || self.is_last(slot.at) || slot.seen < generation.seen
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

    /// Whether the slot's generation has no runs to come, or there is none.
    pub fn slot_is_free(&self) -> bool {
        self.slot.as_ref().is_none_or(|slot| self.is_last(slot.at))
    }

    /// Whether this could be the second run of the step that the slot has seen the first run of: guidance feeds both
    /// the same latents.
    pub fn same_step(&self, signature: &RunSignature) -> bool {
        self.slot
            .as_ref()
            .is_some_and(|slot| slot.latents.identical(&signature.latents))
    }

    /// Whether the conditioning of `branch` has been seen, and can vouch for a run of that branch.
    pub fn knows(&self, branch: usize) -> bool {
        let slot = self.slot.as_ref();
        slot.is_some_and(|slot| slot.conditioning[branch].is_some())
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

    fn branch(&self, at: At) -> usize {
        at.place % self.schedule.runs_per_step()
    }

    /// Whether `at` is the plan's last run. Another schedule may have more.
    fn is_last(&self, at: At) -> bool {
        at.place + 1 >= self.schedule.runs()
    }

    /// Whether a run is at the step of a generation's last one: that may be sent again, or another generation's that has come
    /// as far. Nothing can tell, so it is an obstacle and never the origin.
    fn is_repeat(&self, generation: &PendingGeneration, at: At) -> bool {
        (self.schedule).is_same_step(generation.at.place, generation.at.value, at.place, at.value)
    }

    fn may_reach(&self, generation: &PendingGeneration, at: At) -> bool {
        let PendingGeneration { at: last, .. } = generation;
        !self.schedule.is_certain()
            || (self.schedule).may_reach(last.place, last.value, at.place, at.value)
    }

    /// How far latents may have moved to the run at `at` and still be the same generation's.
    fn reach(&self, position: &PendingGeneration, at: At) -> f64 {
        match self.schedule.is_certain() && position.first > 0 {
            true => reach_of_step(self.schedule.part(position.at.value, at.value)),
            false => CONTINUES,
        }
    }

    /// Whether the conditioning of a run is that of a generation. Unknown conditioning fits everything.
    fn fits(&self, position: &PendingGeneration, at: At, signature: &RunSignature) -> bool {
        self.compare(position, at, signature, ScheduleInputDetector::fits)
    }

    /// Whether the run may be of that generation: what another one is told by.
    fn may_be(&self, position: &PendingGeneration, at: At, signature: &RunSignature) -> bool {
        self.may_reach(position, at)
            && self.compare(position, at, signature, ScheduleInputDetector::may_fit)
    }

    fn compare(
        &self,
        position: &PendingGeneration,
        at: At,
        signature: &RunSignature,
        fits: impl Fn(&ScheduleInputDetector, usize, (&InputDigest, At), (&InputDigest, At)) -> bool,
    ) -> bool {
        let Some((known, then)) = &position.conditioning[self.branch(at)] else {
            return true;
        };
        known.len() == signature.conditioning.len()
            && known
                .iter()
                .zip(&signature.conditioning)
                .enumerate()
                .all(|(i, (a, b))| fits(&self.schedule_inputs, i, (a, *then), (b, at)))
    }
}
