//! `DiTFastAttnSelect`: the rows of its input that the layer computes in this run.

use crate::abi::error::Error;
use crate::abi::kernel_context::KernelContext;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::op::Kernel;
use crate::abi::tensor::Tensor;
use crate::state::{Directive, Rows, Work};

use super::io::{self, Io};
use super::op_common::{ByType, by_type, copy, in_run, layer_of};
use super::tensor_data::{Real, values};

/// x `[B, …]`, ticket → x' `[B, …]`, or `[B/2, …]` (the conditional half) under ASC.
#[derive(Debug)]
pub(crate) struct Select {
    pub(super) layer: usize,
    pub(super) io: Option<Io>,
}

impl Kernel for Select {
    fn create(info: &KernelInfo<'_>) -> Result<Self, Error> {
        Ok(Select {
            layer: layer_of(info)?,
            io: Io::of(info)?,
        })
    }

    fn compute(&self, context: &KernelContext<'_>) -> Result<(), Error> {
        let x = context.input(0)?;
        by_type(
            x.element(),
            Call {
                select: self,
                context,
            },
        )
    }
}

struct Call<'a> {
    select: &'a Select,
    context: &'a KernelContext<'a>,
}

impl ByType for Call<'_> {
    fn call<T: Real>(self) -> Result<(), Error> {
        let ticket = self.context.input(1)?;
        self.select
            .directed(&ticket, |directive, conditional_first| {
                self.rows::<T>(directive, conditional_first)
            })
    }
}

impl Select {
    /// Calls `body` with what the layer does now, and whether the conditional half is the first one.
    pub(super) fn directed(
        &self,
        ticket: &Tensor<'_>,
        body: impl FnOnce(Directive, bool) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let layer = self.layer;
        if let Some(io) = &self.io {
            return body(io::directive(ticket, layer)?, io.conditional_first());
        }
        in_run(ticket, layer, |run, directive| {
            if directive.work == Work::Reuse && !run.compiled_plan().is_core(layer) {
                return Err(Error::graph(format!(
                    "layer {layer} is served from the cache in this run, yet its inputs are selected; \
                     the If around it must take its condition from the skip output of the same run"
                )));
            }
            body(directive, run.compiled_plan().conditional_first())
        })
    }
}

impl Call<'_> {
    fn rows<T: Real>(&self, directive: Directive, conditional_first: bool) -> Result<(), Error> {
        let context = self.context;
        let x = context.input(0)?;
        let from = values::<T>(&x, "x")?;
        let mut dims = x.dims().to_vec();
        let from = match directive.rows {
            Rows::All => from,
            Rows::Half => {
                halve(&mut dims)?;
                half_of(from, conditional_first)
            }
        };
        let mut out = context.output(0, &dims)?;
        let to = out.as_mut_slice::<T>().unwrap_or_default();
        copy(context, from, to);
        Ok(())
    }
}

/// Halves dimension 0.
pub(super) fn halve(dims: &mut [usize]) -> Result<(), Error> {
    match dims.first_mut() {
        Some(rows) if rows.is_multiple_of(2) => {
            *rows /= 2;
            Ok(())
        }
        rows => Err(Error::invalid(format!(
            "a batch of {:?} rows cannot be halved, though the latents' batch is even; \
             expected the rows of both halves of guidance, one after the other",
            rows.map_or(0, |rows| *rows)
        ))),
    }
}

/// The conditional half of a tensor whose rows are halves of guidance.
pub(super) fn half_of<T>(values: &[T], conditional_first: bool) -> &[T] {
    let (first, second) = values.split_at(values.len() / 2);
    if conditional_first { first } else { second }
}
