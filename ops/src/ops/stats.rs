//! What the library gives to the outside world: its counters, as JSON.

use std::path::Path;

use serde_json::{Map, Value};

use crate::abi::allocator;

use super::process::PROCESS;

/// The counters of the whole process, as one JSON object. Works, with zeros, before any session exists.
pub fn stats_json() -> String {
    let mut stats = Map::new();
    stats.insert("version".into(), env!("CARGO_PKG_VERSION").into());
    for (name, value) in PROCESS.counters.all() {
        stats.insert(name.into(), value.into());
    }
    let sessions = PROCESS.sessions();
    let live: usize = sessions.iter().map(|s| s.live_requests()).sum();
    stats.insert("sessions".into(), sessions.len().into());
    stats.insert("live_requests".into(), live.into());
    stats.insert("runs_in_flight".into(), PROCESS.runs_in_flight().into());
    stats.insert("bytes".into(), PROCESS.bytes().into());
    stats.insert("peak_bytes".into(), PROCESS.peak_bytes().into());
    stats.insert("budget_bytes".into(), PROCESS.limits.bytes.into());
    stats.insert("reserve_bytes".into(), allocator::reserve_used().into());
    Value::Object(stats).to_string()
}

/// Sets the counters to zero, and nothing else.
pub fn reset() {
    PROCESS.reset();
}

/// Writes the counters to the file that the environment names, if any. The error says which.
pub(super) fn write_stats() -> Result<(), String> {
    let Some(path) = std::env::var_os("DITFASTATTN_STATS").filter(|path| !path.is_empty()) else {
        return Ok(());
    };
    let path = Path::new(&path);
    // A reader never sees half a file: write beside it, then rename.
    let mut partial = path.as_os_str().to_owned();
    partial.push(format!(".{}.tmp", std::process::id()));
    std::fs::write(&partial, stats_json() + "\n")
        .and_then(|()| std::fs::rename(&partial, path))
        .map_err(|error| format!("cannot write DITFASTATTN_STATS={}: {error}", path.display()))
}
