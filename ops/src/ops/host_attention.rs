//! `DiTFastAttn` in the host's memory, for what `task` decides. In the core form it also does what select, share and reuse do
//! around a whole region.

use ditfastattn_kernels::{self as kernels, Computed, Input, Mode, Output};

use crate::abi::error::Error;
use crate::abi::kernel_context::KernelContext;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::op::Kernel;
use crate::abi::tensor::Tensor;
use crate::state::{Directive, Residual, Rows, Work};

use super::attention::{DiTFastAttn, MASK, PAST, PRESENT, TICKET};
use super::cache_entry::{CachedTensor, allocate};
use super::environment;
use super::io;
use super::layout::View;
use super::mask::MaskInput;
use super::op_common::{ByType, all_finite, by_type, in_run};
use super::share::{read_cached, store_output};
use super::task::{AttentionBackend, ResidualSlice, StateSource, Task};
use super::tensor_data::{Real, values};

impl Kernel for DiTFastAttn {
    fn create(info: &KernelInfo<'_>) -> Result<Self, Error> {
        DiTFastAttn::of(info)
    }

    fn compute(&self, context: &KernelContext<'_>) -> Result<(), Error> {
        let q = context.input(0)?;
        by_type(q.element(), Call { op: self, context })
    }
}

struct Call<'a> {
    op: &'a DiTFastAttn,
    context: &'a KernelContext<'a>,
}

impl ByType for Call<'_> {
    fn call<T: Real>(self) -> Result<(), Error> {
        let (op, context) = (self.op, self.context);
        let ticket = context.input(TICKET)?;
        match &op.io {
            Some(io) => self.attend::<T>(StateSource::Graph(io), io::directive(&ticket, op.layer)?),
            None => in_run(&ticket, op.layer, |run, directive| {
                self.attend::<T>(StateSource::Session(run), directive)
            }),
        }
    }
}

impl Call<'_> {
    fn attend<T: Real>(&self, state: StateSource<'_>, directive: Directive) -> Result<(), Error> {
        let (op, context) = (self.op, self.context);
        let [q, k, v] = [context.input(0)?, context.input(1)?, context.input(2)?];
        let shapes = [q.dims(), k.dims(), v.dims()];
        let (task, o_dims) = Task::new(op, context, state, directive, shapes)?;
        let mask = context
            .optional_input(MASK)?
            .map(|mask| MaskInput::read(&mask, &task.scores(), op.guarded))
            .transpose()?;
        let operands = [values(&q, "q")?, values(&k, "k")?, values(&v, "v")?];
        let mut out = context.output(0, &o_dims)?;
        let out = out.as_mut_slice::<T>().unwrap_or_default();
        let layer = HostBackend {
            task,
            operands,
            mask,
        };
        if op.core {
            layer.whole_batch(out, &o_dims)
        } else {
            layer.compute(0, layer.task.views[0].batch, out)
        }
    }
}

/// R of an earlier step.
enum PastResidual<'a> {
    Cached(Residual<CachedTensor>),
    Given(Tensor<'a>),
}

impl PastResidual<'_> {
    fn dims(&self) -> &[usize] {
        match self {
            PastResidual::Cached(residual) => residual.tensor.dims(),
            PastResidual::Given(tensor) => tensor.dims(),
        }
    }

    fn values<T: Real>(&self) -> Option<&[T]> {
        match self {
            PastResidual::Cached(residual) => residual.tensor.values::<T>(),
            PastResidual::Given(tensor) => tensor.as_slice::<T>(),
        }
    }
}

/// One layer in one run, in the host's memory.
struct HostBackend<'a, T> {
    task: Task<'a>,
    /// q, k, v.
    operands: [&'a [T]; 3],
    mask: Option<MaskInput<'a>>,
}

impl<T: Real> HostBackend<'_, T> {
    /// The core form: selects, computes, shares, keeps, reuses.
    fn whole_batch(&self, out: &mut [T], o_dims: &[usize]) -> Result<(), Error> {
        let batch = self.task.views[0].batch;
        if self.task.directive.work == Work::Reuse {
            return self.serve_kept(out, o_dims);
        }
        match self.task.directive.rows {
            Rows::All => {
                self.compute(0, batch, out)?;
                self.finish(out, o_dims);
            }
            Rows::Half => {
                let mut half_dims = o_dims.to_vec();
                super::select::halve(&mut half_dims)?;
                let (first, second) = out.split_at_mut(out.len() / 2);
                let (from, to, start) = if self.task.state.conditional_first() {
                    (first, second, 0)
                } else {
                    (second, first, batch / 2)
                };
                self.compute(start, batch / 2, from)?;
                super::op_common::copy(self.task.context, from, to);
                self.finish(from, &half_dims);
            }
        }
        Ok(())
    }

    fn serve_kept(&self, out: &mut [T], o_dims: &[usize]) -> Result<(), Error> {
        let Task { op, context, .. } = self.task;
        let StateSource::Session(run) = self.task.state else {
            return Ok(());
        };
        let kept = op.kept(run, o_dims)?;
        read_cached(context, &kept, out).ok_or_else(|| op.does_not_fit(&kept, o_dims))?;
        run.finish(op.layer, 0, 1, None);
        Ok(())
    }

    /// The core form's end: what `DiTFastAttnShare` does around a module.
    fn finish(&self, computed: &[T], dims: &[usize]) {
        let Task {
            op,
            context,
            directive,
            ..
        } = self.task;
        if let StateSource::Session(run) = self.task.state {
            let kept = store_output(context, run, directive, computed, dims);
            run.finish(op.layer, 0, 1, kept);
        }
    }

    fn attend_and_capture(
        &self,
        start: usize,
        rows: usize,
        out: &mut [T],
        residual: &mut [T],
    ) -> Result<Computed, Error> {
        let mode = Mode::FullCapture {
            band: self.task.band,
            residual: Output::from_slice(residual, self.task.residual_strides()),
        };
        self.attention(start, rows, out, mode)
    }

    fn attention(
        &self,
        start: usize,
        rows: usize,
        out: &mut [T],
        mode: Mode<'_>,
    ) -> Result<Computed, Error> {
        let task = &self.task;
        let operand = |i: usize| from_row(self.operands[i], &task.views[i], start);
        kernels::attention_in(
            &kernels::Attention {
                shape: task.shape(rows),
                scale: task.scale(),
                q: operand(0),
                k: operand(1),
                v: operand(2),
                mask: self.mask.map(|mask| mask.starting_at(start)),
                out: Output::from_slice(out, task.o.strides),
                mode,
            },
            task.context,
            environment::products(),
        )
        .map_err(|error| Error::invalid(error.to_string()))
    }
}

impl<'a, T: Real> AttentionBackend for HostBackend<'a, T> {
    type Out = [T];
    type PastResidual = PastResidual<'a>;

    fn task(&self) -> &Task<'_> {
        &self.task
    }

    fn full(&self, start: usize, rows: usize, out: &mut [T]) -> Result<(), Error> {
        self.attention(start, rows, out, Mode::Full).map(|_| ())
    }

    fn capture(&self, start: usize, rows: usize, out: &mut [T]) -> Result<(), Error> {
        let Task {
            op,
            context,
            directive,
            ..
        } = self.task;
        let dims = self.task.residual_dims(rows);
        let len = dims.iter().product();
        let run = match self.task.state {
            StateSource::Session(run) => run,
            StateSource::Graph(_) if self.task.wants_present()? => {
                let mut present = context.output(PRESENT, &dims)?;
                let residual = present.as_mut_slice::<T>().unwrap_or_default();
                self.attend_and_capture(start, rows, out, residual)?;
                return Ok(());
            }
            StateSource::Graph(_) => return self.full(start, rows, out),
        };
        let Some(mut entry) = allocate::<T>(run, len) else {
            return self.full(start, rows, out);
        };
        let computed = self.attend_and_capture(start, rows, out, &mut entry.values)?;
        if computed.residual_is_finite {
            let tensor = entry.store(&dims, directive.rows);
            run.capture(op.layer, tensor, directive.rows);
        } else {
            run.refuse_non_finite();
        }
        Ok(())
    }

    fn residual(&self, rows: usize) -> Result<Option<(PastResidual<'a>, ResidualSlice)>, Error> {
        let Task { op, context, .. } = self.task;
        let residual = match self.task.state {
            StateSource::Session(run) => run.residual(op.layer).map(PastResidual::Cached),
            StateSource::Graph(_) => context.optional_input(PAST)?.map(PastResidual::Given),
        };
        let Some(residual) = residual else {
            return Ok(None);
        };
        let (covers, looked_at) = match &residual {
            PastResidual::Cached(residual) => (Some(residual.rows), true),
            PastResidual::Given(_) => (None, false),
        };
        // What is not finite would poison every step that adds it. Cached ones were looked at before they were stored.
        let sound = |values: &[T]| looked_at || all_finite(context, values);
        let found = self.task.find(rows, residual.dims(), covers);
        Ok(found
            .filter(|_| residual.values::<T>().is_some_and(sound))
            .map(|found| (residual, found)))
    }

    /// A residual of half the rows is used twice.
    fn window(
        &self,
        start: usize,
        rows: usize,
        out: &mut [T],
        residual: &PastResidual<'a>,
        found: ResidualSlice,
    ) -> Result<(), Error> {
        let strides = self.task.residual_strides();
        let values = residual.values::<T>().unwrap_or_default();
        let values = values
            .get(found.offset * strides.batch.unsigned_abs()..)
            .unwrap_or_default();
        let mode = || Mode::Window {
            band: self.task.band,
            residual: Some(Input::from_slice(values, strides)),
        };
        if found.twice {
            self.attention(start, rows / 2, out, mode())?;
            let row = self.task.o.strides.batch.unsigned_abs();
            let second = out.get_mut(rows / 2 * row..).unwrap_or_default();
            self.attention(start + rows / 2, rows / 2, second, mode())?;
        } else {
            self.attention(start, rows, out, mode())?;
        }
        Ok(())
    }

    fn pass_on(&self, residual: &PastResidual<'a>) -> Result<(), Error> {
        if matches!(residual, PastResidual::Cached(_)) || !self.task.wants_present()? {
            return Ok(());
        }
        let mut present = self.task.context.output(PRESENT, residual.dims())?;
        let to = present.as_mut_slice::<T>().unwrap_or_default();
        let from = residual.values::<T>().unwrap_or_default();
        super::op_common::copy(self.task.context, from, to);
        Ok(())
    }
}

/// An operand from row `start` on; the kernel checks that what it needs is there.
fn from_row<'a, T: Real>(values: &'a [T], view: &View, start: usize) -> Input<'a> {
    let first = (start * view.strides.batch.unsigned_abs()).min(values.len());
    Input::from_slice(&values[first..], view.strides)
}
