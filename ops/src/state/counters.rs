//! What happened, in numbers: nothing is degraded silently.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident),* $(,)?) => {
        /// Counters of a session or of the whole process. They only grow, until [`Counters::reset`].
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[doc = $doc])* pub $name: AtomicU64),* }

        impl Counters {
            /// Every counter with its name, in the order of their documentation.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed))),*]
            }

            /// Back to zero.
            pub fn reset(&self) {
                $(self.$name.store(0, Ordering::Relaxed);)*
            }
        }
    };
}

counters! {
    /// Runs of the model.
    steps,
    /// Runs in which every layer was computed in full although the plan may say otherwise.
    dense_steps,
    /// Generations that began.
    generations,
    /// Layers computed with full attention.
    layers_full,
    /// Layers computed with window attention and a cached residual.
    layers_window,
    /// Layers served from a cached output.
    layers_reused,
    /// Layers (full or window) computed on the conditional half only.
    layers_halved,
    /// Tensors that the plan counts on and that were not cached.
    misses,
    /// Layers that computed more than the plan says, for whatever reason.
    recomputes,
    /// Runs whose timestep the plan does not have: unknown values, unequal rows, steps beyond the last.
    unplanned,
    /// Runs of another schedule than the plan's, which took the row of the planned timestep before theirs.
    off_schedule,
    /// Runs that did not follow the step before: caches dropped, computed in full.
    discontinuities,
    /// Of those, the ones whose shapes or types differ from the step before.
    shape_changes,
    /// Anonymous runs that could not be told to continue the generation at hand: computed densely.
    contested,
    /// Runs that met another run of the same request in flight: computed densely.
    collisions,
    /// Runs that began and never finished, or failed.
    aborted,
    /// Tensors not kept because the memory budget was used up.
    over_budget,
    /// Requests whose caches made room for another request.
    evictions,
    /// Requests forgotten after the idle limit.
    idle_reclaims,
    /// Tensors not kept because they hold NaN or infinity.
    non_finite,
    /// Cached residuals that did not fit the tensors at hand.
    mismatches,
}
