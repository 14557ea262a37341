//! The five operators of the domain `ai.ditfastattn`, for the CPU provider.
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

mod attention;
mod band;
mod environment;
mod io;
mod layer;
mod layout;
mod mask;
mod reuse;
mod select;
mod share;
mod step;
mod storage;

use std::ffi::CStr;
use std::sync::{Arc, LazyLock};

use crate::abi::host::Host;
use crate::abi::op::{Op, Port, Spec, Type};
use crate::state::Process;

pub use environment::{reset, stats_json};

/// The operators' domain. Its opset is 1.
pub const DOMAIN: &CStr = c"ai.ditfastattn";

/// The version of the contract between rewriter and library, the `contract` attribute of `DiTFastAttnStep`. ONNX
/// Runtime ignores versions of custom operators, so the graph carries it.
const CONTRACT: i64 = 1;

/// What all sessions of this process share.
static PROCESS: LazyLock<Arc<Process<storage::CachedTensor>>> =
    LazyLock::new(|| Process::new(environment::limits(), environment::clock()));

static STEP: Spec = Spec {
    name: c"DiTFastAttnStep",
    inputs: &[
        Port::one(Type::Any),
        Port::one(Type::I64),
        Port::one(Type::Bool),
        Port::one(Type::Bool),
        Port::variadic(Type::Any),
    ],
    outputs: &[Port::one(Type::I64), Port::variadic(Type::Bool)],
};

/// One [`Spec`] per element type: hosts pick the kernel by type.
macro_rules! typed {
    ($($name:ident = $op:literal ($($input:expr),*) -> ($($output:expr),*);)*) => {
        $(static $name: [Spec; 3] = [typed!(@ Type::F32, $op, [$($input),*], [$($output),*]),
                                     typed!(@ Type::F16, $op, [$($input),*], [$($output),*]),
                                     typed!(@ Type::BF16, $op, [$($input),*], [$($output),*])];)*
    };
    (@ $ty:expr, $op:literal, [$($input:expr),*], [$($output:expr),*]) => {
        Spec { name: $op, inputs: &[$($input.port($ty)),*], outputs: &[$($output.port($ty)),*] }
    };
}

/// A port of a typed operator.
enum In {
    Typed,
    Ticket,
    OptionalTyped,
    OptionalAny,
    OptionalI64,
}

impl In {
    const fn port(self, ty: Type) -> Port {
        match self {
            In::Typed => Port::one(ty),
            In::Ticket => Port::one(Type::I64),
            In::OptionalTyped => Port::optional(ty),
            In::OptionalAny => Port::optional(Type::Any),
            In::OptionalI64 => Port::optional(Type::I64),
        }
    }
}

typed! {
    SELECT = c"DiTFastAttnSelect" (In::Typed, In::Ticket) -> (In::Typed);
    ATTENTION = c"DiTFastAttn" (In::Typed, In::Typed, In::Typed, In::Ticket, In::OptionalAny, In::OptionalI64, In::OptionalTyped)
        -> (In::Typed, In::OptionalTyped);
    SHARE = c"DiTFastAttnShare" (In::Typed, In::Ticket) -> (In::Typed);
    REUSE = c"DiTFastAttnReuse" (In::Typed, In::Ticket, In::OptionalTyped) -> (In::Typed);
}

/// The operators as registered with one host.
pub(crate) fn all(host: Host) -> Vec<&'static Op> {
    let mut ops = vec![Op::leak::<step::Step>(host, &STEP)];
    ops.extend(SELECT.iter().map(|s| Op::leak::<select::Select>(host, s)));
    ops.extend(
        ATTENTION
            .iter()
            .map(|s| Op::leak::<attention::DiTFastAttn>(host, s)),
    );
    ops.extend(SHARE.iter().map(|s| Op::leak::<share::Share>(host, s)));
    ops.extend(REUSE.iter().map(|s| Op::leak::<reuse::Reuse>(host, s)));
    ops
}
