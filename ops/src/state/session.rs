//! The requests of one session, and how a run of one of them begins.
//!
//! One lock, held for decisions only; hashing happens before it, attention after it. What is done under it is in three more
//! files: `run_decision` (how a run that begins relates to its request), `completion` (how it ends) and `eviction` (what is
//! forgotten).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cached::Cached;
use super::caches::LayerCaches;
use super::call::Call;
use super::compiled_plan::CompiledPlan;
use super::counters::Counters;
use super::directive::{Rows, Work};
use super::error::{StateError, list};
use super::layer_decision::{DecisionContext, Mode, Sharing, Shortfall};
use super::notice::Notice;
use super::process::{Process, room_for_one};
use super::request;
use super::run::{Ownership, Run, RunContext, RunParts, Slot};
use super::schedule::{At, Schedule, SchedulePolicy};

/// The requests of one session.
#[derive(Debug)]
pub struct Session<T> {
    pub(super) process: Arc<Process<T>>,
    pub(super) compiled_plan: Arc<CompiledPlan>,
    pub(super) schedule: Arc<Schedule>,
    pub counters: Counters,
    pub(super) noticed: AtomicU32,
    pub(super) inner: Mutex<Inner<T>>,
}

#[derive(Debug)]
pub(super) struct Inner<T> {
    pub requests: HashMap<i64, Request<T>>,
    /// Runs in flight, dead ones included.
    pub runs: HashMap<i64, Arc<Run<T>>>,
}

/// One generation of this session, between its runs.
pub(super) type Request<T> = request::Request<T, Run<T>>;

/// What is to be freed once no lock is held. Lists of caches rather than caches, so that it hardly takes memory.
pub(super) type DeferredDrop<T> = Vec<Vec<LayerCaches<T>>>;

/// How a run relates to its request, decided under the lock.
pub(super) struct Decision<T> {
    pub mode: Mode,
    pub ownership: Ownership<T>,
    pub at: Option<At>,
    pub caches: Vec<LayerCaches<T>>,
    pub sharing: Sharing,
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

        let context = self.decision_context(&decision, call.rows);
        self.decide_layers(&context, decision.caches, &mut layers);
        self.notice_lost_sharing(&context, call.rows, &mut notices);

        let run = Arc::new(Run::new(RunParts {
            ticket: self.process.new_ticket(),
            process: Arc::clone(&self.process),
            session: Arc::downgrade(self),
            compiled_plan: Arc::clone(&self.compiled_plan),
            branch: context.branch,
            layers,
            home,
            evict_before,
            now,
            context: RunContext {
                request: call.request,
                ownership: decision.ownership,
                at: decision.at,
                shapes: call.shapes,
                signature: call.signature,
                end: call.end,
                recapturing: decision.mode == Mode::Recapture,
            },
        }));
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

    /// The run as far as decisions about its layers go.
    fn decision_context(&self, decision: &Decision<T>, rows: usize) -> DecisionContext<'_> {
        let runs_per_step = self.compiled_plan.runs_per_step();
        let place = decision.at.map_or(0, |at| at.place);
        DecisionContext {
            compiled_plan: &self.compiled_plan,
            schedule: &self.schedule,
            now: decision.at.map_or(f64::NAN, |at| at.value),
            mode: decision.mode,
            step: place / runs_per_step,
            branch: place % runs_per_step,
            halves: self.compiled_plan.has_halves(rows),
            sharing: decision.sharing,
        }
    }

    /// What each layer does, and the caches it is given.
    fn decide_layers(
        &self,
        context: &DecisionContext<'_>,
        caches: Vec<LayerCaches<T>>,
        layers: &mut Vec<Slot<T>>,
    ) {
        let mut cached = caches.into_iter();
        for layer in 0..self.compiled_plan.layers() {
            let mut caches = cached.next().unwrap_or_default();
            self.count(|c| &c.non_finite, caches.drop_unsound() as u64);
            let (directive, shortfall) = context.decide(layer, &mut caches);
            self.count_layer(directive.work, directive.rows, shortfall);
            layers.push(Slot::new(directive, caches));
        }
    }

    /// Says so where the plan shares between halves of guidance and this run cannot.
    fn notice_lost_sharing(
        &self,
        context: &DecisionContext<'_>,
        rows: usize,
        notices: &mut Vec<Notice>,
    ) {
        if context.mode != Mode::Planned {
            return;
        }
        let row = &self.compiled_plan.plan().steps[context.step];
        if !row.iter().any(|action| action.uses_halves()) {
            return;
        }
        if !context.halves && self.compiled_plan.batch_has_halves() {
            notices.push(Notice::OddRows { rows });
        }
        if context.sharing == Sharing::Unlike {
            notices.push(Notice::UnlikeRuns);
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner<T>> {
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
