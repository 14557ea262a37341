//! `DiTFastAttnShare`: the output of a layer's region for all rows, kept if a later run reads it. And what keeping and
//! serving outputs means, for the core form too.

use std::sync::Arc;

use crate::abi::error::Error;
use crate::abi::kernel_context::KernelContext;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::op::Kernel;
use crate::abi::tensor::Tensor;
use crate::state::{Directive, Rows, Run};

use super::cache_entry::{CachedTensor, allocate};
use super::io::{self, Io};
use super::op_common::{
    ByType, Sink, by_type, copy, copy_finite, in_run, layer_of, refuse_if_served,
};
use super::tensor_data::{Real, values};

/// y' `[B', …]`, ticket → y `[B, …]`: both halves the computed one under ASC, else a copy. Finishes the layer.
#[derive(Debug)]
pub(crate) struct Share {
    pub(super) layer: usize,
    pub(super) sink: Sink,
    pub(super) io: Option<Io>,
}

impl Kernel for Share {
    fn create(info: &KernelInfo<'_>) -> Result<Self, Error> {
        Ok(Share {
            layer: layer_of(info)?,
            sink: Sink::of(info)?,
            io: Io::of(info)?,
        })
    }

    fn compute(&self, context: &KernelContext<'_>) -> Result<(), Error> {
        let y = context.input(0)?;
        by_type(
            y.element(),
            Call {
                share: self,
                context,
            },
        )
    }
}

struct Call<'a> {
    share: &'a Share,
    context: &'a KernelContext<'a>,
}

impl ByType for Call<'_> {
    fn call<T: Real>(self) -> Result<(), Error> {
        let (context, Share { layer, sink, io }) = (self.context, self.share);
        let (y, ticket) = (context.input(0)?, context.input(1)?);
        if io.is_some() {
            return self.all_rows::<T>(&y, io::directive(&ticket, *layer)?);
        }
        in_run(&ticket, *layer, |run, directive| {
            self.all_rows::<T>(&y, directive)?;
            let kept = store_output(context, run, directive, values::<T>(&y, "y'")?, y.dims());
            run.finish(*layer, sink.index, sink.count, kept);
            Ok(())
        })
    }
}

impl Call<'_> {
    fn all_rows<T: Real>(&self, y: &Tensor<'_>, directive: Directive) -> Result<(), Error> {
        refuse_if_served(self.share.layer, directive)?;
        let from = values::<T>(y, "y'")?;
        let dims = rows_of_both(y.dims(), directive.rows);
        let mut out = self.context.output(0, &dims)?;
        let to = out.as_mut_slice::<T>().unwrap_or_default();
        match directive.rows {
            Rows::All => copy(self.context, from, to),
            Rows::Half => double(self.context, from, to),
        }
        Ok(())
    }
}

/// A copy of what a layer computed, if the directive asks for one and it can be had.
///
/// `computed` are the rows that the directive names, shaped `dims`.
pub(super) fn store_output<T: Real>(
    context: &KernelContext<'_>,
    run: &Arc<Run<CachedTensor>>,
    directive: Directive,
    computed: &[T],
    dims: &[usize],
) -> Option<CachedTensor> {
    if !directive.keep {
        return None;
    }
    let mut entry = allocate::<T>(run, computed.len())?;
    if !copy_finite(context, computed, &mut entry.values) {
        run.refuse_non_finite();
        return None;
    }
    Some(entry.store(dims, directive.rows))
}

/// Writes a kept output for all rows. `to` has the shape [`rows_of_both`] of the kept one.
pub(super) fn read_cached<T: Real>(
    context: &KernelContext<'_>,
    kept: &CachedTensor,
    to: &mut [T],
) -> Option<()> {
    let from = kept.values::<T>()?;
    match kept.rows() {
        Rows::All => copy(context, from, to),
        Rows::Half => double(context, from, to),
    }
    Some(())
}

/// The shape of all rows, given the shape of `rows`.
pub(super) fn rows_of_both(dims: &[usize], rows: Rows) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let (Rows::Half, Some(first)) = (rows, dims.first_mut()) {
        *first *= 2;
    }
    dims
}

/// Both halves of `to` become `half`.
fn double<T: Copy + Send + Sync>(context: &KernelContext<'_>, half: &[T], to: &mut [T]) {
    let (first, second) = to.split_at_mut(half.len());
    copy(context, half, first);
    copy(context, half, second);
}
