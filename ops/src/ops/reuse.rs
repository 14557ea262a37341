//! `DiTFastAttnReuse`: the kept output of a layer, in place of computing it.

use ditfastattn_contract::attributes::layer as names;

use crate::abi::error::{Code, Error};
use crate::abi::kernel_context::KernelContext;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::op::Kernel;
use crate::state::{Directive, Run, Work};

use super::cache_entry::CachedTensor;
use super::io::Io;
use super::op_common::{ByType, Sink, by_type, copy, in_run, layer_of};
use super::share::{read_cached, rows_of_both};
use super::tensor_data::{Real, values};

/// x (the region's input: gives the element type and the batch), ticket, past? → y. Finishes the layer. The past output is an
/// input where the graph carries the state.
#[derive(Debug)]
pub(crate) struct Reuse {
    pub(super) layer: usize,
    pub(super) sink: Sink,
    /// Leading rows of y for each leading row of x: more than one where y has heads or tokens folded into the batch. 0: not
    /// comparable.
    pub(super) fold: usize,
    pub(super) io: Option<Io>,
}

impl Kernel for Reuse {
    fn create(info: &KernelInfo<'_>) -> Result<Self, Error> {
        Ok(Reuse {
            layer: layer_of(info)?,
            sink: Sink::of(info)?,
            fold: usize::try_from(info.int(names::FOLD).unwrap_or(1)).unwrap_or(0),
            io: Io::of(info)?,
        })
    }

    fn compute(&self, context: &KernelContext<'_>) -> Result<(), Error> {
        let x = context.input(0)?;
        by_type(
            x.element(),
            Call {
                reuse: self,
                context,
            },
        )
    }
}

struct Call<'a> {
    reuse: &'a Reuse,
    context: &'a KernelContext<'a>,
}

impl ByType for Call<'_> {
    fn call<T: Real>(self) -> Result<(), Error> {
        let (context, Reuse { layer, sink, .. }) = (self.context, self.reuse);
        if self.reuse.io.is_some() {
            return self.past::<T>();
        }
        let ticket = context.input(1)?;
        in_run(&ticket, *layer, |run, directive| {
            let kept = self.reuse.kept(run, directive)?;
            let dims = rows_of_both(kept.dims(), kept.rows());
            let x = context.input(0)?;
            self.reuse.check_rows(x.dims(), &dims, CHANGED_BATCH)?;
            let mut out = context.output(0, &dims)?;
            let to = out.as_mut_slice::<T>().unwrap_or_default();
            read_cached(context, &kept, to).ok_or_else(|| self.reuse.of_another_type())?;
            run.finish(*layer, sink.index, sink.count, None);
            Ok(())
        })
    }
}

impl Call<'_> {
    /// Explicit state: the output is the past one that was fed.
    fn past<T: Real>(&self) -> Result<(), Error> {
        let (x, past) = (self.context.input(0)?, self.context.input(2)?);
        self.reuse.check_rows(x.dims(), past.dims(), UNFIT_PAST)?;
        let from = values::<T>(&past, "the past output")?;
        let mut out = self.context.output(0, past.dims())?;
        copy(
            self.context,
            from,
            out.as_mut_slice::<T>().unwrap_or_default(),
        );
        Ok(())
    }
}

/// What to do if a cached output has another batch.
pub(super) const CHANGED_BATCH: &str =
    "the latents did not show the change of batch, so feed dfa_start when it changes";

/// What to do if the past output that was fed has another batch.
pub(super) const UNFIT_PAST: &str = "feed the present output that an earlier step of this generation returned, \
                                     or another directive than ast";

impl Reuse {
    /// The cached output, in a run that serves the layer.
    pub(super) fn kept(
        &self,
        run: &Run<CachedTensor>,
        directive: Directive,
    ) -> Result<CachedTensor, Error> {
        let layer = self.layer;
        run.output(layer, self.sink.index)
            .filter(|_| directive.work == Work::Reuse)
            .ok_or_else(|| {
                Error::graph(format!(
                    "layer {layer} is computed in this run, yet its cached output is asked for; \
                     the If around it must take its condition from the skip output of the same run"
                ))
            })
    }

    /// Whether an output of shape `dims` has the rows that an input of shape `x` asks for.
    pub(super) fn check_rows(&self, x: &[usize], dims: &[usize], help: &str) -> Result<(), Error> {
        let fold = self.fold;
        let expected = x.first().and_then(|rows| rows.checked_mul(fold));
        if fold != 0 && expected.as_ref() != dims.first() {
            return Err(Error::new(
                Code::RuntimeException,
                format!(
                    "layer {} has a cached output of shape {dims:?} for an input of shape {x:?}; {help}",
                    self.layer
                ),
            ));
        }
        Ok(())
    }

    pub(super) fn of_another_type(&self) -> Error {
        Error::invalid(format!(
            "layer {} has a cached output of another type, or on another device",
            self.layer
        ))
    }
}
