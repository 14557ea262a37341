//! `DiTFastAttn` on CUDA: from a directive to kernel launches. See the operator's CPU side for the meaning of each case.

use std::sync::Arc;

use ditfastattn_kernels::{
    Attention, Band, DType, Input, Mask, MaskStrides, MaskType, Mode, Output, Shape, Strides,
};

use crate::abi::context::Context;
use crate::abi::info::Info;
use crate::abi::op::Kernel;
use crate::abi::status::Error;
use crate::abi::tensor::{DeviceTensor, ElementType};
use crate::state::{Directive, Rows, Run, Work};

use super::super::attention::{DiTFastAttn, MASK, Memory, PAST, PRESENT, Stored, TEXT, TICKET};
use super::super::io;
use super::super::layer::in_run;
use super::super::layout::View;
use super::super::mask::{Scores, unknown_type};
use super::super::select::halve;
use super::super::storage::{CachedTensor, allocate_on_device, nothing};
use super::place::{Place, Region};
use super::{OnCuda, dtype_of};

impl Kernel for OnCuda<DiTFastAttn> {
    fn create(info: &Info<'_>) -> Result<Self, Error> {
        DiTFastAttn::create(info).map(OnCuda)
    }

    fn compute(&self, context: &Context<'_>) -> Result<(), Error> {
        let op = &self.0;
        let place = Place::of(context)?;
        let ticket = context.input(TICKET)?;
        match &op.io {
            Some(io) => {
                let directive = io::directive(&ticket, op.layer)?;
                attend(op, place, context, Memory::Graph(io), directive)
            }
            None => in_run(&ticket, op.layer, |run, directive| {
                attend(op, place, context, Memory::Run(run), directive)
            }),
        }
    }
}

fn attend(
    op: &DiTFastAttn,
    place: Place,
    context: &Context<'_>,
    memory: Memory<'_>,
    directive: Directive,
) -> Result<(), Error> {
    op.refuse_if_served(&memory, directive)?;
    let tensors = [0, 1, 2].map(|i| context.device_input(i));
    let [q, k, v] = tensors;
    let (q, k, v) = (q?, k?, v?);
    let views = op.layouts.views(q.dims(), k.dims(), v.dims())?;
    let halved = directive.rows == Rows::Half && !op.core;
    let scores = Scores::new(
        &views[0],
        &views[1],
        op.layouts.q.is_folded(),
        halved.then(|| memory.conditional_first()),
    );
    let mask = context
        .optional_device_input(MASK)?
        .map(|mask| DeviceMask::read(&mask, &scores, op.guarded))
        .transpose()?;
    let text = context.optional_input(TEXT)?;
    let band = op
        .text
        .band(memory.plan(), text.as_ref(), views[0].tokens)?;
    let o_dims = op.layouts.output_dims(&views[0], &views[2])?;
    let out = context.device_output(0, &o_dims)?;
    let layer = Layer {
        op,
        place,
        context,
        memory,
        directive,
        dtype: dtype_of(q.element())?,
        o: op.layouts.o.view(&o_dims, views[0].heads, "the output")?,
        operands: [q, k, v],
        views,
        mask,
        band,
    };
    let out = Region {
        address: out.address(),
        dtype: layer.dtype,
        len: out.len(),
    };
    if op.core {
        layer.whole_batch(out, &o_dims)
    } else {
        layer.compute(0, layer.views[0].batch, out)
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
enum Earlier<'a> {
    Cached(CachedTensor),
    Given(DeviceTensor<'a>),
}

/// One layer in one run.
struct Layer<'a> {
    op: &'a DiTFastAttn,
    place: Place,
    context: &'a Context<'a>,
    memory: Memory<'a>,
    directive: Directive,
    dtype: DType,
    operands: [DeviceTensor<'a>; 3],
    views: [View; 3],
    /// The output. Its strides hold for parts of the batch too.
    o: View,
    mask: Option<DeviceMask>,
    band: Band,
}

impl Layer<'_> {
    /// The core form: selects, computes, shares, keeps, reuses.
    fn whole_batch(&self, out: Region, o_dims: &[usize]) -> Result<(), Error> {
        let batch = self.views[0].batch;
        if self.directive.work == Work::Reuse {
            return self.serve_kept(out, o_dims);
        }
        match self.directive.rows {
            Rows::All => {
                self.compute(0, batch, out)?;
                self.finish(out, &[], o_dims)
            }
            Rows::Half => {
                let mut half_dims = o_dims.to_vec();
                halve(&mut half_dims)?;
                let conditional_first = self.memory.conditional_first();
                let start = if conditional_first { 0 } else { batch / 2 };
                let [from, to] = out.halves(conditional_first);
                self.compute(start, batch / 2, from)?;
                self.finish(from, &[to], &half_dims)
            }
        }
    }

    fn serve_kept(&self, out: Region, o_dims: &[usize]) -> Result<(), Error> {
        let Memory::Run(run) = self.memory else {
            return Ok(());
        };
        let kept = self.op.kept(run, o_dims)?;
        // SAFETY: an output of this node, of the shape that `kept` was compared with.
        let served = unsafe { self.place.serve(&kept, out) }?;
        served.ok_or_else(|| self.op.does_not_fit(&kept, o_dims))?;
        run.finish(self.op.layer, 0, 1, None);
        Ok(())
    }

    /// The core form's end: the other half, and what is kept.
    fn finish(&self, computed: Region, others: &[Region], dims: &[usize]) -> Result<(), Error> {
        let run = match self.memory {
            Memory::Run(run) => Some(run),
            Memory::Graph(_) => None,
        };
        // SAFETY: parts of the output of this node, ordered on this stream.
        let kept = unsafe {
            self.place
                .spread(run, self.directive, computed, others, dims)?
        };
        if let Some(run) = run {
            run.finish(self.op.layer, 0, 1, kept);
        }
        Ok(())
    }

    /// Attention of rows `start..start + rows` of the operands into `out`, which holds just those rows.
    fn compute(&self, start: usize, rows: usize, out: Region) -> Result<(), Error> {
        let whole = self.band.covers(self.views[0].tokens);
        match self.directive.work {
            Work::Full if self.directive.capture && whole => {
                self.attention(start, rows, out, Mode::Full, None)?;
                self.capture_nothing()
            }
            Work::Full if self.directive.capture => self.capture(start, rows, out),
            Work::Window if whole => {
                if let Memory::Run(run) = self.memory {
                    run.count_window_as_full();
                }
                self.attention(start, rows, out, Mode::Full, None)?;
                self.no_present()
            }
            Work::Window => match self.residual(rows)? {
                Some((residual, found)) => {
                    self.window(start, rows, out, &residual, found)?;
                    match self.directive.capture {
                        true => self.pass_on(&residual),
                        false => self.no_present(),
                    }
                }
                None => self.without_residual(start, rows, out),
            },
            Work::Full | Work::Reuse => {
                self.attention(start, rows, out, Mode::Full, None)?;
                self.no_present()
            }
        }
    }

    /// Window attention whose R is missing: full attention, which leaves another one where the graph asks for it.
    fn without_residual(&self, start: usize, rows: usize, out: Region) -> Result<(), Error> {
        match self.memory {
            Memory::Run(run) => {
                run.discard_residual(self.op.layer);
                self.attention(start, rows, out, Mode::Full, None)
            }
            Memory::Graph(_) if self.directive.capture => self.capture(start, rows, out),
            Memory::Graph(_) => {
                self.attention(start, rows, out, Mode::Full, None)?;
                self.no_present()
            }
        }
    }

    /// Full attention that leaves R.
    fn capture(&self, start: usize, rows: usize, out: Region) -> Result<(), Error> {
        let dims = self.residual_dims(rows);
        match self.memory {
            Memory::Run(run) => self.capture_for(run, start, rows, out, dims),
            Memory::Graph(_) if self.wants_present()? => {
                let present = self.context.device_output(PRESENT, &dims)?;
                self.attend_and_capture(start, rows, out, present.address(), None)
            }
            Memory::Graph(_) => self.attention(start, rows, out, Mode::Full, None),
        }
    }

    fn capture_for(
        &self,
        run: &Arc<Run<CachedTensor>>,
        start: usize,
        rows: usize,
        out: Region,
        dims: [usize; 4],
    ) -> Result<(), Error> {
        let Place { device, stream } = self.place;
        let bytes = dims.iter().product::<usize>() * self.dtype.size();
        let Some(room) = allocate_on_device(run, device, stream, bytes) else {
            return self.attention(start, rows, out, Mode::Full, None);
        };
        let flag = Some(room.buffer.non_finite());
        room.buffer.on(stream, |address| {
            self.attend_and_capture(start, rows, out, address.cast(), flag)
        })?;
        let tensor = room.store(self.dtype, &dims, self.directive.rows);
        run.capture(self.op.layer, tensor, self.directive.rows);
        Ok(())
    }

    fn attend_and_capture(
        &self,
        start: usize,
        rows: usize,
        out: Region,
        residual: *mut u8,
        flag: Option<*mut u32>,
    ) -> Result<(), Error> {
        let mode = Mode::FullCapture {
            band: self.band,
            // SAFETY: memory for `residual_dims`, contiguous in that order, used in the order of the stream.
            residual: unsafe { Output::from_raw(residual, self.dtype, self.residual_strides()) },
        };
        self.attention(start, rows, out, mode, flag)
    }

    /// R is known to be zero and nobody will read it.
    fn capture_nothing(&self) -> Result<(), Error> {
        let Memory::Run(run) = self.memory else {
            return self.no_present();
        };
        if let Some(zero) = nothing(run, self.directive.rows) {
            run.capture(self.op.layer, zero, self.directive.rows);
        }
        Ok(())
    }

    fn wants_present(&self) -> Result<bool, Error> {
        Ok(self.context.output_count()? > PRESENT)
    }

    /// Explicit state: there is no R after this step.
    fn no_present(&self) -> Result<(), Error> {
        if matches!(self.memory, Memory::Graph(_)) && self.wants_present()? {
            self.context
                .device_output(PRESENT, &self.residual_dims(0))?;
        }
        Ok(())
    }

    /// Explicit state: R is after this step what it was before.
    fn pass_on(&self, residual: &Earlier<'_>) -> Result<(), Error> {
        let Earlier::Given(past) = residual else {
            return Ok(());
        };
        if !self.wants_present()? {
            return Ok(());
        }
        let present = self.context.device_output(PRESENT, past.dims())?;
        let from = Region {
            address: past.address(),
            dtype: self.dtype,
            len: past.len(),
        };
        let to = Region {
            address: present.address(),
            ..from
        };
        // SAFETY: input and output of this node, which ONNX Runtime orders on this stream.
        unsafe { self.place.copy(from, to) }
    }

    /// R for the `rows` rows at hand and where they are in it; `None` if there is none that fits.
    fn residual(&self, rows: usize) -> Result<Option<(Earlier<'_>, Stored)>, Error> {
        let (residual, all) = match self.memory {
            Memory::Run(run) => match run.residual(self.op.layer) {
                Some(residual) => {
                    let all = residual.rows == Rows::All;
                    (Earlier::Cached(residual.tensor), all)
                }
                None => return Ok(None),
            },
            Memory::Graph(_) => match self.context.optional_device_input(PAST)? {
                Some(past) => {
                    let whole = match self.directive.rows {
                        Rows::All => rows,
                        Rows::Half => rows * 2,
                    };
                    let all = past.dims().first() == Some(&whole);
                    (Earlier::Given(past), all)
                }
                None => return Ok(None),
            },
        };
        let conditional_first = self.memory.conditional_first();
        let Some(found) = Stored::find(self.directive.rows, all, rows, conditional_first) else {
            return Ok(None);
        };
        let dims = self.residual_dims(found.rows);
        let fits = match &residual {
            Earlier::Cached(tensor) => {
                tensor.dims() == dims && tensor.on_device(self.dtype).is_some()
            }
            Earlier::Given(past) => past.dims() == dims && dtype_of(past.element())? == self.dtype,
        };
        Ok(fits.then_some((residual, found)))
    }

    fn window(
        &self,
        start: usize,
        rows: usize,
        out: Region,
        residual: &Earlier<'_>,
        found: Stored,
    ) -> Result<(), Error> {
        match residual {
            Earlier::Cached(tensor) => match tensor.on_device(self.dtype) {
                Some(buffer) => buffer.on(self.place.stream, |address| {
                    self.window_with(start, rows, out, address.cast(), found)
                }),
                None => self.without_residual(start, rows, out),
            },
            Earlier::Given(past) => self.window_with(start, rows, out, past.address(), found),
        }
    }

    /// Window attention plus residual. A residual of half the rows is used twice.
    fn window_with(
        &self,
        start: usize,
        rows: usize,
        out: Region,
        residual: *mut u8,
        found: Stored,
    ) -> Result<(), Error> {
        let strides = self.residual_strides();
        let first = found.offset * strides.batch.unsigned_abs() * self.dtype.size();
        let mode = || Mode::Window {
            band: self.band,
            // SAFETY: R has the rows that `Stored` says, contiguous, and is used in the order of the stream.
            residual: Some(unsafe {
                Input::from_raw(residual.wrapping_add(first), self.dtype, strides)
            }),
        };
        if found.twice {
            let [one, two] = out.halves(true);
            self.attention(start, rows / 2, one, mode(), None)?;
            let row = self.o.strides.batch.unsigned_abs();
            // Rows may lie in each other's gaps where the batch is not outermost, so the second half begins at its row.
            let second = Region {
                address: out.address.wrapping_add(rows / 2 * row * self.dtype.size()),
                ..two
            };
            self.attention(start + rows / 2, rows / 2, second, mode(), None)
        } else {
            self.attention(start, rows, out, mode(), None)
        }
    }

    fn attention(
        &self,
        start: usize,
        rows: usize,
        out: Region,
        mode: Mode<'_>,
        flag: Option<*mut u32>,
    ) -> Result<(), Error> {
        let [q, k, v] = &self.views;
        let from_row = |i: usize| {
            let strides = self.views[i].strides;
            let first = start * strides.batch.unsigned_abs() * self.dtype.size();
            let address = self.operands[i].address().wrapping_add(first);
            // SAFETY: an input of the node, seen through its own layout; `start + rows` is at most its batch.
            unsafe { Input::from_raw(address, self.dtype, strides) }
        };
        let call = Attention {
            shape: Shape {
                batch: rows,
                heads: q.heads,
                kv_heads: k.heads,
                q_tokens: q.tokens,
                kv_tokens: k.tokens,
                head_dim: q.channels,
                v_dim: v.channels,
            },
            scale: self.op.scale_of(q.channels),
            q: from_row(0),
            k: from_row(1),
            v: from_row(2),
            mask: self.mask.as_ref().map(|mask| mask.starting_at(start)),
            // SAFETY: these rows of the node's output, through its own layout.
            out: unsafe { Output::from_raw(out.address, self.dtype, self.o.strides) },
            mode,
        };
        // SAFETY: inputs and outputs of this node, which ONNX Runtime orders on this stream; the caller orders R.
        unsafe {
            self.place.device.attention(
                self.place.stream,
                &call,
                flag.unwrap_or(std::ptr::null_mut()),
            )?;
        }
        Ok(())
    }

    fn residual_dims(&self, rows: usize) -> [usize; 4] {
        let [q, _, v] = &self.views;
        [rows, q.heads, q.tokens, v.channels]
    }

    fn residual_strides(&self) -> Strides {
        let [q, _, v] = &self.views;
        Strides::bhsd(q.heads, q.tokens, v.channels)
    }
}
