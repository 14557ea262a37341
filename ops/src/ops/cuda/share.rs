//! `DiTFastAttnShare` on CUDA: one pass writes both halves and the cache, and looks for numbers that are not finite.

use std::sync::Arc;

use crate::abi::error::Error;
use crate::abi::kernel_context::KernelContext;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::op::Kernel;
use crate::state::{Directive, Rows, Run};

use super::super::cache_entry::CachedTensor;
use super::super::io;
use super::super::op_common::{in_run, refuse_if_served};
use super::super::share::{Share, rows_of_both};
use super::device_context::{DeviceContext, DeviceSlice};
use super::{OnCuda, dtype_of};

impl Kernel for OnCuda<Share> {
    fn create(info: &KernelInfo<'_>) -> Result<Self, Error> {
        Share::create(info).map(OnCuda)
    }

    fn compute(&self, context: &KernelContext<'_>) -> Result<(), Error> {
        let Share { layer, sink, io } = &self.0;
        let device_context = DeviceContext::of(context)?;
        let ticket = context.input(1)?;
        if io.is_some() {
            let directive = io::directive(&ticket, *layer)?;
            return self
                .all_rows(&device_context, context, None, directive)
                .map(drop);
        }
        in_run(&ticket, *layer, |run, directive| {
            let kept = self.all_rows(&device_context, context, Some(run), directive)?;
            run.finish(*layer, sink.index, sink.count, kept);
            Ok(())
        })
    }
}

impl OnCuda<Share> {
    fn all_rows(
        &self,
        device_context: &DeviceContext,
        context: &KernelContext<'_>,
        run: Option<&Arc<Run<CachedTensor>>>,
        directive: Directive,
    ) -> Result<Option<CachedTensor>, Error> {
        refuse_if_served(self.0.layer, directive)?;
        let y = context.device_input(0)?;
        let from = DeviceSlice {
            address: y.address(),
            dtype: dtype_of(y.element())?,
            len: y.len(),
        };
        let out = context.device_output(0, &rows_of_both(y.dims(), directive.rows))?;
        let to = DeviceSlice {
            address: out.address(),
            len: out.len(),
            ..from
        };
        let targets: &[DeviceSlice] = match directive.rows {
            Rows::All => &[to],
            Rows::Half => &to.halves(true),
        };
        // SAFETY: input and output of this node, which ONNX Runtime orders on this stream.
        unsafe { device_context.spread(run, directive, from, targets, y.dims()) }
    }
}
