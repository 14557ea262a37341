//! Attention on the CPU: splits a call into tasks and hands each to the best instruction set.
//!
//! The data flow is described at the [crate's root](crate); `task` follows it step by step.

mod block;
mod context;
mod epilogue;
mod exp;
mod gemm;
mod isa;
mod key_ranges;
mod kv;
mod load_store;
mod main_loop;
mod mask_tile;
mod pack_bf16;
mod prefetch;
mod scratch;
mod softmax;
mod task;
mod tile_step;
mod transpose;

pub use isa::{Isa, MatrixKernel, kernels};

use std::ops::Range;
use std::sync::atomic::AtomicBool;

use crate::api::{Attention, Computed, Mode, Products};
use crate::parallel::Parallel;
use crate::tensor::DType;
use isa::{Backend, DotArithmetic, Float32, MAX_TASKS, Native, Tuning};
use kv::{KvChunk, KvPlan, KvSource};

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
pub(crate) fn attention(
    a: &Attention<'_>,
    pool: &dyn Parallel,
    isa: Isa,
    products: Products,
) -> Computed {
    let finite = AtomicBool::new(true);
    if !is_empty(a) {
        run(a, pool, isa, products, isa::tuning(isa), &finite);
    }
    Computed {
        residual_is_finite: finite.into_inner(),
    }
}

fn is_empty(a: &Attention<'_>) -> bool {
    let s = a.shape;
    s.batch * s.heads * s.q_tokens * s.v_dim == 0
}

impl Products {
    /// Whether this machine has the instructions; without them the choice makes no difference.
    pub fn available(self) -> bool {
        self == Products::Float32 || Native::bfloat16(Isa::selected()).is_some()
    }
}

fn run(
    a: &Attention<'_>,
    pool: &dyn Parallel,
    isa: Isa,
    products: Products,
    tuning: Tuning,
    finite: &AtomicBool,
) {
    let half = [a.q.dtype, a.k.dtype, a.v.dtype]
        .iter()
        .all(|&dtype| dtype != DType::F32);
    match Native::bfloat16(isa) {
        Some(pairs) if half && products == Products::Bfloat16 => {
            run_in(pairs, a, pool, isa, tuning, finite);
        }
        _ => run_in(Float32, a, pool, isa, tuning, finite),
    }
}

fn run_in<A: DotArithmetic + Sync>(
    arithmetic: A,
    a: &Attention<'_>,
    pool: &dyn Parallel,
    isa: Isa,
    tuning: Tuning,
    finite: &AtomicBool,
) {
    let shared = Shared(a);
    let plan = KvPlan::of(a, A::ELEMS_PER_WORD, tuning);
    scratch::with_kv(|memory| {
        for chunk in KvChunk::all(a, plan, tuning) {
            let kv = KvSource::new(a, plan, &chunk, memory, pool);
            let grid = TaskGrid::new(a, &chunk, isa.block_m(), tuning.min_tasks);
            pool.run(grid.tasks(), &|i| {
                let (batch, heads, blocks) = grid.task(i);
                scratch::with(|scratch| {
                    let task = task::Task {
                        a: shared.get(),
                        arithmetic,
                        kv: &kv,
                        finite,
                        batch,
                        heads,
                        blocks,
                        scratch,
                    };
                    arithmetic.run(isa, task);
                });
            });
        }
    });
}

/// How a chunk of a call is cut into tasks. No result depends on it: each query block meets the same blocks of keys.
#[derive(Clone, Debug)]
struct TaskGrid {
    batch: Range<usize>,
    heads: Range<usize>,
    /// Query blocks.
    blocks: usize,
    /// Neighbouring heads in a task.
    heads_per_task: usize,
    /// Query blocks in a task.
    blocks_per_task: usize,
    /// Whether tasks go along the heads first, then along the queries.
    heads_first: bool,
}

impl TaskGrid {
    /// `queries` are those of a block, `tasks` what a chunk is cut into at least, if it has so many blocks and no band.
    fn new(a: &Attention<'_>, chunk: &KvChunk, queries: usize, tasks: usize) -> Self {
        let s = a.shape;
        let per_kv = s.heads / s.kv_heads;
        let heads = chunk.kv_heads.start * per_kv..chunk.kv_heads.end * per_kv;
        let blocks = s.q_tokens.div_ceil(queries);
        // Heads that share a mask share what it takes to read it.
        let heads_per_task = match a.mask {
            Some(mask) if mask.strides.head == 0 => 2.min(heads.len()),
            _ => 1,
        };
        // Queries in one task share keys and values in the cache; more of them save traffic, fewer of them balance better.
        let blocks_all = chunk.batch.len() * heads.len() * blocks;
        let band = matches!(a.mode, Mode::Window { .. });
        // Of a band's keys a larger task sees more, not the same ones for longer.
        let tasks = if band { MAX_TASKS } else { tasks };
        let blocks_per_task = (blocks_all / heads_per_task / tasks)
            .clamp(1, 512 / queries)
            .min(blocks);
        TaskGrid {
            batch: chunk.batch.clone(),
            heads,
            blocks,
            heads_per_task,
            blocks_per_task,
            // A band's queries, keys and values lie together, also in pages of memory that heads share.
            heads_first: band,
        }
    }

    /// Tasks along the heads and along the queries.
    fn grid(&self) -> (usize, usize) {
        let along_heads = self.heads.len().div_ceil(self.heads_per_task);
        (along_heads, self.blocks.div_ceil(self.blocks_per_task))
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
        let head = self.heads.start + head * self.heads_per_task;
        let block = block * self.blocks_per_task;
        (
            self.batch.start + batch,
            head..self.heads.end.min(head + self.heads_per_task),
            block..self.blocks.min(block + self.blocks_per_task),
        )
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::isa::TaskPacking;
    use super::load_store::{BatchHead, offset};
    use super::*;
    use crate::api::{Band, Shape};
    use crate::parallel::Threads;
    use crate::tensor::{Element, Input, Output, Strides};

    const SHAPE: Shape = Shape {
        batch: 3,
        heads: 4,
        kv_heads: 2,
        q_tokens: 300,
        kv_tokens: 300,
        head_dim: 9,
        v_dim: 5,
    };

    #[derive(Clone, Copy)]
    enum Kind {
        Full,
        Capture,
        Window,
    }

    /// The bits of output and residual, and whether the latter is finite.
    fn compute<T: Element>(
        tuning: Tuning,
        products: Products,
        kind: Kind,
        layout: fn(usize, usize, usize) -> Strides,
    ) -> (Vec<u32>, Vec<u32>, bool) {
        let s = SHAPE;
        let numbers = |seed: usize, heads: usize, channels: usize| -> Vec<T> {
            let (batch, head) = (s.batch - 1, heads - 1);
            let layout = layout(heads, s.q_tokens, channels);
            let last = offset(
                layout,
                BatchHead { batch, head },
                s.q_tokens - 1,
                channels - 1,
            );
            let n = last as usize + 1;
            let number = |i: usize| ((i * 7919 + seed) % 1009) as f32 / 252.0 - 2.0;
            (0..n).map(|i| T::from_f32(number(i))).collect()
        };
        let q = numbers(1, s.heads, s.head_dim);
        let k = numbers(2, s.kv_heads, s.head_dim);
        let v = numbers(3, s.kv_heads, s.v_dim);
        let earlier = numbers(4, s.heads, s.v_dim);
        let (mut out, mut residual) = (earlier.clone(), earlier.clone());
        let of = |heads, channels| layout(heads, s.q_tokens, channels);
        let band = Band::new(40);
        let o = of(s.heads, s.v_dim);
        let call = Attention {
            shape: s,
            scale: 0.3,
            q: Input::from_slice(&q, of(s.heads, s.head_dim)),
            k: Input::from_slice(&k, of(s.kv_heads, s.head_dim)),
            v: Input::from_slice(&v, of(s.kv_heads, s.v_dim)),
            mask: None,
            out: Output::from_slice(&mut out, o),
            mode: match kind {
                Kind::Full => Mode::Full,
                Kind::Capture => Mode::FullCapture {
                    band,
                    residual: Output::from_slice(&mut residual, o),
                },
                Kind::Window => Mode::Window {
                    band,
                    residual: Some(Input::from_slice(&earlier, o)),
                },
            },
        };
        crate::check::check(&call).expect("a valid call");
        let finite = AtomicBool::new(true);
        run(&call, &Threads(2), Isa::best(), products, tuning, &finite);
        let bits = |x: &[T]| x.iter().map(|x| x.to_f32().to_bits()).collect();
        (bits(&out), bits(&residual), finite.into_inner())
    }

    /// Short sequences are read in place, which is compared with the definition in `tests/oracle.rs`.
    #[test]
    fn where_k_and_v_are_packed_and_in_how_many_chunks_changes_nothing() {
        let s = SHAPE;
        let head_words = s.kv_tokens.next_multiple_of(kv::BLOCK_N) * (s.head_dim + s.v_dim);
        for layout in [Strides::bshd, Strides::bhds, Strides::bhsd] {
            for kind in [Kind::Full, Kind::Capture, Kind::Window] {
                let all = |tuning| {
                    let [float32, bfloat16] = [Products::Float32, Products::Bfloat16];
                    [
                        compute::<f32>(tuning, float32, kind, layout),
                        compute::<f16>(tuning, float32, kind, layout),
                        // Where the machine cannot, the same once more.
                        compute::<f16>(tuning, bfloat16, kind, layout),
                        compute::<bf16>(tuning, bfloat16, kind, layout),
                    ]
                };
                let want = all(isa::tuning(Isa::best()));
                // No packing per call; a head at a time; two heads, so a row; two rows and one; all at once. A head of
                // pairs has a little more than half as many words.
                for words in [
                    head_words / 2,
                    head_words - 1,
                    head_words,
                    2 * head_words,
                    5 * head_words,
                    usize::MAX,
                ] {
                    for task_packing in [TaskPacking::Never, TaskPacking::Always] {
                        let tuning = Tuning {
                            pack_threshold_queries: 0,
                            task_packing,
                            max_packed_words: words,
                            min_tasks: MAX_TASKS,
                        };
                        assert!(want == all(tuning));
                    }
                }
            }
        }
    }

    /// The machine decides how large tasks are.
    #[test]
    fn how_a_call_is_cut_into_tasks_changes_nothing() {
        for kind in [Kind::Full, Kind::Capture] {
            let in_tasks = |tasks| {
                let tuning = Tuning {
                    min_tasks: tasks,
                    ..isa::tuning(Isa::best())
                };
                let [float32, bfloat16] = [Products::Float32, Products::Bfloat16];
                (
                    compute::<f32>(tuning, float32, kind, Strides::bshd),
                    compute::<bf16>(tuning, bfloat16, kind, Strides::bshd),
                )
            };
            let whole_heads = in_tasks(1);
            for tasks in [16, MAX_TASKS, usize::MAX] {
                assert!(whole_heads == in_tasks(tasks), "{tasks} tasks");
            }
        }
    }

    /// In windows tasks pack nothing else.
    #[test]
    fn packing_rows_that_alias_changes_nothing() {
        // Rows of the batch beside each other, tokens 4 KB of float16 apart.
        let layout = |heads: usize, _: usize, channels: usize| Strides {
            batch: (heads * channels) as isize,
            head: channels as isize,
            token: 2048,
            channel: 1,
        };
        let pack_threshold_queries = usize::MAX;
        for kind in [Kind::Full, Kind::Capture, Kind::Window] {
            let both = |task_packing| {
                let tuning = Tuning {
                    pack_threshold_queries,
                    task_packing,
                    max_packed_words: 0,
                    min_tasks: MAX_TASKS,
                };
                (
                    compute::<f32>(tuning, Products::Float32, kind, layout),
                    compute::<bf16>(tuning, Products::Bfloat16, kind, layout),
                )
            };
            let nothing = both(TaskPacking::Never);
            assert!(nothing == both(TaskPacking::AliasedValues));
            assert!(nothing == both(TaskPacking::Always));
        }
    }
}
