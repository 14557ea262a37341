//! `DiTFastAttnSelect` on CUDA: a copy on the stream.

use crate::abi::context::Context;
use crate::abi::info::Info;
use crate::abi::op::Kernel;
use crate::abi::status::Error;
use crate::state::{Directive, Rows};

use super::super::select::{Select, halve};
use super::place::{Place, Region};
use super::{OnCuda, dtype_of};

impl Kernel for OnCuda<Select> {
    fn create(info: &Info<'_>) -> Result<Self, Error> {
        Select::create(info).map(OnCuda)
    }

    fn compute(&self, context: &Context<'_>) -> Result<(), Error> {
        let place = Place::of(context)?;
        self.0
            .directed(&context.input(1)?, |directive, conditional_first| {
                select(&place, context, directive, conditional_first)
            })
    }
}

fn select(
    place: &Place,
    context: &Context<'_>,
    directive: Directive,
    conditional_first: bool,
) -> Result<(), Error> {
    let x = context.device_input(0)?;
    let from = Region {
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
    let to = Region {
        address: out.address(),
        ..from
    };
    // SAFETY: input and output of this node, which ONNX Runtime orders on this stream.
    unsafe { place.copy(from, to) }
}
