//! How a run that begins relates to its request: whether it starts a generation, goes on with one, has to catch up, or
//! meets another run. `anonymous` has what is particular to runs without an id.

use std::sync::Arc;

use super::cached::Cached;
use super::call::{ANONYMOUS, Call};
use super::continuity::ContinuityTracker;
use super::layer_decision::{Mode, Sharing};
use super::notice::Notice;
use super::run::{Ownership, Run};
use super::schedule::{At, PlanPosition, Progress};
use super::session::{Decision, DeferredDrop, Inner, Request, Session};

impl<T: Cached> Session<T> {
    /// How the run of `call` relates to its request, and what of the request's it gets.
    pub(super) fn decide(
        &self,
        inner: &mut Inner<T>,
        call: &Call,
        now: u64,
        notices: &mut Vec<Notice>,
        deferred: &mut DeferredDrop<T>,
    ) -> Decision<T> {
        let Some(value) = call.timestep.filter(|value| value.is_finite()) else {
            return self.unplanned(notices);
        };
        self.make_room(inner, call.request, deferred);
        let request = inner.requests.entry(call.request).or_insert_with(|| {
            Request::new(now, ContinuityTracker::new(Arc::clone(&self.schedule)))
        });
        request.last_used = now;
        let Some(at) = self.locate(request, call, value) else {
            return self.unplanned(notices);
        };
        if let Some(other) = request.in_flight.clone() {
            if call.start && call.request != ANONYMOUS {
                // The caller says that whatever ran under this id is over.
                other.revoke();
                request.in_flight = None;
            } else {
                return self.collide(request, call, &other, at);
            }
        }
        if call.request == ANONYMOUS {
            self.decide_anonymous(request, call, at, notices, deferred)
        } else {
            self.decide_named(request, call, at, deferred)
        }
    }

    /// The place of a run with timestep `value` after those of its request; `None` if it is off the plan.
    fn locate(&self, request: &mut Request<T>, call: &Call, value: f64) -> Option<At> {
        // Two runs of one step have the same latents; others cannot be the second run.
        let second = call
            .signature
            .as_ref()
            .is_none_or(|signature| request.continuity.same_step(signature));
        let PlanPosition::At(place) =
            self.schedule
                .locate(value, &request.progress, call.start, second)
        else {
            // Not of the generation at hand, but seen: a start over is recognised by what came before.
            if !self.schedule.is_certain() {
                request.progress.observe(value);
            }
            return None;
        };
        let step = place / self.compiled_plan.runs_per_step();
        if !self.schedule.lists(step, value) {
            self.count(|c| &c.off_schedule, 1);
        }
        Some(At { place, value })
    }

    /// The plan says nothing about this run.
    fn unplanned(&self, notices: &mut Vec<Notice>) -> Decision<T> {
        self.count(|c| &c.unplanned, 1);
        notices.push(Notice::Unplanned);
        Decision::dense()
    }

    /// What a run of a request with an id gets, by its place after the last one.
    fn decide_named(
        &self,
        request: &mut Request<T>,
        call: &Call,
        at: At,
        deferred: &mut DeferredDrop<T>,
    ) -> Decision<T> {
        let At { place, value } = at;
        let progress = &request.progress;
        if call.start || self.schedule.begins(place, value, progress) || progress.place.is_none() {
            return self.start(request, at, deferred);
        }
        let same_shapes = self.same_shapes(request, call, at);
        if !self.schedule.follows(place, value, &request.progress) || !same_shapes {
            if !same_shapes {
                self.count(|c| &c.shape_changes, 1);
            }
            return self.catch_up(request, at, deferred);
        }
        self.go_on(request, call, at, true)
    }

    /// Whether a run is fed what the last one of its branch was fed, as far as shapes and types go.
    pub(super) fn same_shapes(&self, request: &Request<T>, call: &Call, at: At) -> bool {
        let branch = at.place % self.compiled_plan.runs_per_step();
        request.shapes[branch]
            .as_ref()
            .is_none_or(|shapes| *shapes == call.shapes)
    }

    /// A generation begins, at the first step as planned, elsewhere with everything captured anew.
    pub(super) fn start(
        &self,
        request: &mut Request<T>,
        at: At,
        deferred: &mut DeferredDrop<T>,
    ) -> Decision<T> {
        self.count(|c| &c.generations, 1);
        request.progress = Progress::default();
        let mut decision = self.recapture(request, at, deferred);
        if at.place == 0 {
            decision.mode = Mode::Planned;
        }
        decision
    }

    /// A generation goes on elsewhere than where its caches end.
    pub(super) fn catch_up(
        &self,
        request: &mut Request<T>,
        at: At,
        deferred: &mut DeferredDrop<T>,
    ) -> Decision<T> {
        self.count(|c| &c.discontinuities, 1);
        self.recapture(request, at, deferred)
    }

    /// The caches are of no use: full attention everywhere, capturing what later steps read.
    fn recapture(
        &self,
        request: &mut Request<T>,
        at: At,
        deferred: &mut DeferredDrop<T>,
    ) -> Decision<T> {
        deferred.push(std::mem::take(&mut request.caches));
        request.shapes = [None, None];
        Decision {
            mode: Mode::Recapture,
            ownership: Ownership::Owner,
            at: Some(at),
            caches: Vec::new(),
            sharing: Sharing::Allowed,
        }
    }

    /// The step that is due. `may_share` says whether a second run may take what the first one left.
    pub(super) fn go_on(
        &self,
        request: &mut Request<T>,
        call: &Call,
        at: At,
        may_share: bool,
    ) -> Decision<T> {
        let second = at.place % self.compiled_plan.runs_per_step() == 1;
        let alike = || request.shapes[0].as_ref() == Some(&call.shapes);
        let sharing = match may_share {
            false => Sharing::Unknown,
            true if second && !alike() => Sharing::Unlike,
            true => Sharing::Allowed,
        };
        Decision {
            mode: if second && request.recapturing {
                Mode::Recapture
            } else {
                Mode::Planned
            },
            ownership: Ownership::Owner,
            at: Some(at),
            caches: std::mem::take(&mut request.caches),
            sharing,
        }
    }

    /// Another run of this request is in flight: this one is computed densely. Where its caches could be of use if
    /// the other run turns out to be dead, it captures them.
    fn collide(
        &self,
        request: &mut Request<T>,
        call: &Call,
        other: &Arc<Run<T>>,
        at: At,
    ) -> Decision<T> {
        self.count(|c| &c.collisions, 1);
        if call.request == ANONYMOUS {
            if let Some(signature) = &call.signature {
                let in_flight = other.context.signature.as_ref();
                request.continuity.note(at, signature, in_flight);
            }
            if at.place != 0 && !call.start {
                return Decision::dense();
            }
        }
        Decision {
            mode: Mode::Recapture,
            ownership: Ownership::Successor {
                of: Arc::downgrade(other),
                activity: other.activity(),
            },
            at: Some(at),
            caches: Vec::new(),
            sharing: Sharing::Unknown,
        }
    }
}
