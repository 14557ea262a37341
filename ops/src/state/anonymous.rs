//! What a run without a request id gets, by what the guard knows of it.

use super::Cached;
use super::guard::{At, Origin};
use super::notice::Notice;
use super::request::Request;
use super::schedule::Trail;
use super::session::{Call, Decision, Graveyard, Session};

impl<T: Cached> Session<T> {
    /// How an anonymous run relates to the slot. `guard` says why each answer is safe.
    pub(super) fn decide_anonymous(
        &self,
        request: &mut Request<T>,
        call: &Call,
        at: At,
        notices: &mut Vec<Notice>,
        graveyard: &mut Graveyard<T>,
    ) -> Decision<T> {
        let At { place, value } = at;
        let schedule = &self.schedule;
        let Some(evidence) = &call.evidence else {
            self.count(|c| &c.contested, 1);
            return Decision::dense();
        };
        request.guard.watch(at, evidence);
        let trail = &request.trail;
        let unclaimed = trail.place.is_none() && !request.guard.contested;
        if call.start || schedule.begins(place, value, trail) || unclaimed {
            request.guard.begin();
            return self.start(request, at, graveyard);
        }
        if schedule.follows(place, value, trail)
            && !request.guard.contested
            && self.same_shapes(request, call, at)
            && request.guard.continues(at, evidence)
        {
            let may_share = request.guard.knows(place % self.program.runs_per_step());
            return self.go_on(request, call, at, may_share);
        }
        let behind = schedule.is_behind(place, value, trail);
        match request.guard.origin(at, evidence) {
            Origin::Slot if !behind => return self.catch_up(request, at, graveyard),
            Origin::Slot
                if schedule.repeats(place, value, trail)
                    && request.guard.corrects(at, evidence) =>
            {
                return self.catch_up(request, at, graveyard);
            }
            Origin::Strand(strand) if request.guard.slot_is_idle_since(strand) => {
                let first = request.guard.take_up(strand);
                request.trail = Trail::resumed(first);
                return self.catch_up(request, at, graveyard);
            }
            Origin::Strand(_) => {}
            // Nobody's known: another generation, which starts midway.
            Origin::Slot | Origin::Unknown => {
                let free = request.guard.slot_is_free() || !schedule.is_certain();
                let starts_alike = trail.first_place == Some(place);
                if starts_alike || (behind && free && !request.guard.contested) {
                    request.guard.begin();
                    return self.start(request, at, graveyard);
                }
            }
        }
        self.count(|c| &c.contested, 1);
        notices.push(Notice::Contested);
        if !request.guard.contested && !request.guard.is_foreign(at, evidence) {
            request.guard.contest();
            graveyard.push(std::mem::take(&mut request.caches));
        }
        if !schedule.is_certain() && request.guard.contested {
            request.trail.observe(value);
        }
        request.guard.note(at, evidence, None);
        Decision::dense()
    }
}
