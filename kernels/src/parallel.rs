//! How work reaches threads. The kernels never make a thread; the caller's pool runs their tasks.

/// Runs `tasks` independent tasks, in any order, on any threads, and returns when all have run.
///
/// In the product this is ONNX Runtime's intra-op pool. The kernels split their work the same way whatever the
/// pool, so results do not depend on it.
pub trait Parallel {
    /// Calls `task(i)` exactly once for every `i < tasks`.
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync));
}

/// Runs everything on the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sequential;

impl Parallel for Sequential {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(task);
    }
}

/// Runs tasks on a fixed number of freshly spawned threads. For tests and benchmarks: it starts threads every call.
#[derive(Clone, Copy, Debug)]
pub struct Threads(pub usize);

impl Parallel for Threads {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= tasks {
                    break;
                }
                task(i);
            }
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..self.0.min(tasks)).map(|_| scope.spawn(work)).collect();
            work();
            // The scope would wait for them too, but in a way that ThreadSanitizer does not see.
            for other in others {
                if let Err(panic) = other.join() {
                    std::panic::resume_unwind(panic);
                }
            }
        });
    }
}
