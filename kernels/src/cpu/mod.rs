//! Attention on the CPU: splits a call into tasks and hands each to the best instruction set.
//!
//! The way of the data is described at the [crate's root](crate); `task` follows it step by step.

mod exp;
mod gemm;
mod keys;
mod level;
mod mask;
mod pack;
mod scratch;
mod sight;
mod task;
mod transpose;
mod vector;

pub use level::Level;

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use crate::Computed;
use crate::api::{Attention, Mode};
use crate::parallel::Parallel;
use gemm::QUERIES;
use keys::{Keys, Part};

/// Shares a call between threads.
#[derive(Clone, Copy)]
struct Shared<'a, 'b>(&'a Attention<'b>);
// SAFETY: tasks only read the inputs, and write disjoint rows of the outputs (`check` refuses layouts in which two
// elements coincide).
unsafe impl Sync for Shared<'_, '_> {}

impl<'a, 'b> Shared<'a, 'b> {
    fn get(&self) -> &'a Attention<'b> {
        self.0
    }
}

/// Runs a call that `check` has accepted.
pub(crate) fn attention(a: &Attention<'_>, pool: &dyn Parallel, level: Level) -> Computed {
    let finite = AtomicBool::new(true);
    if !is_empty(a) {
        run(a, pool, level, &finite);
    }
    Computed {
        residual_is_finite: finite.into_inner(),
    }
}

fn is_empty(a: &Attention<'_>) -> bool {
    let s = a.shape;
    s.batch * s.heads * s.q_tokens * s.v_dim == 0
}

fn run(a: &Attention<'_>, pool: &dyn Parallel, level: Level, finite: &AtomicBool) {
    let shared = Shared(a);
    scratch::with_keys(|memory| {
        for part in Part::all(a) {
            let keys = Keys::new(a, &part, memory, pool);
            let cut = Cut::new(a, &part);
            pool.run(cut.tasks(), &|i| {
                let (batch, heads, blocks) = cut.task(i);
                scratch::with(|scratch| {
                    level.run(task::Task {
                        a: shared.get(),
                        keys: &keys,
                        finite,
                        batch,
                        heads,
                        blocks,
                        scratch,
                    });
                });
            });
        }
    });
}

/// How a part of a call is cut into tasks. Depends on the call alone, so that no result depends on the pool.
#[derive(Clone, Debug)]
struct Cut {
    batch: Range<usize>,
    heads: Range<usize>,
    /// Query blocks.
    blocks: usize,
    /// Neighbouring heads in a task.
    heads_each: usize,
    /// Query blocks in a task.
    blocks_each: usize,
    /// Whether tasks go along the heads first, then along the queries.
    heads_first: bool,
}

impl Cut {
    fn new(a: &Attention<'_>, part: &Part) -> Self {
        let s = a.shape;
        let per_kv = s.heads / s.kv_heads;
        let heads = part.kv_heads.start * per_kv..part.kv_heads.end * per_kv;
        let blocks = s.q_tokens.div_ceil(QUERIES);
        // Heads that share a mask share what it takes to read it.
        let heads_each = match a.mask {
            Some(mask) if mask.strides.head == 0 => 2.min(heads.len()),
            _ => 1,
        };
        // Blocks in one task share keys and values in the cache; more of them save traffic, fewer of them balance better.
        let blocks_all = part.batch.len() * heads.len() * blocks;
        let blocks_each = (blocks_all / heads_each / 32).clamp(1, 8).min(blocks);
        Cut {
            batch: part.batch.clone(),
            heads,
            blocks,
            heads_each,
            blocks_each,
            // A band's queries, keys and values lie together, also in pages of memory that heads share.
            heads_first: matches!(a.mode, Mode::Window { .. }),
        }
    }

    /// Tasks along the heads and along the queries.
    fn grid(&self) -> (usize, usize) {
        let along_heads = self.heads.len().div_ceil(self.heads_each);
        (along_heads, self.blocks.div_ceil(self.blocks_each))
    }

    fn tasks(&self) -> usize {
        let (along_heads, along_queries) = self.grid();
        self.batch.len() * along_heads * along_queries
    }

    /// The batch, heads and query blocks of task `i`.
    fn task(&self, i: usize) -> (usize, Range<usize>, Range<usize>) {
        let (along_heads, along_queries) = self.grid();
        let (batch, i) = (
            i / (along_heads * along_queries),
            i % (along_heads * along_queries),
        );
        let (head, block) = if self.heads_first {
            (i % along_heads, i / along_heads)
        } else {
            (i / along_queries, i % along_queries)
        };
        let head = self.heads.start + head * self.heads_each;
        let block = block * self.blocks_each;
        (
            self.batch.start + batch,
            head..self.heads.end.min(head + self.heads_each),
            block..self.blocks.min(block + self.blocks_each),
        )
    }
}
