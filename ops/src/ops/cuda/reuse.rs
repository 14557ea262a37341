//! `DiTFastAttnReuse` on CUDA: copies on the stream.

use crate::abi::error::Error;
use crate::abi::kernel_context::KernelContext;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::op::Kernel;

use super::super::op_common::in_run;
use super::super::reuse::{CHANGED_BATCH, Reuse, UNFIT_PAST};
use super::super::share::rows_of_both;
use super::device_context::{DeviceContext, DeviceSlice};
use super::{OnCuda, dtype_of};

impl Kernel for OnCuda<Reuse> {
    fn create(info: &KernelInfo<'_>) -> Result<Self, Error> {
        Reuse::create(info).map(OnCuda)
    }

    fn compute(&self, context: &KernelContext<'_>) -> Result<(), Error> {
        let reuse = &self.0;
        let device_context = DeviceContext::of(context)?;
        let x = context.device_input(0)?;
        let dtype = dtype_of(x.element())?;
        let output = |dims: &[usize]| -> Result<DeviceSlice, Error> {
            let out = context.device_output(0, dims)?;
            Ok(DeviceSlice {
                address: out.address(),
                dtype,
                len: out.len(),
            })
        };
        if reuse.io.is_some() {
            let past = context.device_input(2)?;
            reuse.check_rows(x.dims(), past.dims(), UNFIT_PAST)?;
            let to = output(past.dims())?;
            let from = DeviceSlice {
                address: past.address(),
                dtype: dtype_of(past.element())?,
                len: past.len(),
            };
            // SAFETY: input and output of this node, which ONNX Runtime orders on this stream.
            return unsafe { device_context.copy(from, to) };
        }
        in_run(&context.input(1)?, reuse.layer, |run, directive| {
            let kept = reuse.kept(run, directive)?;
            let dims = rows_of_both(kept.dims(), kept.rows());
            reuse.check_rows(x.dims(), &dims, CHANGED_BATCH)?;
            let to = output(&dims)?;
            // SAFETY: an output of this node, with as many elements as the shape of all rows has.
            unsafe { device_context.read_cached(&kept, to) }?
                .ok_or_else(|| reuse.of_another_type())?;
            run.finish(reuse.layer, reuse.sink.index, reuse.sink.count, None);
            Ok(())
        })
    }
}
