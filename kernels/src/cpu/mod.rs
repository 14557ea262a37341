//! Attention on the CPU: splits a call into tasks and hands each to the best instruction set.
//!
//! The way of the data is described at the [crate's root](crate); `task` follows it step by step.

mod exp;
mod gemm;
mod level;
mod mask;
mod pack;
mod scratch;
mod sight;
mod task;
mod vector;

pub use level::Level;

use crate::api::Attention;
use crate::parallel::Parallel;
use gemm::QUERIES;

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
pub(crate) fn attention(a: &Attention<'_>, pool: &dyn Parallel, level: Level) {
    let s = a.shape;
    let planes = s.batch * s.heads;
    let blocks = s.q_tokens.div_ceil(QUERIES);
    if planes == 0 || blocks == 0 || s.v_dim == 0 {
        return;
    }
    // Blocks in one task share packed keys and values; more of them save packing, fewer of them balance better.
    let per_task = (planes * blocks / 32).clamp(1, 8).min(blocks);
    let per_plane = blocks.div_ceil(per_task);
    let shared = Shared(a);
    pool.run(planes * per_plane, &|i| {
        let (plane, part) = (i / per_plane, i % per_plane);
        let first = part * per_task;
        scratch::with(|scratch| {
            level.run(task::Task {
                a: shared.get(),
                batch: plane / s.heads,
                head: plane % s.heads,
                blocks: first..blocks.min(first + per_task),
                scratch,
            });
        });
    });
}
