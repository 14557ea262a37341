//! What a session forgets: requests that are idle, runs that are dead, and whatever others need the room of.

use super::cached::Cached;
use super::caches::LayerCaches;
use super::call::ANONYMOUS;
use super::session::{DeferredDrop, Inner, Session};

/// Requests a session remembers. What they cache is bounded by the budget; this bounds the bookkeeping, which is a few
/// hundred bytes per layer.
const MAX_REQUESTS: usize = 4096;

/// A run in flight that has shown no sign of life for so long is dead, whatever the idle limit says.
const DEAD_RUN_MS: u64 = 600_000;

/// The same for a run whose request another run has taken over.
const DEAD_REVOKED_RUN_MS: u64 = 60_000;

impl<T: Cached> Session<T> {
    /// Forgets requests that have been idle for too long and runs that are dead.
    pub(super) fn reclaim_idle(
        &self,
        inner: &mut Inner<T>,
        now: u64,
        deferred: &mut DeferredDrop<T>,
    ) {
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
    pub(super) fn make_room(
        &self,
        inner: &mut Inner<T>,
        coming: i64,
        deferred: &mut DeferredDrop<T>,
    ) {
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
}

fn holds_tensors<T>(caches: &[LayerCaches<T>]) -> bool {
    caches.iter().any(|layer| {
        layer.residual.iter().any(Option::is_some) || layer.output.iter().any(|o| !o.is_empty())
    })
}
