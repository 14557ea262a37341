//! Statuses made while there was memory, for errors that come when the host has none for a status.
//!
//! A host that cannot make a status gives null, which means success: an output that nobody wrote would be taken for an answer.
//! Owns those of every host; they are made at registration, and those that were needed again when an operator begins.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ort_sys::{OrtErrorCode, OrtStatusPtr};

use super::host::{Host, function};

/// Errors at once that can do without memory; more wait for it.
const CAPACITY: usize = 16;

/// How often an error that has no status looks for memory.
const PAUSE: Duration = Duration::from_millis(1);

/// A status of one host that nobody has got.
struct PreallocatedStatus {
    table: usize,
    status: OrtStatusPtr,
}

// SAFETY: a status is plain memory of the host, handed out once.
unsafe impl Send for PreallocatedStatus {}

static STATUSES: Mutex<Vec<PreallocatedStatus>> = Mutex::new(Vec::new());

/// Some were used.
static USED: AtomicBool = AtomicBool::new(false);

/// Replaces the statuses that were used. Next to nothing if none were.
pub(super) fn refill(host: &Host) {
    if USED.load(Ordering::Relaxed) && USED.swap(false, Ordering::Relaxed) {
        fill(host);
    }
}

/// Makes what is missing to [`CAPACITY`], as far as there is memory.
pub(super) fn fill(host: &Host) {
    let table = host.table() as usize;
    let mut statuses = STATUSES.lock().unwrap_or_else(PoisonError::into_inner);
    let missing = CAPACITY - statuses.iter().filter(|one| one.table == table).count();
    for _ in 0..missing {
        if statuses.try_reserve(1).is_err() {
            return USED.store(true, Ordering::Relaxed);
        }
        // SAFETY: a valid code and a NUL-terminated string that the host copies.
        let status = unsafe {
            function!(host, CreateStatus)(
                OrtErrorCode::ORT_RUNTIME_EXCEPTION,
                c"ditfastattn: no memory, and none to say for what; give the process more memory"
                    .as_ptr(),
            )
        };
        if status.0.is_null() {
            return USED.store(true, Ordering::Relaxed);
        }
        statuses.push(PreallocatedStatus { table, status });
    }
}

/// A status of `host`, which could not make one: a preallocated one, or what `make` gives once there is memory.
pub(super) fn status(host: &Host, make: impl Fn() -> OrtStatusPtr) -> OrtStatusPtr {
    let table = host.table() as usize;
    USED.store(true, Ordering::Relaxed);
    loop {
        let mut statuses = STATUSES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = statuses.iter().position(|one| one.table == table) {
            return statuses.swap_remove(at).status;
        }
        drop(statuses);
        // Neither an end of the process nor a wrong answer: what other errors free comes here.
        std::thread::sleep(PAUSE);
        let status = make();
        if !status.0.is_null() {
            return status;
        }
    }
}
