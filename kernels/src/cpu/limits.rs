//! What depends on the machine but for the instructions: numbers, and where each was measured.
//!
//! Owns the choice of them, not what they mean: that is the business of `keys` and of how a call is cut into tasks.

use std::sync::LazyLock;

use super::keys::TasksCopy;
use super::level::{Level, is_intel};

/// What depends on the machine: how keys and values are read, and how large tasks are. Nothing that is computed does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Where more queries than this see a key, a copy in advance is worth its traffic.
    pub queries: usize,
    /// What tasks copy of what is not copied in advance.
    pub tasks_copy: TasksCopy,
    /// Words that are copied in advance at a time: calls that need more are done in several parts, and those of
    /// which one head needs more are not copied in advance.
    pub words: usize,
    /// Tasks that a part without a band is cut into at least.
    pub tasks: usize,
}

impl Limits {
    /// What was fastest at a level, with heads of 64 to 128 channels side by side.
    ///
    /// With AVX-512 a number of a key meets 64 queries each time it is read, at the other levels 16, so what it costs to read
    /// it from a line of its own is paid four times as often. With AVX2 full attention of 1024 tokens took 7 to 16 % less time
    /// with a copy in advance, that of 256 tokens 1 to 9 % less with copies of tasks, and a window of heads of 64 or 128
    /// channels 13 to 25 % less, of 96 channels 5 to 8 % less with copies of the values. With AVX-512 an EPYC (Zen 4) takes 2
    /// to 4 % more for full attention of 1024 tokens with a copy in advance, a Xeon (Emerald Rapids), which multiplies twice as
    /// much in the time of a cache miss, 1 to 9 % less, and 3 to 12 % less for a window of 1025 of 4096 tokens. Where tokens
    /// are a multiple of 4 KB apart, copies of the values by tasks save the Xeon 3 to 5 % of full attention of 256 tokens and
    /// of a window of 257 of 1024; with the keys too it is no less, and windows of 256 tokens take 2 to 8 % more. Zen 4 takes 2
    /// to 5 % more with both.
    pub fn best(level: Level) -> Limits {
        let (queries, tasks_copy) = match level {
            Level::Avx512 if is_intel() => (900, TasksCopy::CollidingValues),
            Level::Avx512 => (1280, TasksCopy::Nothing),
            _ => (512, TasksCopy::All),
        };
        Limits {
            queries,
            tasks_copy,
            words: 12 << 20,
            tasks: tasks(),
        }
    }
}

/// Tasks that are enough for any number of threads; more would share too little.
pub(crate) const MOST_TASKS: usize = 32;

/// 8 tasks for each thread that can run at a time, the host's threads being unknown. Larger tasks ask for and copy the same
/// keys fewer times: with 16 in place of 32, half a batch of 256 tokens takes 1 to 4 % less on a Xeon (Emerald Rapids).
fn tasks() -> usize {
    // Asked once: the answer is in files of the system.
    static THREADS: LazyLock<usize> =
        LazyLock::new(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    (8 * *THREADS).min(MOST_TASKS)
}
