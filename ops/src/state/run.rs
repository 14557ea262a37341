//! One run of the model, from its step op to its last layer.
//!
//! A run owns the caches of its request while it lasts, so layers never wait for other runs. It hands them back when
//! its last layer has finished; a run that never gets there takes them with it.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::budget::Lease;
use super::cached::Cached;
use super::caches::{LayerCaches, Residual};
use super::call::FeedShapes;
use super::compiled_plan::CompiledPlan;
use super::continuity::RunSignature;
use super::counters::Counters;
use super::directive::{Directive, Rows, Work};
use super::error::{StateError, list};
use super::process::Process;
use super::schedule::At;
use super::session::Session;

/// One run in flight. Reached through its ticket.
#[derive(Debug)]
pub struct Run<T> {
    pub(super) ticket: [i64; 2],
    pub(super) process: Arc<Process<T>>,
    pub(super) session: Weak<Session<T>>,
    compiled_plan: Arc<CompiledPlan>,
    branch: usize,
    layers: Vec<Slot<T>>,
    /// Where the caches go when the run ends; room for all, so that ending takes no memory.
    home: Mutex<Vec<LayerCaches<T>>>,
    unfinished: AtomicUsize,
    /// Grows whenever a layer does anything: a run whose activity stands still while another one completes is dead.
    activity: AtomicUsize,
    /// When a layer last did anything, in milliseconds.
    touched: AtomicU64,
    /// Another run owns the request now: nothing of this one is kept.
    revoked: AtomicBool,
    /// When the request's previous run ended; other requests that were used before may be evicted.
    evict_before: u64,
    pub(super) context: RunContext<T>,
}

/// What a run begins with; see [`Run`].
pub(super) struct RunParts<T> {
    pub ticket: [i64; 2],
    pub process: Arc<Process<T>>,
    pub session: Weak<Session<T>>,
    pub compiled_plan: Arc<CompiledPlan>,
    pub branch: usize,
    pub layers: Vec<Slot<T>>,
    /// Empty, with room for as many as there are layers.
    pub home: Vec<LayerCaches<T>>,
    pub evict_before: u64,
    /// In milliseconds.
    pub now: u64,
    pub context: RunContext<T>,
}

/// What a run may do to its request when it completes.
#[derive(Debug)]
pub(super) struct RunContext<T> {
    pub request: i64,
    pub ownership: Ownership<T>,
    /// Place and timestep; `None` if the run is off the plan.
    pub at: Option<At>,
    pub shapes: FeedShapes,
    pub signature: Option<RunSignature>,
    /// The caller says that this is the last run of its request.
    pub end: bool,
    pub recapturing: bool,
}

/// By what right a run has caches.
#[derive(Debug)]
pub(super) enum Ownership<T> {
    /// It took them from its request and gives them back.
    Owner,
    /// Another run was in flight. If that one turns out to be dead, this run's caches become the request's.
    Successor { of: Weak<Run<T>>, activity: usize },
    /// It has none.
    None,
}

/// One layer of a run.
#[derive(Debug)]
pub(super) struct Slot<T> {
    directive: Directive,
    layer: Mutex<Layer<T>>,
}

impl<T> Slot<T> {
    pub fn new(directive: Directive, caches: LayerCaches<T>) -> Self {
        Slot {
            directive,
            layer: Mutex::new(Layer {
                caches,
                captured: None,
                outputs: Vec::new(),
                sinks_done: 0,
                finished: false,
            }),
        }
    }
}

#[derive(Debug)]
struct Layer<T> {
    caches: LayerCaches<T>,
    captured: Option<Residual<T>>,
    outputs: Vec<Option<T>>,
    sinks_done: usize,
    finished: bool,
}

impl<T: Cached> Run<T> {
    pub(super) fn new(parts: RunParts<T>) -> Self {
        Run {
            ticket: parts.ticket,
            process: parts.process,
            session: parts.session,
            compiled_plan: parts.compiled_plan,
            branch: parts.branch,
            unfinished: AtomicUsize::new(parts.layers.len()),
            layers: parts.layers,
            home: Mutex::new(parts.home),
            activity: AtomicUsize::new(0),
            touched: AtomicU64::new(parts.now),
            revoked: AtomicBool::new(false),
            evict_before: parts.evict_before,
            context: parts.context,
        }
    }

    /// What identifies the run in the graph: an id and a check word.
    pub fn ticket(&self) -> [i64; 2] {
        self.ticket
    }

    pub fn compiled_plan(&self) -> &CompiledPlan {
        &self.compiled_plan
    }

    /// What `layer` does in this run.
    ///
    /// # Errors
    /// If the plan has no such layer.
    pub fn directive(&self, layer: usize) -> Result<Directive, StateError> {
        let slot = self.layers.get(layer).ok_or(StateError::NoSuchLayer {
            layer,
            layers: self.layers.len(),
        })?;
        Ok(slot.directive)
    }

    /// Whether the whole region of `layer` is skipped because its output is cached.
    pub fn skips(&self, layer: usize) -> bool {
        self.directive(layer)
            .is_ok_and(|directive| directive.work == Work::Reuse)
            && !self.compiled_plan.is_core(layer)
    }

    /// Leaves the attention of `layer` to the host, with the exporter's nodes, if it may, and says whether: over all rows and all
    /// keys, with no R to be left. Where the op stands for a whole layer it also has to keep the output, and a layer that is left is
    /// finished here: nobody else will.
    pub fn leave_to_host(&self, layer: usize) -> bool {
        let Ok(directive) = self.directive(layer) else {
            return false;
        };
        let core = self.compiled_plan.is_core(layer);
        let leaves = directive.work == Work::Full
            && directive.rows == Rows::All
            && !directive.capture
            && !(core && directive.keep);
        if leaves && core {
            self.finish(layer, 0, 1, None);
        }
        leaves
    }

    /// The residual that window attention of `layer` adds.
    pub fn residual(&self, layer: usize) -> Option<Residual<T>> {
        self.touch();
        self.layer(layer)?.caches.residual[self.branch].clone()
    }

    /// The residual of `layer` does not fit the tensors at hand: it will not be used again.
    pub fn discard_residual(&self, layer: usize) {
        self.count(|c| &c.mismatches, 1);
        if let Some(mut layer) = self.layer(layer) {
            layer.caches.residual[self.branch] = None;
        }
    }

    /// Window attention of a layer sees everything and so is full attention: that is how it counts.
    pub fn count_window_as_full(&self) {
        self.count(|c| &c.layers_full, 1);
        let less = |counters: &Counters| {
            let counter = &counters.layers_window;
            // A reset in between leaves nothing to take from.
            let _ =
                counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        };
        less(&self.process.counters);
        if let Some(session) = self.session.upgrade() {
            less(&session.counters);
        }
    }

    /// Leaves the residual that full attention of `layer` captured.
    pub fn capture(&self, layer: usize, tensor: T, rows: Rows) {
        self.touch();
        if let Some(mut layer) = self.layer(layer) {
            layer.captured = Some(Residual { tensor, rows });
        }
    }

    /// The cached output of `layer` at one sink of its region (most regions have one, sink 0).
    pub fn output(&self, layer: usize, sink: usize) -> Option<T> {
        self.touch();
        self.layer(layer)?.caches.output[self.branch]
            .get(sink)
            .cloned()
    }

    /// One sink of `layer` is done; `output` is what it leaves for later runs, if the directive says to keep it.
    ///
    /// When all `sinks` are done the layer is, and with the last layer the run.
    pub fn finish(&self, layer: usize, sink: usize, sinks: usize, output: Option<T>) {
        self.touch();
        let Ok(directive) = self.directive(layer) else {
            return;
        };
        let Some(mut state) = self.layer(layer) else {
            return;
        };
        if state.finished {
            return;
        }
        let sinks = sinks.max(1);
        state.outputs.resize_with(sinks, || None);
        if let Some(place) = state.outputs.get_mut(sink) {
            *place = output;
        }
        state.sinks_done += 1;
        if state.sinks_done < sinks {
            return;
        }
        state.finished = true;
        let outputs: Option<Vec<T>> = std::mem::take(&mut state.outputs).into_iter().collect();
        let captured = state.captured.take();
        state.caches.settle(
            self.branch,
            self.context.at.map_or(f64::NAN, |at| at.value),
            &directive,
            captured,
            outputs.unwrap_or_default(),
        );
        if self.revoked.load(Ordering::Acquire) {
            state.caches = LayerCaches::default();
        }
        drop(state);
        if self.unfinished.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.process.forget(self.ticket[0]);
            if let Some(session) = self.session.upgrade() {
                session.complete(self);
            }
        }
    }

    /// Something went wrong in an op: the run will not finish, and what it holds is not to be used again.
    pub fn fail(&self) {
        self.process.forget(self.ticket[0]);
        self.revoke();
        if let Some(session) = self.session.upgrade() {
            session.failed(self);
        }
    }

    /// Memory for a tensor of `bytes`, from the budget of the process; `None` if there is none to be had.
    ///
    /// May evict requests that have been idle for longer than this one.
    pub fn reserve(&self, bytes: usize) -> Option<Lease> {
        if self.revoked.load(Ordering::Acquire) {
            return None;
        }
        let now = self.touched.load(Ordering::Relaxed);
        let lease = self.process.reserve(bytes as u64, self.evict_before, now);
        if lease.is_none() {
            self.count(|c| &c.over_budget, 1);
        }
        lease
    }

    /// Something to keep turned out to hold NaN or infinity.
    pub fn refuse_non_finite(&self) {
        self.count(|c| &c.non_finite, 1);
    }

    pub(super) fn revoke(&self) {
        self.revoked.store(true, Ordering::Release);
    }

    pub(super) fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// Frees what this run, which seems dead, can do without if it is not: window attention without its residual is
    /// computed in full. Cached outputs stay, since skipped regions cannot be computed.
    ///
    /// For the caller to free when it holds no lock; without memory for the list they are freed here.
    pub(super) fn give_up_residuals(&self) -> Vec<Residual<T>> {
        let mut freed = list("residuals", 2 * self.layers.len()).unwrap_or_default();
        let residuals = (0..self.layers.len())
            .filter_map(|layer| self.layer(layer))
            .flat_map(|mut layer| std::mem::take(&mut layer.caches.residual))
            .flatten();
        for residual in residuals {
            if freed.len() < freed.capacity() {
                freed.push(residual);
            }
        }
        freed
    }

    pub(super) fn activity(&self) -> usize {
        self.activity.load(Ordering::Acquire)
    }

    pub(super) fn touched(&self) -> u64 {
        self.touched.load(Ordering::Relaxed)
    }

    pub(super) fn is_finished(&self) -> bool {
        self.unfinished.load(Ordering::Acquire) == 0
    }

    /// The caches of a run that has ended, once.
    pub(super) fn take_caches(&self) -> Vec<LayerCaches<T>> {
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        let mut caches = std::mem::take(&mut *home);
        let layers = (0..self.layers.len()).filter_map(|layer| self.layer(layer));
        caches.extend(layers.map(|mut layer| std::mem::take(&mut layer.caches)));
        caches
    }

    fn layer(&self, layer: usize) -> Option<MutexGuard<'_, Layer<T>>> {
        let slot = self.layers.get(layer)?;
        Some(slot.layer.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn touch(&self) {
        self.activity.fetch_add(1, Ordering::AcqRel);
        self.touched.store(self.process.now(), Ordering::Relaxed);
    }

    fn count(&self, which: impl Fn(&Counters) -> &AtomicU64, by: u64) {
        which(&self.process.counters).fetch_add(by, Ordering::Relaxed);
        if let Some(session) = self.session.upgrade() {
            which(&session.counters).fetch_add(by, Ordering::Relaxed);
        }
    }
}
