//! What a run without a request id gets, by what the continuity tracker knows of it.

use super::cached::Cached;
use super::call::Call;
use super::continuity::Origin;
use super::notice::Notice;
use super::schedule::{At, Progress};
use super::session::{Decision, DeferredDrop, Request, Session};

impl<T: Cached> Session<T> {
    /// How an anonymous run relates to the slot. `continuity` says why each answer is safe.
    pub(super) fn decide_anonymous(
        &self,
        request: &mut Request<T>,
        call: &Call,
        at: At,
        notices: &mut Vec<Notice>,
        deferred: &mut DeferredDrop<T>,
    ) -> Decision<T> {
        let At { place, value } = at;
        let schedule = &self.schedule;
        let Some(signature) = &call.signature else {
            self.count(|c| &c.contested, 1);
            return Decision::dense();
        };
        request.continuity.observe(at, signature);
        let progress = &request.progress;
        let unclaimed = progress.place.is_none() && !request.continuity.ambiguous;
        if call.start || schedule.begins(place, value, progress) || unclaimed {
            request.continuity.begin();
            return self.start(request, at, deferred);
        }
        if schedule.follows(place, value, progress)
            && !request.continuity.ambiguous
            && self.same_shapes(request, call, at)
            && request.continuity.continues(at, signature)
        {
            let may_share = request
                .continuity
                .knows(place % self.compiled_plan.runs_per_step());
            return self.go_on(request, call, at, may_share);
        }
        let behind = schedule.is_behind(place, value, progress);
        match request.continuity.origin(at, signature) {
            Origin::Slot if !behind => return self.catch_up(request, at, deferred),
            Origin::Slot
                if schedule.repeats(place, value, progress)
                    && request.continuity.corrects(at, signature) =>
            {
                return self.catch_up(request, at, deferred);
            }
            Origin::Pending(pending) if request.continuity.slot_is_idle_since(pending) => {
                let first = request.continuity.take_up(pending);
                request.progress = Progress::resumed(first);
                return self.catch_up(request, at, deferred);
            }
            Origin::Pending(_) => {}
            // Nobody's known: another generation, which starts midway.
            Origin::Slot | Origin::Unknown => {
                let free = request.continuity.slot_is_free() || !schedule.is_certain();
                let starts_alike = progress.first_place == Some(place);
                if starts_alike || (behind && free && !request.continuity.ambiguous) {
                    request.continuity.begin();
                    return self.start(request, at, deferred);
                }
            }
        }
        self.count(|c| &c.contested, 1);
        notices.push(Notice::Ambiguous);
        if !request.continuity.ambiguous && !request.continuity.is_foreign(at, signature) {
            request.continuity.mark_ambiguous();
            deferred.push(std::mem::take(&mut request.caches));
        }
        if !schedule.is_certain() && request.continuity.ambiguous {
            request.progress.observe(value);
        }
        request.continuity.note(at, signature, None);
        Decision::dense()
    }
}
