//! What all sessions of this process share.

use std::sync::{Arc, LazyLock};

use crate::state::Process;

use super::cache_entry::CachedTensor;
use super::environment;

/// Tickets, the memory budget and the counters; made when the first session is.
pub(super) static PROCESS: LazyLock<Arc<Process<CachedTensor>>> =
    LazyLock::new(|| Process::new(environment::limits(), environment::clock()));
