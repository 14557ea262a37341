//! `DiTFastAttnSelect` on CUDA: a copy on the stream.

use crate::abi::error::Error;
use crate::abi::kernel_context::KernelContext;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::op::Kernel;
use crate::state::{Directive, Rows};

use super::super::select::{Select, halve};
use super::device_context::{DeviceContext, DeviceSlice};
use super::{OnCuda, dtype_of};

impl Kernel for OnCuda<Select> {
    fn create(info: &KernelInfo<'_>) -> Result<Self, Error> {
        Select::create(info).map(OnCuda)
    }

    fn compute(&self, context: &KernelContext<'_>) -> Result<(), Error> {
        let device_context = DeviceContext::of(context)?;
        self.0
            .directed(&context.input(1)?, |directive, conditional_first| {
                select(&device_context, context, directive, conditional_first)
            })
    }
}

fn select(
    device_context: &DeviceContext,
    context: &KernelContext<'_>,
    directive: Directive,
    conditional_first: bool,
) -> Result<(), Error> {
    let x = context.device_input(0)?;
    let from = DeviceSlice {
        address: x.address(),
        dtype: dtype_of(x.element())?,
        len: x.len(),
    };
    let mut dims = x.dims().to_vec();
    let from = match directive.rows {
        Rows::All => from,
        Rows::Half => {
            halve(&mut dims)?;
            from.halves(conditional_first)[0]
        }
    };
    let out = context.device_output(0, &dims)?;
    let to = DeviceSlice {
        address: out.address(),
        ..from
    };
    // SAFETY: input and output of this node, which ONNX Runtime orders on this stream.
    unsafe { device_context.copy(from, to) }
}
