//! Which generation a run may be of: questions to the tracker, none of which changes it.

use super::latents::CONTINUES;
use super::pending::{Origin, PendingGeneration};
use super::run_signature::{InputDigest, RunSignature};
use super::schedule_inputs::ScheduleInputDetector;
use super::tracker::ContinuityTracker;
use crate::state::schedule::At;

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

/// A timestep that is evaluated twice corrects what a step did, by less than this part of it.
const CORRECTION: f64 = 0.4;

impl ContinuityTracker {
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

    /// Whether the slot's generation, if there is one, has not come by since that pending one did.
    pub fn slot_is_idle_since(&self, generation: usize) -> bool {
        let (Some(slot), Some(generation)) = (&self.slot, self.pending.get(generation)) else {
            return true;
        };
        self.ambiguous || self.is_last(slot.at) || slot.seen < generation.seen
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

    pub(super) fn branch(&self, at: At) -> usize {
        at.place % self.schedule.runs_per_step()
    }

    /// Whether `at` is the plan's last run. Another schedule may have more.
    pub(super) fn is_last(&self, at: At) -> bool {
        at.place + 1 >= self.schedule.runs()
    }

    /// Whether a run is at the step of a generation's last one: that may be sent again, or another generation's that has come
    /// as far. Nothing can tell, so it is an obstacle and never the origin.
    pub(super) fn is_repeat(&self, generation: &PendingGeneration, at: At) -> bool {
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
    pub(super) fn may_be(
        &self,
        position: &PendingGeneration,
        at: At,
        signature: &RunSignature,
    ) -> bool {
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
