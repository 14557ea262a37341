//! `DiTFastAttn` on CUDA: kernel launches, on tensors in device memory, for what `task` decides.

use std::ptr::null_mut;
use std::sync::Arc;

use ditfastattn_kernels::{Attention, DType, Input, Mask, MaskStrides, MaskType, Mode, Output};

use crate::abi::error::Error;
use crate::abi::kernel_context::KernelContext;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::op::Kernel;
use crate::abi::tensor::{DeviceTensor, ElementType};
use crate::state::{Directive, Residual, Rows, Run, Work};

use super::super::attention::{DiTFastAttn, MASK, PAST, PRESENT, TICKET};
use super::super::cache_entry::{CachedTensor, allocate_on_device};
use super::super::io;
use super::super::mask::{Scores, unknown_type};
use super::super::op_common::in_run;
use super::super::select::halve;
use super::super::task::{AttentionBackend, ResidualSlice, StateSource, Task};
use super::device_context::{DeviceContext, DeviceSlice};
use super::{OnCuda, dtype_of};

impl Kernel for OnCuda<DiTFastAttn> {
    fn create(info: &KernelInfo<'_>) -> Result<Self, Error> {
        DiTFastAttn::create(info).map(OnCuda)
    }

    fn compute(&self, context: &KernelContext<'_>) -> Result<(), Error> {
        let op = &self.0;
        let device_context = DeviceContext::of(context)?;
        let ticket = context.input(TICKET)?;
        match &op.io {
            Some(io) => {
                let directive = io::directive(&ticket, op.layer)?;
                attend(
                    op,
                    device_context,
                    context,
                    StateSource::Graph(io),
                    directive,
                )
            }
            None => in_run(&ticket, op.layer, |run, directive| {
                attend(
                    op,
                    device_context,
                    context,
                    StateSource::Session(run),
                    directive,
                )
            }),
        }
    }
}

fn attend(
    op: &DiTFastAttn,
    device_context: DeviceContext,
    context: &KernelContext<'_>,
    state: StateSource<'_>,
    directive: Directive,
) -> Result<(), Error> {
    let operands = [0, 1, 2].map(|i| context.device_input(i));
    let [q, k, v] = operands;
    let operands = [q?, k?, v?];
    let shapes = [0, 1, 2].map(|i| operands[i].dims());
    let (task, o_dims) = Task::new(op, context, state, directive, shapes)?;
    let mask = context
        .optional_device_input(MASK)?
        .map(|mask| DeviceMask::read(&mask, &task.scores(), op.guarded))
        .transpose()?;
    let dtype = dtype_of(operands[0].element())?;
    let out = context.device_output(0, &o_dims)?;
    let mut out = DeviceSlice {
        address: out.address(),
        dtype,
        len: out.len(),
    };
    let layer = CudaBackend {
        task,
        device_context,
        dtype,
        operands,
        mask,
    };
    if op.core {
        layer.whole_batch(out, &o_dims)
    } else {
        layer.compute(0, layer.task.views[0].batch, &mut out)
    }
}

/// A mask in device memory.
#[derive(Clone, Copy, Debug)]
struct DeviceMask {
    address: *const u8,
    kind: MaskType,
    strides: MaskStrides,
    row: usize,
    guarded: bool,
}

impl DeviceMask {
    fn read(tensor: &DeviceTensor<'_>, scores: &Scores, guarded: bool) -> Result<Self, Error> {
        let kind = match tensor.element() {
            ElementType::Bool => MaskType::Boolean,
            ElementType::F32 => MaskType::Additive(DType::F32),
            ElementType::F16 => MaskType::Additive(DType::F16),
            ElementType::BF16 => MaskType::Additive(DType::BF16),
            other => return Err(unknown_type(other)),
        };
        let (strides, row) = scores.broadcast(tensor.dims())?;
        Ok(DeviceMask {
            address: tensor.address(),
            kind,
            strides,
            row,
            guarded,
        })
    }

    fn starting_at(&self, start: usize) -> Mask<'_> {
        let first = (self.row + start) * self.strides.batch.unsigned_abs() * self.kind.size();
        // SAFETY: an input of the node, whose shape broadcasts to the scores: every element lies inside.
        unsafe { Mask::from_raw(self.address.wrapping_add(first), self.kind, self.strides) }
            .guarded(self.guarded)
    }
}

/// R of an earlier step.
enum PastResidual<'a> {
    Cached(Residual<CachedTensor>),
    Given(DeviceTensor<'a>),
}

/// One layer in one run, in a device's memory.
struct CudaBackend<'a> {
    task: Task<'a>,
    device_context: DeviceContext,
    dtype: DType,
    /// q, k, v.
    operands: [DeviceTensor<'a>; 3],
    mask: Option<DeviceMask>,
}

impl CudaBackend<'_> {
    /// The core form: selects, computes, shares, keeps, reuses.
    fn whole_batch(&self, mut out: DeviceSlice, o_dims: &[usize]) -> Result<(), Error> {
        let batch = self.task.views[0].batch;
        if self.task.directive.work == Work::Reuse {
            return self.serve_kept(out, o_dims);
        }
        match self.task.directive.rows {
            Rows::All => {
                self.compute(0, batch, &mut out)?;
                self.finish(out, &[], o_dims)
            }
            Rows::Half => {
                let mut half_dims = o_dims.to_vec();
                halve(&mut half_dims)?;
                let conditional_first = self.task.state.conditional_first();
                let start = if conditional_first { 0 } else { batch / 2 };
                let [mut from, to] = out.halves(conditional_first);
                self.compute(start, batch / 2, &mut from)?;
                self.finish(from, &[to], &half_dims)
            }
        }
    }

    fn serve_kept(&self, out: DeviceSlice, o_dims: &[usize]) -> Result<(), Error> {
        let op = self.task.op;
        let StateSource::Session(run) = self.task.state else {
            return Ok(());
        };
        let kept = op.kept(run, o_dims)?;
        // SAFETY: an output of this node, of the shape that `kept` was compared with.
        let served = unsafe { self.device_context.read_cached(&kept, out) }?;
        served.ok_or_else(|| op.does_not_fit(&kept, o_dims))?;
        run.finish(op.layer, 0, 1, None);
        Ok(())
    }

    /// The core form's end: the other half, and what is kept.
    fn finish(
        &self,
        computed: DeviceSlice,
        others: &[DeviceSlice],
        dims: &[usize],
    ) -> Result<(), Error> {
        let run = match self.task.state {
            StateSource::Session(run) => Some(run),
            StateSource::Graph(_) => None,
        };
        // SAFETY: parts of the output of this node, ordered on this stream.
        let kept = unsafe {
            self.device_context
                .spread(run, self.task.directive, computed, others, dims)?
        };
        if let Some(run) = run {
            run.finish(self.task.op.layer, 0, 1, kept);
        }
        Ok(())
    }

    fn capture_for(
        &self,
        run: &Arc<Run<CachedTensor>>,
        start: usize,
        rows: usize,
        out: DeviceSlice,
    ) -> Result<(), Error> {
        let DeviceContext { device, stream } = self.device_context;
        let dims = self.task.residual_dims(rows);
        let bytes = dims.iter().product::<usize>() * self.dtype.size();
        let Some(entry) = allocate_on_device(run, device, stream, bytes) else {
            return self.attention(start, rows, out, Mode::Full, null_mut());
        };
        let flag = entry.buffer.non_finite();
        entry.buffer.on(stream, |address| {
            self.attend_and_capture(start, rows, out, address.cast(), flag)
        })?;
        let covers = self.task.directive.rows;
        let tensor = entry.store(self.dtype, &dims, covers);
        run.capture(self.task.op.layer, tensor, covers);
        Ok(())
    }

    fn attend_and_capture(
        &self,
        start: usize,
        rows: usize,
        out: DeviceSlice,
        residual: *mut u8,
        flag: *mut u32,
    ) -> Result<(), Error> {
        let strides = self.task.residual_strides();
        let mode = Mode::FullCapture {
            band: self.task.band,
            // SAFETY: memory for `residual_dims`, contiguous in that order, used in the order of the stream.
            residual: unsafe { Output::from_raw(residual, self.dtype, strides) },
        };
        self.attention(start, rows, out, mode, flag)
    }

    /// A residual of half the rows is used twice.
    fn window_with(
        &self,
        start: usize,
        rows: usize,
        out: DeviceSlice,
        residual: *mut u8,
        found: ResidualSlice,
    ) -> Result<(), Error> {
        let strides = self.task.residual_strides();
        let first = found.offset * strides.batch.unsigned_abs() * self.dtype.size();
        let mode = || Mode::Window {
            band: self.task.band,
            // SAFETY: R has the rows that `ResidualSlice` says, contiguous, and is used in the order of the stream.
            residual: Some(unsafe {
                Input::from_raw(residual.wrapping_add(first), self.dtype, strides)
            }),
        };
        if found.twice {
            let [one, two] = out.halves(true);
            self.attention(start, rows / 2, one, mode(), null_mut())?;
            let row = self.task.o.strides.batch.unsigned_abs();
            // Rows may lie in each other's gaps where the batch is not outermost, so the second half begins at its row.
            let second = DeviceSlice {
                address: out.address.wrapping_add(rows / 2 * row * self.dtype.size()),
                ..two
            };
            self.attention(start + rows / 2, rows / 2, second, mode(), null_mut())
        } else {
            self.attention(start, rows, out, mode(), null_mut())
        }
    }

    /// `flag` is set if a captured R is not finite; null: nobody asks.
    fn attention(
        &self,
        start: usize,
        rows: usize,
        out: DeviceSlice,
        mode: Mode<'_>,
        flag: *mut u32,
    ) -> Result<(), Error> {
        let task = &self.task;
        let operand = |i: usize| {
            let strides = task.views[i].strides;
            let first = start * strides.batch.unsigned_abs() * self.dtype.size();
            let address = self.operands[i].address().wrapping_add(first);
            // SAFETY: an input of the node, seen through its own layout; `start + rows` is at most its batch.
            unsafe { Input::from_raw(address, self.dtype, strides) }
        };
        let call = Attention {
            shape: task.shape(rows),
            scale: task.scale(),
            q: operand(0),
            k: operand(1),
            v: operand(2),
            mask: self.mask.as_ref().map(|mask| mask.starting_at(start)),
            // SAFETY: these rows of the node's output, through its own layout.
            out: unsafe { Output::from_raw(out.address, self.dtype, task.o.strides) },
            mode,
        };
        // SAFETY: inputs and outputs of this node, which ONNX Runtime orders on this stream; the caller orders R.
        Ok(unsafe {
            self.device_context
                .device
                .attention(self.device_context.stream, &call, flag)
        }?)
    }
}

impl<'a> AttentionBackend for CudaBackend<'a> {
    type Out = DeviceSlice;
    type PastResidual = PastResidual<'a>;

    fn task(&self) -> &Task<'_> {
        &self.task
    }

    fn full(&self, start: usize, rows: usize, out: &mut DeviceSlice) -> Result<(), Error> {
        self.attention(start, rows, *out, Mode::Full, null_mut())
    }

    fn capture(&self, start: usize, rows: usize, out: &mut DeviceSlice) -> Result<(), Error> {
        match self.task.state {
            StateSource::Session(run) => self.capture_for(run, start, rows, *out),
            StateSource::Graph(_) if self.task.wants_present()? => {
                let dims = self.task.residual_dims(rows);
                let present = self.task.context.device_output(PRESENT, &dims)?;
                self.attend_and_capture(start, rows, *out, present.address(), null_mut())
            }
            StateSource::Graph(_) => self.full(start, rows, out),
        }
    }

    fn residual(&self, rows: usize) -> Result<Option<(PastResidual<'a>, ResidualSlice)>, Error> {
        let Task { op, context, .. } = self.task;
        let residual = match self.task.state {
            StateSource::Session(run) => run.residual(op.layer).map(PastResidual::Cached),
            StateSource::Graph(_) => context
                .optional_device_input(PAST)?
                .map(PastResidual::Given),
        };
        let Some(residual) = residual else {
            return Ok(None);
        };
        let (dims, covers, typed) = match &residual {
            PastResidual::Cached(Residual { tensor, rows }) => {
                let here = tensor.on_device(self.dtype).is_some();
                (tensor.dims(), Some(*rows), here)
            }
            PastResidual::Given(past) => {
                (past.dims(), None, dtype_of(past.element())? == self.dtype)
            }
        };
        let found = self.task.find(rows, dims, covers).filter(|_| typed);
        Ok(found.map(|found| (residual, found)))
    }

    fn window(
        &self,
        start: usize,
        rows: usize,
        out: &mut DeviceSlice,
        residual: &PastResidual<'a>,
        found: ResidualSlice,
    ) -> Result<(), Error> {
        match residual {
            PastResidual::Cached(residual) => match residual.tensor.on_device(self.dtype) {
                Some(buffer) => buffer.on(self.device_context.stream, |address| {
                    self.window_with(start, rows, *out, address.cast(), found)
                }),
                None => self.without_residual(start, rows, out),
            },
            PastResidual::Given(past) => self.window_with(start, rows, *out, past.address(), found),
        }
    }

    fn pass_on(&self, residual: &PastResidual<'a>) -> Result<(), Error> {
        let PastResidual::Given(past) = residual else {
            return Ok(());
        };
        if !self.task.wants_present()? {
            return Ok(());
        }
        let present = self.task.context.device_output(PRESENT, past.dims())?;
        let from = DeviceSlice {
            address: past.address(),
            dtype: self.dtype,
            len: past.len(),
        };
        let to = DeviceSlice {
            address: present.address(),
            ..from
        };
        // SAFETY: input and output of this node, which ONNX Runtime orders on this stream.
        unsafe { self.device_context.copy(from, to) }
    }
}
