//! Per-machine tuning: what there is to tune, and where each number was measured. The rows of the table are with their
//! instruction sets; what the numbers mean is the business of `kv` and of the task grid.
//!
//! What was fastest on each instruction set, with heads of 64 to 128 channels side by side.
//!
//! An element of K meets 64 queries each time it is read with AVX-512, elsewhere 16, so the cost of reading it from a
//! cache line of its own is paid four times as often. "Packing" is against reading in place:
//!
//! - AVX2: packing per call takes 7 to 16 % off full attention of 1024 tokens. Packing per task takes 1 to 9 % off that of
//!   256 tokens; packing V alone 13 to 25 % off a window with heads of 64 or 128 channels, 5 to 8 % with 96.
//! - AVX-512, EPYC (Zen 4): packing per call adds 2 to 4 % to full attention of 1024 tokens; packing K and V per task
//!   where tokens are a multiple of 4 KB apart adds 2 to 5 %.
//! - AVX-512, Xeon (Emerald Rapids), which multiplies twice as much in the time of a cache miss: packing per call takes 1
//!   to 9 % off full attention of 1024 tokens, 3 to 12 % off a window of 1025 of 4096. Where tokens are a multiple of 4 KB
//!   apart, packing V per task takes 3 to 5 % off full attention of 256 tokens and a window of 257 of 1024; K as well
//!   takes no more off, and adds 2 to 8 % to windows of 256 tokens.

use std::sync::LazyLock;

/// What each task packs for itself, of token-interleaved K and V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // Rows of the other architectures need one of them so far.
pub(crate) enum TaskPacking {
    Never,
    /// V whose rows lie a multiple of 4 KB apart. They alias to one L1 set (12 ways), and a tile of the output reads some
    /// channels of all keys.
    AliasedValues,
    /// K and V; where a band hides most of them V only, and only if its rows lie a multiple of 2 KB apart, in two sets.
    Always,
}

/// How K and V are packed and how large tasks are. No result depends on it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tuning {
    /// K and V are packed once per call where more queries than this see a key.
    pub pack_threshold_queries: usize,
    /// What each task packs of what is not packed per call.
    pub task_packing: TaskPacking,
    /// The most 32-bit words that are packed per call at a time: calls that need more are done in chunks, and those of which
    /// one head needs more are not packed per call.
    pub max_packed_words: usize,
    /// Tasks that a chunk without a band is cut into at least.
    pub min_tasks: usize,
}

/// A row of a tuning table: what was fastest on one kind of machine. Right on any other, too.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MachineTuning {
    /// As `DITFASTATTN_TUNING` names it.
    pub name: &'static str,
    pub pack_threshold_queries: usize,
    pub task_packing: TaskPacking,
}

/// Blocks of 16 queries: AVX2, where it was measured, NEON and portable vectors.
pub(crate) const NARROW: MachineTuning = MachineTuning {
    name: "narrow",
    pack_threshold_queries: 512,
    task_packing: TaskPacking::Always,
};

impl MachineTuning {
    /// With what is the same for all machines.
    pub fn tuning(self) -> Tuning {
        Tuning {
            pack_threshold_queries: self.pack_threshold_queries,
            task_packing: self.task_packing,
            max_packed_words: 12 << 20,
            min_tasks: min_tasks(),
        }
    }
}

/// Enough tasks for any number of threads; more would share too little.
pub(crate) const MAX_TASKS: usize = 32;

/// 8 tasks for each thread that can run at a time, the host's threads being unknown. Larger tasks prefetch and pack the same
/// keys fewer times: with 16 in place of 32, half a batch of 256 tokens takes 1 to 4 % less on a Xeon (Emerald Rapids).
fn min_tasks() -> usize {
    // Asked once: the answer is in files of the system.
    static THREADS: LazyLock<usize> =
        LazyLock::new(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    (8 * *THREADS).min(MAX_TASKS)
}
