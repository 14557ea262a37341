//! The five operators of the domain `ai.ditfastattn`, for the CPU and the CUDA provider.
//!
//! | operator | inputs → outputs | does |
//! |---|---|---|
//! | `DiTFastAttnStep` | timestep, request id, start, end, latents, conditioning… → ticket, skip per layer | decides |
//! | `DiTFastAttnSelect` | x, ticket → x' | the rows a layer computes |
//! | `DiTFastAttn` | q, k, v, ticket, mask?, text?, past? → o, present? | attention: full, full with capture, window with residual |
//! | `DiTFastAttnShare` | y', ticket → y | all rows again; keeps the output |
//! | `DiTFastAttnReuse` | x, ticket, past? → y | the kept output |
//!
//! Owns their registration and what they share. Nothing here decides what a layer does: that is `state`.

mod aligned;
mod attention;
mod band;
mod buffer_pool;
mod cache_entry;
mod contract;
mod cuda;
mod environment;
mod host_attention;
mod io;
mod layout;
mod mask;
mod op_common;
mod process;
mod reuse;
mod select;
mod share;
mod stats;
mod step;
mod task;
mod tensor_data;

use std::ffi::CStr;

use ditfastattn_contract::operators;

use crate::abi::host::Host;
use crate::abi::op::{Op, OperatorInput, OperatorOutput, Spec, Type};

pub use stats::{reset, stats_json};

/// The operators' domain. Its opset is 1.
pub const DOMAIN: &CStr = operators::DOMAIN.as_cstr();

static STEP: Spec = Spec {
    name: operators::STEP.as_cstr(),
    inputs: &[
        OperatorInput::required(Type::Any),
        OperatorInput::required(Type::I64),
        OperatorInput::required(Type::Bool),
        OperatorInput::required(Type::Bool),
        OperatorInput::variadic(Type::Any),
    ],
    outputs: &[
        OperatorOutput::required(Type::I64),
        OperatorOutput::variadic(Type::Bool),
    ],
    // On CUDA its outputs would be in device memory, and every layer's `If` would wait for its own copy back.
    provider: None,
};

/// Where kernels run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Provider {
    Cpu,
    Cuda,
}

impl Provider {
    const fn name(self) -> Option<&'static CStr> {
        match self {
            Provider::Cpu => None,
            Provider::Cuda => Some(c"CUDAExecutionProvider"),
        }
    }
}

/// One [`Spec`] per element type: hosts pick the kernel by type. And per provider.
macro_rules! typed {
    ($($name:ident = $op:path: ($($input:expr),*) -> ($($output:expr),*);)*) => {
        $(static $name: [[Spec; 3]; 2] = [typed!(@ Provider::Cpu, $op, [$($input),*], [$($output),*]),
                                          typed!(@ Provider::Cuda, $op, [$($input),*], [$($output),*])];)*
    };
    (@ $provider:expr, $op:expr, $inputs:tt, $outputs:tt) => {
        [typed!(@ $provider, Type::F32, $op, $inputs, $outputs),
         typed!(@ $provider, Type::F16, $op, $inputs, $outputs),
         typed!(@ $provider, Type::BF16, $op, $inputs, $outputs)]
    };
    (@ $provider:expr, $ty:expr, $op:expr, [$($input:expr),*], [$($output:expr),*]) => {
        Spec {
            name: $op.as_cstr(),
            inputs: &[$($input.input($ty)),*],
            outputs: &[$($output.output($ty)),*],
            provider: $provider.name(),
        }
    };
}

/// An input of an operator that is registered per element type.
enum In {
    Typed,
    Ticket,
    OptionalTyped,
    OptionalAny,
    OptionalI64,
}

impl In {
    /// What decides is read on the host; what is computed with stays where the provider has it.
    const fn input(self, ty: Type) -> OperatorInput {
        match self {
            In::Typed => OperatorInput::required(ty),
            In::Ticket => OperatorInput::required(Type::I64).on_host(),
            In::OptionalTyped => OperatorInput::optional(ty),
            In::OptionalAny => OperatorInput::optional(Type::Any),
            In::OptionalI64 => OperatorInput::optional(Type::I64).on_host(),
        }
    }
}

/// An output of such an operator.
enum Out {
    Typed,
    OptionalTyped,
}

impl Out {
    const fn output(self, ty: Type) -> OperatorOutput {
        match self {
            Out::Typed => OperatorOutput::required(ty),
            Out::OptionalTyped => OperatorOutput::optional(ty),
        }
    }
}

typed! {
    SELECT = operators::SELECT: (In::Typed, In::Ticket) -> (Out::Typed);
    ATTENTION = operators::ATTENTION: (In::Typed, In::Typed, In::Typed, In::Ticket, In::OptionalAny, In::OptionalI64, In::OptionalTyped)
        -> (Out::Typed, Out::OptionalTyped);
    SHARE = operators::SHARE: (In::Typed, In::Ticket) -> (Out::Typed);
    REUSE = operators::REUSE: (In::Typed, In::Ticket, In::OptionalTyped) -> (Out::Typed);
}

/// The operators as registered with one host.
pub(crate) fn all(host: Host) -> Vec<&'static Op> {
    let mut ops = vec![Op::leak::<step::Step>(host, &STEP)];
    let on_cpu = !cuda::is_emulated();
    for i in 0..3 {
        if on_cpu {
            ops.push(Op::leak::<select::Select>(host, &SELECT[0][i]));
            ops.push(Op::leak::<attention::DiTFastAttn>(host, &ATTENTION[0][i]));
            ops.push(Op::leak::<share::Share>(host, &SHARE[0][i]));
            ops.push(Op::leak::<reuse::Reuse>(host, &REUSE[0][i]));
        }
        let provider = usize::from(on_cpu);
        ops.push(Op::leak::<cuda::OnCuda<select::Select>>(
            host,
            &SELECT[provider][i],
        ));
        ops.push(Op::leak::<cuda::OnCuda<attention::DiTFastAttn>>(
            host,
            &ATTENTION[provider][i],
        ));
        ops.push(Op::leak::<cuda::OnCuda<share::Share>>(
            host,
            &SHARE[provider][i],
        ));
        ops.push(Op::leak::<cuda::OnCuda<reuse::Reuse>>(
            host,
            &REUSE[provider][i],
        ));
    }
    ops
}
