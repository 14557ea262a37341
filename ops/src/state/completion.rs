//! How runs end: what of theirs their request keeps.

use std::sync::Arc;

use super::cached::Cached;
use super::caches::Residual;
use super::call::ANONYMOUS;
use super::run::{Ownership, Run, RunContext};
use super::schedule::Progress;
use super::session::{DeferredDrop, Request, Session};

impl<T: Cached> Session<T> {
    /// All layers of `run` have finished.
    pub(super) fn complete(&self, run: &Run<T>) {
        let now = self.process.now();
        let context = &run.context;
        let mut deferred = DeferredDrop::new();
        let mut caches = run.take_caches();
        let mut others = Vec::new();
        let mut inner = self.lock();
        inner.runs.remove(&run.ticket[0]);
        if let Some(request) = inner.requests.get_mut(&context.request) {
            let owns_request = match &context.ownership {
                Ownership::Owner => request.owned_by(run),
                Ownership::Successor { of, activity } => match (of.upgrade(), &request.in_flight) {
                    (Some(other), Some(owner)) if Arc::ptr_eq(&other, owner) => {
                        let dead = !other.is_finished() && other.activity() == *activity;
                        if dead {
                            others.extend(self.succeed(request, context, &other));
                        }
                        dead
                    }
                    _ => false,
                },
                Ownership::None => false,
            };
            if owns_request {
                request.in_flight = None;
                request.last_used = now;
                request.recapturing = context.recapturing;
                std::mem::swap(&mut request.caches, &mut caches);
                self.advance(request, context);
            }
            if context.end && request.in_flight.is_none() {
                if context.request != ANONYMOUS {
                    let removed = inner.requests.remove(&context.request);
                    deferred.extend(removed.map(|request| request.caches));
                } else if owns_request {
                    deferred.push(request.retire());
                }
            }
        }
        drop(inner);
        drop((deferred, caches, others));
    }

    /// The run of `context` takes the request over from `other`, which is dead. Returns what that one can do without.
    fn succeed(
        &self,
        request: &mut Request<T>,
        context: &RunContext<T>,
        other: &Run<T>,
    ) -> Vec<Residual<T>> {
        other.revoke();
        let freed = other.give_up_residuals();
        self.count(|c| &c.aborted, 1);
        request.continuity.begin();
        // The successor's generation is in the slot now. The dead run's client may not know, and go on, unless it was the
        // successor that tried again.
        if let Some(own) = &context.signature {
            request.continuity.restore(own);
            if let (Some(at), Some(signature)) = (other.context.at, &other.context.signature)
                && signature != own
            {
                request.continuity.note(at, signature, Some(own));
            }
        }
        // Where it began and which way it goes stays known, unless it begins here.
        if context.at.is_none_or(|at| at.place == 0) {
            request.progress = Progress::default();
        }
        request.shapes = [None, None];
        freed
    }

    /// The request stands where its run stood.
    fn advance(&self, request: &mut Request<T>, context: &RunContext<T>) {
        let Some(at) = context.at else {
            return;
        };
        let branch = at.place % self.compiled_plan.runs_per_step();
        request.progress.advance(at.place, at.value);
        request.shapes[branch] = Some(context.shapes.clone());
        if let Some(signature) = &context.signature {
            let first = request.progress.first_place.unwrap_or(at.place);
            request.continuity.advance(at, first, signature.clone());
        }
    }

    /// `run` will not finish.
    pub(super) fn failed(&self, run: &Run<T>) {
        let mut inner = self.lock();
        if inner.runs.remove(&run.ticket[0]).is_none() {
            return;
        }
        self.count(|c| &c.aborted, 1);
        if let Some(request) = inner.requests.get_mut(&run.context.request)
            && request.owned_by(run)
        {
            request.in_flight = None;
        }
    }
}
