//! What all sessions of a process share: tickets, the memory budget, the clock, the counters.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use super::budget::{Budget, Lease};
use super::cached::Cached;
use super::counters::Counters;
use super::error::StateError;
use super::run::Run;
use super::session::Session;

/// Bounds on what may be cached, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of cached tensors in the whole process.
    pub bytes: u64,
    /// A request that has not run for so long is forgotten.
    pub idle_ms: u64,
}

/// A ticket is looked up by every layer; this many shards keep concurrent runs from meeting at one lock.
const SHARDS: usize = 16;

type Shard<T> = RwLock<HashMap<i64, Arc<Run<T>>>>;

/// The shared state. One static in the library, one per test in tests.
pub struct Process<T> {
    pub limits: Limits,
    pub counters: Counters,
    budget: Arc<Budget>,
    clock: Box<dyn Fn() -> u64 + Send + Sync>,
    runs: Vec<Shard<T>>,
    next_run: AtomicU64,
    secret: std::hash::RandomState,
    sessions: Mutex<Vec<Weak<Session<T>>>>,
}

/// Makes sure that one more entry takes no memory.
pub(super) fn room_for_one<T>(
    map: &mut HashMap<i64, T>,
    what: &'static str,
) -> Result<(), StateError> {
    let twice = (map.len() + 1) * 2;
    map.try_reserve(1)
        .map_err(|_| StateError::no_memory::<(i64, T)>(what, twice))
}

impl<T> std::fmt::Debug for Process<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl<T> Process<T> {
    /// The ticket with this id is void from now on.
    pub(super) fn forget(&self, id: i64) {
        let runs = self.shard(id);
        let mut runs = runs.write().unwrap_or_else(PoisonError::into_inner);
        let run = runs.remove(&id);
        // What the run holds is freed outside the lock.
        drop(runs);
        drop(run);
    }

    fn shard(&self, id: i64) -> &Shard<T> {
        &self.runs[id.unsigned_abs() as usize % SHARDS]
    }
}

impl<T: Cached> Process<T> {
    /// `clock` gives milliseconds since any fixed moment.
    pub fn new(limits: Limits, clock: impl Fn() -> u64 + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Process {
            limits,
            counters: Counters::default(),
            budget: Arc::default(),
            clock: Box::new(clock),
            runs: (0..SHARDS).map(|_| RwLock::default()).collect(),
            next_run: AtomicU64::new(1),
            secret: std::hash::RandomState::new(),
            sessions: Mutex::default(),
        })
    }

    /// The run that a ticket stands for.
    ///
    /// # Errors
    /// If there is none: the numbers were made up, or the run has finished or failed.
    pub fn run(&self, ticket: [i64; 2]) -> Result<Arc<Run<T>>, StateError> {
        let runs = self.shard(ticket[0]);
        let run = runs.read().unwrap_or_else(PoisonError::into_inner);
        run.get(&ticket[0])
            .filter(|run| run.ticket() == ticket)
            .cloned()
            .ok_or(StateError::UnknownTicket(ticket[0], ticket[1]))
    }

    /// A ticket that no run has had. The check word keeps stale or invented ids from hitting a run by chance.
    pub(super) fn new_ticket(&self) -> [i64; 2] {
        let id = self.next_run.fetch_add(1, Ordering::Relaxed);
        [id as i64, self.secret.hash_one(id) as i64]
    }

    /// The run can be found by its ticket from now on.
    ///
    /// # Errors
    /// If there is no memory for one more.
    pub(super) fn enter(&self, run: &Arc<Run<T>>) -> Result<(), StateError> {
        let runs = self.shard(run.ticket()[0]);
        let mut runs = runs.write().unwrap_or_else(PoisonError::into_inner);
        room_for_one(&mut runs, "tickets")?;
        runs.insert(run.ticket()[0], Arc::clone(run));
        Ok(())
    }

    pub(super) fn now(&self) -> u64 {
        (self.clock)()
    }

    pub(super) fn add_session(&self, session: &Arc<Session<T>>) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|session| session.strong_count() > 0);
        // A word each, of sessions that take hundreds of kilobytes.
        sessions.push(Arc::downgrade(session));
    }

    /// The sessions that are alive.
    pub fn sessions(&self) -> Vec<Arc<Session<T>>> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.iter().filter_map(Weak::upgrade).collect()
    }

    /// Runs in flight, in all sessions.
    pub fn runs_in_flight(&self) -> usize {
        self.runs
            .iter()
            .map(|shard| shard.read().unwrap_or_else(PoisonError::into_inner).len())
            .sum()
    }

    /// Bytes cached now.
    pub fn bytes(&self) -> u64 {
        self.budget.used()
    }

    /// The most bytes cached at any time.
    pub fn peak_bytes(&self) -> u64 {
        self.budget.peak()
    }

    /// Takes `bytes` of the budget, if need be from requests that were last used before `evict_before`, longest ago
    /// first. Requests used since then are at work: evicting those would only make them evict this one in turn.
    pub(super) fn reserve(&self, bytes: u64, evict_before: u64, now: u64) -> Option<Lease> {
        loop {
            if let Some(lease) = self.budget.take(bytes, self.limits.bytes) {
                return Some(lease);
            }
            if bytes > self.limits.bytes {
                return None;
            }
            let sessions = self.sessions();
            let victim = sessions
                .iter()
                .filter_map(|session| Some((session.longest_idle()?, session)))
                .min_by_key(|((last_used, _), _)| *last_used);
            let ((last_used, request), session) = victim?;
            let abandoned = now.saturating_sub(last_used) >= ABANDONED_MS;
            if (last_used >= evict_before && !abandoned) || !session.evict(request) {
                return None;
            }
        }
    }

    /// Sets the counters to zero, those of all sessions too. Requests, their caches and runs in flight stay.
    pub fn reset(&self) {
        for session in self.sessions() {
            session.counters.reset();
        }
        self.counters.reset();
        self.budget.reset_peak();
    }
}

/// A request that has been idle for a minute may be evicted by any other, even by one that has just begun.
const ABANDONED_MS: u64 = 60_000;
