//! The requests of one session: how runs begin, complete and fail.
//!
//! One lock, held for decisions only; hashing happens before it, attention after it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::caches::LayerCaches;
use super::compiled_plan::CompiledPlan;
use super::continuity::{At, ContinuityTracker, RunSignature};
use super::counters::Counters;
use super::directive::{DecisionContext, Mode, Rows, Sharing, Shortfall, Work};
use super::notice::Notice;
use super::process::{Process, room_for_one};
use super::request::Request;
use super::run::{Ownership, Run, RunContext, Slot};
use super::schedule::{PlanPosition, Progress, Schedule, SchedulePolicy};
use super::{Cached, StateError, list};

/// The request id of runs that do not name one.
const ANONYMOUS: i64 = 0;

/// Requests a session remembers. What they cache is bounded by the budget; this bounds the bookkeeping, which is a few
/// hundred bytes per layer.
const MAX_REQUESTS: usize = 4096;

/// A run in flight that has shown no sign of life for so long is dead, whatever the idle limit says.
const DEAD_RUN_MS: u64 = 600_000;

/// The same for a run whose request another run has taken over.
const DEAD_REVOKED_RUN_MS: u64 = 60_000;

/// Everything the state machine wants to know of a run that begins.
#[derive(Clone, Debug)]
pub struct Call {
    /// `None` if the elements of the timestep tensor differ, or there are none.
    pub timestep: Option<f64>,
    /// 0: anonymous.
    pub request: i64,
    pub start: bool,
    pub end: bool,
    /// Rows of the batch.
    pub rows: usize,
    pub shapes: FeedShapes,
    /// Needed if `request` is 0: without it an anonymous run is never served from a cache. Of use with
    /// `cfg: separate` too, where it tells the second run of a step from another first one.
    pub signature: Option<RunSignature>,
}

/// Shapes and types of what the model is fed. Two runs of one generation have the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FeedShapes(pub Vec<(u32, Vec<usize>)>);

/// The requests of one session.
#[derive(Debug)]
pub struct Session<T> {
    process: Arc<Process<T>>,
    pub(super) compiled_plan: Arc<CompiledPlan>,
    pub(super) schedule: Arc<Schedule>,
    pub counters: Counters,
    noticed: AtomicU32,
    inner: Mutex<Inner<T>>,
}

#[derive(Debug)]
struct Inner<T> {
    requests: HashMap<i64, Request<T>>,
    /// Runs in flight, dead ones included.
    runs: HashMap<i64, Arc<Run<T>>>,
}

/// What is to be freed once no lock is held. Lists of caches rather than caches, so that it hardly takes memory.
pub(super) type DeferredDrop<T> = Vec<Vec<LayerCaches<T>>>;

/// How a run relates to its request, decided under the lock.
pub(super) struct Decision<T> {
    mode: Mode,
    ownership: Ownership<T>,
    at: Option<At>,
    caches: Vec<LayerCaches<T>>,
    sharing: Sharing,
}

impl<T> Decision<T> {
    pub(super) fn dense() -> Self {
        Decision {
            mode: Mode::Dense,
            ownership: Ownership::None,
            at: None,
            caches: Vec::new(),
            sharing: Sharing::Unknown,
        }
    }
}

impl<T: Cached> Session<T> {
    pub fn new(
        process: Arc<Process<T>>,
        compiled_plan: CompiledPlan,
        fed: SchedulePolicy,
    ) -> Arc<Self> {
        let plan = compiled_plan.plan();
        let schedule = Arc::new(Schedule::new(
            plan.timesteps.as_deref(),
            plan.step_count(),
            compiled_plan.runs_per_step(),
            fed,
        ));
        let session = Arc::new(Session {
            process: Arc::clone(&process),
            schedule,
            compiled_plan: Arc::new(compiled_plan),
            counters: Counters::default(),
            noticed: AtomicU32::new(0),
            inner: Mutex::new(Inner {
                requests: HashMap::new(),
                runs: HashMap::new(),
            }),
        });
        process.add_session(&session);
        session
    }

    /// Whether [`Call::signature`] is of use even if the run has a request id.
    pub fn needs_signature(&self) -> bool {
        self.compiled_plan.runs_per_step() > 1
    }

    /// Requests that the session remembers.
    pub fn live_requests(&self) -> usize {
        let inner = self.lock();
        inner.requests.values().filter(|r| !r.is_blank()).count()
    }

    /// A run begins: finds its place, decides what every layer does, and hands it the caches of its request.
    ///
    /// # Errors
    /// If there is no memory for its bookkeeping. Nothing has happened then, or at worst the request has lost its caches.
    pub fn begin(self: &Arc<Self>, call: Call) -> Result<(Arc<Run<T>>, Vec<Notice>), StateError> {
        let now = self.process.now();
        let layer_count = self.compiled_plan.layers();
        let mut layers = list("the layers of a run", layer_count)?;
        let home = list("the caches of a run", layer_count)?;
        let mut notices = Vec::new();
        // Declared before the lock so that what dies is freed after it.
        let mut deferred = Vec::new();
        let mut inner = self.lock();
        self.reclaim_idle(&mut inner, now, &mut deferred);
        room_for_one(&mut inner.runs, "runs in flight")?;
        room_for_one(&mut inner.requests, "requests")?;

        self.count(|c| &c.steps, 1);
        let evict_before = inner
            .requests
            .get(&call.request)
            .map_or(0, |request| request.last_used);
        let decision = self.decide(&mut inner, &call, now, &mut notices, &mut deferred);
        if decision.mode != Mode::Planned {
            self.count(|c| &c.dense_steps, 1);
        }

        let runs_per_step = self.compiled_plan.runs_per_step();
        let place = decision.at.map_or(0, |at| at.place);
        let context = DecisionContext {
            compiled_plan: &self.compiled_plan,
            schedule: &self.schedule,
            now: decision.at.map_or(f64::NAN, |at| at.value),
            mode: decision.mode,
            step: place / runs_per_step,
            branch: place % runs_per_step,
            halves: self.compiled_plan.has_halves(call.rows),
            sharing: decision.sharing,
        };
        let mut cached = decision.caches.into_iter();
        for layer in 0..layer_count {
            let mut caches = cached.next().unwrap_or_default();
            self.count(|c| &c.non_finite, caches.drop_unsound() as u64);
            let (directive, shortfall) = context.decide(layer, &mut caches);
            self.count_layer(directive.work, directive.rows, shortfall);
            layers.push(Slot::new(directive, caches));
        }
        if decision.mode == Mode::Planned
            && !context.halves
            && self.compiled_plan.batch_has_halves()
        {
            let row = &self.compiled_plan.plan().steps[context.step];
            if row.iter().any(|action| action.uses_halves()) {
                notices.push(Notice::OddRows { rows: call.rows });
            }
        }
        if decision.mode == Mode::Planned && decision.sharing == Sharing::Unlike {
            let row = &self.compiled_plan.plan().steps[context.step];
            if row.iter().any(|action| action.uses_halves()) {
                notices.push(Notice::UnlikeRuns);
            }
        }

        let run = Arc::new(Run::new(
            self.process.new_ticket(),
            Arc::clone(&self.process),
            Arc::downgrade(self),
            Arc::clone(&self.compiled_plan),
            context.branch,
            layers,
            home,
            evict_before,
            now,
            RunContext {
                request: call.request,
                ownership: decision.ownership,
                at: decision.at,
                shapes: call.shapes,
                signature: call.signature,
                end: call.end,
                recapturing: decision.mode == Mode::Recapture,
            },
        ));
        self.process.enter(&run)?;
        inner.runs.insert(run.ticket[0], Arc::clone(&run));
        if matches!(run.context.ownership, Ownership::Owner)
            && let Some(request) = inner.requests.get_mut(&call.request)
        {
            request.in_flight = Some(Arc::clone(&run));
        }
        drop(inner);
        drop(deferred);
        if self.counters.over_budget.load(Ordering::Relaxed) > 0 {
            notices.push(Notice::OverBudget);
        }
        notices.retain(|notice| {
            self.noticed.fetch_or(notice.bit(), Ordering::Relaxed) & notice.bit() == 0
        });
        Ok((run, notices))
    }

    fn decide(
        &self,
        inner: &mut Inner<T>,
        call: &Call,
        now: u64,
        notices: &mut Vec<Notice>,
        deferred: &mut DeferredDrop<T>,
    ) -> Decision<T> {
        let unplanned = |notices: &mut Vec<Notice>| {
            self.count(|c| &c.unplanned, 1);
            notices.push(Notice::Unplanned);
            Decision::dense()
        };
        let Some(value) = call.timestep.filter(|value| value.is_finite()) else {
            return unplanned(notices);
        };
        self.make_room(inner, call.request, deferred);
        let request = inner.requests.entry(call.request).or_insert_with(|| {
            Request::new(now, ContinuityTracker::new(Arc::clone(&self.schedule)))
        });
        request.last_used = now;

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
            return unplanned(notices);
        };
        let at = At { place, value };
        if !self
            .schedule
            .lists(place / self.compiled_plan.runs_per_step(), value)
        {
            self.count(|c| &c.off_schedule, 1);
        }

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
            return self.decide_anonymous(request, call, at, notices, deferred);
        }
        if call.start
            || self.schedule.begins(place, value, &request.progress)
            || request.progress.place.is_none()
        {
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
                            other.revoke();
                            others.extend(other.give_up_residuals());
                            self.count(|c| &c.aborted, 1);
                            request.continuity.begin();
                            // The successor's generation is in the slot now. The dead run's client may not know, and go on,
                            // unless it was the successor that tried again.
                            if let Some(own) = &context.signature {
                                request.continuity.restore(own);
                                if let (Some(at), Some(signature)) =
                                    (other.context.at, &other.context.signature)
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
                if let Some(at) = context.at {
                    let branch = at.place % self.compiled_plan.runs_per_step();
                    request.progress.advance(at.place, at.value);
                    request.shapes[branch] = Some(context.shapes.clone());
                    if let Some(signature) = &context.signature {
                        let first = request.progress.first_place.unwrap_or(at.place);
                        request.continuity.advance(at, first, signature.clone());
                    }
                }
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

    /// Forgets requests that have been idle for too long and runs that are dead.
    fn reclaim_idle(&self, inner: &mut Inner<T>, now: u64, deferred: &mut DeferredDrop<T>) {
        let limit = self.process.limits.idle_ms;
        let Inner { requests, runs } = inner;
        let dead = runs.extract_if(|_, run| {
            let timeout = if run.is_revoked() {
                DEAD_REVOKED_RUN_MS
            } else {
                limit.max(DEAD_RUN_MS)
            };
            now.saturating_sub(run.touched()) > timeout
        });
        for (id, run) in dead {
            self.process.forget(id);
            // One that another run took over was counted then.
            if !run.is_revoked() {
                self.count(|c| &c.aborted, 1);
            }
            run.revoke();
            for request in requests.values_mut() {
                if request.owned_by(&run) {
                    request.in_flight = None;
                }
            }
            deferred.push(run.take_caches());
        }
        requests.retain(|id, request| {
            let idle = now.saturating_sub(request.last_used) > limit;
            if !idle || request.in_flight.is_some() || request.is_blank() {
                return true;
            }
            self.count(|c| &c.idle_reclaims, 1);
            deferred.push(request.retire());
            request.continuity.forget();
            *id == ANONYMOUS
        });
    }

    /// Makes room for the bookkeeping of one more request.
    fn make_room(&self, inner: &mut Inner<T>, coming: i64, deferred: &mut DeferredDrop<T>) {
        if inner.requests.len() < MAX_REQUESTS || inner.requests.contains_key(&coming) {
            return;
        }
        let oldest = inner
            .requests
            .iter()
            .filter(|(_, request)| request.in_flight.is_none())
            .min_by_key(|(_, request)| request.last_used)
            .map(|(id, _)| *id);
        if let Some(mut request) = oldest.and_then(|id| inner.requests.remove(&id)) {
            self.count(|c| &c.evictions, 1);
            deferred.push(std::mem::take(&mut request.caches));
        }
    }

    /// The request that caches something and was not used for the longest time: when that was, and its id.
    pub(super) fn longest_idle(&self) -> Option<(u64, i64)> {
        let inner = self.lock();
        inner
            .requests
            .iter()
            .filter(|(_, request)| request.in_flight.is_none() && holds_tensors(&request.caches))
            .map(|(id, request)| (request.last_used, *id))
            .min()
    }

    /// Drops what a request caches; false if a run has taken it meanwhile.
    pub(super) fn evict(&self, id: i64) -> bool {
        let mut inner = self.lock();
        let Some(request) = inner.requests.get_mut(&id) else {
            return false;
        };
        if request.in_flight.is_some() {
            return false;
        }
        let caches = std::mem::take(&mut request.caches);
        drop(inner);
        self.count(|c| &c.evictions, 1);
        holds_tensors(&caches)
    }

    fn lock(&self) -> MutexGuard<'_, Inner<T>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, which: impl Fn(&Counters) -> &AtomicU64, by: u64) {
        which(&self.counters).fetch_add(by, Ordering::Relaxed);
        which(&self.process.counters).fetch_add(by, Ordering::Relaxed);
    }

    fn count_layer(&self, work: Work, rows: Rows, shortfall: Shortfall) {
        match work {
            Work::Full => self.count(|c| &c.layers_full, 1),
            Work::Window => self.count(|c| &c.layers_window, 1),
            Work::Reuse => self.count(|c| &c.layers_reused, 1),
        }
        if rows == Rows::Half {
            self.count(|c| &c.layers_halved, 1);
        }
        if shortfall.missing {
            self.count(|c| &c.misses, 1);
        }
        if shortfall.recompute {
            self.count(|c| &c.recomputes, 1);
        }
    }
}

impl<T> Drop for Session<T> {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        for id in std::mem::take(&mut inner.runs).into_keys() {
            self.process.forget(id);
        }
    }
}

fn holds_tensors<T>(caches: &[LayerCaches<T>]) -> bool {
    caches.iter().any(|layer| {
        layer.residual.iter().any(Option::is_some) || layer.output.iter().any(|o| !o.is_empty())
    })
}
