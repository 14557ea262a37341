//! What a directive asks of the attention of one layer in one run, wherever its tensors are.
//!
//! Owns the decisions: full or window, which R, what is captured, what stands in for what is missing. Touches no number:
//! [`AttentionBackend`] is implemented for the host's memory (`host_attention`) and for a CUDA device's (`cuda::attention`).

use std::sync::Arc;

use ditfastattn_kernels::{Band, Shape, Strides};
use ditfastattn_plans::Plan;

use crate::abi::error::Error;
use crate::abi::kernel_context::KernelContext;
use crate::state::{Directive, Rows, Run, Work};

use super::attention::{DiTFastAttn, PRESENT, TEXT};
use super::cache_entry::{CachedTensor, zero_entry};
use super::io::Io;
use super::layout::View;
use super::mask::Scores;
use super::op_common::refuse_if_served;

/// Who remembers what the layer left at earlier steps.
#[derive(Clone, Copy)]
pub(super) enum StateSource<'a> {
    /// The run's request.
    Session(&'a Arc<Run<CachedTensor>>),
    /// The graph: R is an input and an output.
    Graph(&'a Io),
}

impl<'a> StateSource<'a> {
    pub fn plan(&self) -> &'a Plan {
        match self {
            StateSource::Session(run) => run.compiled_plan().plan(),
            StateSource::Graph(io) => io.plan(),
        }
    }

    pub fn conditional_first(&self) -> bool {
        match self {
            StateSource::Session(run) => run.compiled_plan().conditional_first(),
            StateSource::Graph(io) => io.conditional_first(),
        }
    }
}

/// One layer in one run.
pub(super) struct Task<'a> {
    pub op: &'a DiTFastAttn,
    pub context: &'a KernelContext<'a>,
    pub state: StateSource<'a>,
    pub directive: Directive,
    /// q, k and v as batch, heads, tokens and channels.
    pub views: [View; 3],
    /// The output. Its strides hold for parts of the batch too.
    pub o: View,
    pub band: Band,
}

impl<'a> Task<'a> {
    /// For q, k and v of these shapes; and the output's shape.
    ///
    /// # Errors
    /// If the shapes do not belong together, or the layer must not be computed in this run.
    pub fn new(
        op: &'a DiTFastAttn,
        context: &'a KernelContext<'a>,
        state: StateSource<'a>,
        directive: Directive,
        [q, k, v]: [&[usize]; 3],
    ) -> Result<(Task<'a>, Vec<usize>), Error> {
        let serves_itself = op.core && matches!(state, StateSource::Session(_));
        if !serves_itself {
            refuse_if_served(op.layer, directive)?;
        }
        let views = op.layouts.views(q, k, v)?;
        let text = context.optional_input(TEXT)?;
        let band = op.text.band(state.plan(), text.as_ref(), views[0].tokens)?;
        let o_dims = op.layouts.output_dims(&views[0], &views[2])?;
        let o = op.layouts.o.view(&o_dims, views[0].heads, "the output")?;
        let task = Task {
            op,
            context,
            state,
            directive,
            views,
            o,
            band,
        };
        Ok((task, o_dims))
    }

    /// What a mask is broadcast to.
    pub fn scores(&self) -> Scores {
        let halved = self.directive.rows == Rows::Half && !self.op.core;
        Scores::new(
            &self.views[0],
            &self.views[1],
            self.op.layouts.q.is_folded(),
            halved.then(|| self.state.conditional_first()),
        )
    }

    /// Of a call for `rows` rows.
    pub fn shape(&self, rows: usize) -> Shape {
        let [q, k, v] = &self.views;
        Shape {
            batch: rows,
            heads: q.heads,
            kv_heads: k.heads,
            q_tokens: q.tokens,
            kv_tokens: k.tokens,
            head_dim: q.channels,
            v_dim: v.channels,
        }
    }

    /// What scores are multiplied by.
    pub fn scale(&self) -> f32 {
        self.op.scale_of(self.views[0].channels)
    }

    /// The shape of R for `rows` rows: `[rows, H, N, D]`, contiguous.
    pub fn residual_dims(&self, rows: usize) -> [usize; 4] {
        let [q, _, v] = &self.views;
        [rows, q.heads, q.tokens, v.channels]
    }

    pub fn residual_strides(&self) -> Strides {
        let [q, _, v] = &self.views;
        Strides::bhsd(q.heads, q.tokens, v.channels)
    }

    /// Where the `rows` rows at hand are in an R of shape `dims`; `None` if it does not fit. `covers`: which rows of the batch R
    /// is of, where that is known; else its shape says.
    pub fn find(&self, rows: usize, dims: &[usize], covers: Option<Rows>) -> Option<ResidualSlice> {
        let whole = match self.directive.rows {
            Rows::All => rows,
            Rows::Half => rows * 2,
        };
        let all = covers.map_or(dims.first() == Some(&whole), |covers| covers == Rows::All);
        let first = self.state.conditional_first();
        ResidualSlice::find(self.directive.rows, all, rows, first)
            .filter(|found| dims == self.residual_dims(found.rows))
    }

    /// Explicit state: whether anybody wants R.
    pub fn wants_present(&self) -> Result<bool, Error> {
        Ok(self.context.output_count()? > PRESENT)
    }

    /// Explicit state: there is no R after this step.
    fn no_present(&self) -> Result<(), Error> {
        if matches!(self.state, StateSource::Graph(_)) && self.wants_present()? {
            // Without rows there is nothing to write, in whatever memory.
            self.context
                .device_output(PRESENT, &self.residual_dims(0))?;
        }
        Ok(())
    }

    /// R is known to be zero and nobody will read it.
    fn capture_nothing(&self) -> Result<(), Error> {
        let StateSource::Session(run) = self.state else {
            return self.no_present();
        };
        if let Some(zero) = zero_entry(run, self.directive.rows) {
            run.capture(self.op.layer, zero, self.directive.rows);
        }
        Ok(())
    }
}

/// A [`Task`] with its tensors. `start` and `rows` are rows of the operands; `out` holds just those rows of the output.
pub(super) trait AttentionBackend {
    /// A part of the output.
    type Out: ?Sized;
    /// R of an earlier step.
    type PastResidual;

    fn task(&self) -> &Task<'_>;

    /// Attention over all keys.
    fn full(&self, start: usize, rows: usize, out: &mut Self::Out) -> Result<(), Error>;

    /// The same, and R goes where the task's memory wants it; where it has no room, nowhere.
    fn capture(&self, start: usize, rows: usize, out: &mut Self::Out) -> Result<(), Error>;

    /// R for the `rows` rows at hand and where they are in it; `None` if there is none that fits.
    fn residual(&self, rows: usize) -> Result<Option<(Self::PastResidual, ResidualSlice)>, Error>;

    /// Window attention plus residual.
    fn window(
        &self,
        start: usize,
        rows: usize,
        out: &mut Self::Out,
        residual: &Self::PastResidual,
        found: ResidualSlice,
    ) -> Result<(), Error>;

    /// Explicit state: R is after this step what it was before. Nothing to do for a run's.
    fn pass_on(&self, residual: &Self::PastResidual) -> Result<(), Error>;

    /// Does what the directive says.
    fn compute(&self, start: usize, rows: usize, out: &mut Self::Out) -> Result<(), Error> {
        let task = self.task();
        let whole = task.band.covers(task.views[0].tokens);
        match task.directive.work {
            Work::Full if task.directive.capture && whole => {
                self.full(start, rows, out)?;
                task.capture_nothing()
            }
            Work::Full if task.directive.capture => self.capture(start, rows, out),
            Work::Window if whole => {
                if let StateSource::Session(run) = task.state {
                    run.count_window_as_full();
                }
                self.full(start, rows, out)?;
                task.no_present()
            }
            Work::Window => match self.residual(rows)? {
                Some((residual, found)) => {
                    self.window(start, rows, out, &residual, found)?;
                    match task.directive.capture {
                        true => self.pass_on(&residual),
                        false => task.no_present(),
                    }
                }
                None => self.without_residual(start, rows, out),
            },
            Work::Full | Work::Reuse => {
                self.full(start, rows, out)?;
                task.no_present()
            }
        }
    }

    /// Window attention whose R is missing: full attention, which leaves another one where the graph asks for it.
    fn without_residual(
        &self,
        start: usize,
        rows: usize,
        out: &mut Self::Out,
    ) -> Result<(), Error> {
        let task = self.task();
        match task.state {
            StateSource::Session(run) => {
                run.discard_residual(task.op.layer);
                self.full(start, rows, out)
            }
            StateSource::Graph(_) if task.directive.capture => self.capture(start, rows, out),
            StateSource::Graph(_) => {
                self.full(start, rows, out)?;
                task.no_present()
            }
        }
    }
}

/// Where the rows at hand are in a stored R.
#[derive(Clone, Copy)]
pub(super) struct ResidualSlice {
    /// Rows that R must have.
    pub rows: usize,
    /// The row at which those at hand start.
    pub offset: usize,
    /// R has half of the rows at hand, and each half uses it.
    pub twice: bool,
}

impl ResidualSlice {
    /// Where `rows` rows at hand, which are all or the conditional half, are in an R of `all` rows or of half of them; `None`
    /// if it has nothing to say about them.
    pub fn find(
        at_hand: Rows,
        all: bool,
        rows: usize,
        conditional_first: bool,
    ) -> Option<ResidualSlice> {
        match (at_hand, all) {
            (Rows::All, true) | (Rows::Half, false) => Some(ResidualSlice::at(rows, 0)),
            // R of the conditional half stands for both halves.
            (Rows::All, false) if rows.is_multiple_of(2) => Some(ResidualSlice {
                twice: true,
                ..ResidualSlice::at(rows / 2, 0)
            }),
            (Rows::All, false) => None,
            (Rows::Half, true) if conditional_first => Some(ResidualSlice::at(rows * 2, 0)),
            (Rows::Half, true) => Some(ResidualSlice::at(rows * 2, rows)),
        }
    }

    fn at(rows: usize, offset: usize) -> Self {
        ResidualSlice {
            rows,
            offset,
            twice: false,
        }
    }
}
