//! What the operators inside a layer share: their layer number, their ticket, and care for runs that fail.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ditfastattn_contract::attributes::layer as names;
use ditfastattn_kernels::Parallel;
use half::{bf16, f16};

use crate::abi::allocator;
use crate::abi::error::{Code, Error};
use crate::abi::kernel_context::KernelContext;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::status::caught;
use crate::abi::tensor::{ElementType, Tensor};
use crate::state::{Directive, Run, StateError, Work};

use super::cache_entry::CachedTensor;
use super::process::PROCESS;
use super::tensor_data::Real;

impl From<StateError> for Error {
    fn from(error: StateError) -> Self {
        let code = match error {
            StateError::UnknownTicket(..) => Code::RuntimeException,
            StateError::NoSuchLayer { .. } => Code::InvalidGraph,
            StateError::NoMemory { .. } => Code::RuntimeException,
        };
        Error::new(code, error.to_string())
    }
}

/// The `layer` attribute of a node.
pub(super) fn layer_of(info: &KernelInfo<'_>) -> Result<usize, Error> {
    let layer = info
        .int(names::LAYER)
        .ok_or_else(|| Error::graph("the attribute `layer` (int) is missing"))?;
    usize::try_from(layer).map_err(|_| {
        Error::graph(format!(
            "the attribute `layer` is {layer}, expected 0 or more"
        ))
    })
}

/// Which of the outputs of a layer's region a node stands for. Joint attention has two streams and so two sinks; the
/// layer is finished when all of them are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sink {
    pub index: usize,
    pub count: usize,
}

impl Sink {
    /// From the optional attributes `sink` (default 0) and `sinks` (default 1).
    pub fn of(info: &KernelInfo<'_>) -> Result<Sink, Error> {
        let (index, count) = (
            info.int(names::SINK).unwrap_or(0),
            info.int(names::SINKS).unwrap_or(1),
        );
        match (usize::try_from(index), usize::try_from(count)) {
            (Ok(index), Ok(count)) if index < count && count <= 16 => Ok(Sink { index, count }),
            _ => Err(Error::graph(format!(
                "the attributes are sink = {index}, sinks = {count}; expected 0 ≤ sink < sinks ≤ 16"
            ))),
        }
    }
}

/// Looks up the run of a ticket and what `layer` does in it, and runs `body`; if that fails, so does the run: its caches
/// are dropped and nothing of it is used again.
pub(super) fn in_run(
    ticket: &Tensor<'_>,
    layer: usize,
    body: impl FnOnce(&Arc<Run<CachedTensor>>, Directive) -> Result<(), Error>,
) -> Result<(), Error> {
    let words = ticket.as_slice::<i64>().unwrap_or_default();
    let &[id, check] = words else {
        return Err(Error::graph(format!(
            "the ticket is {} {:?}, expected int64 [2]",
            ticket.element(),
            ticket.dims()
        )));
    };
    let run = PROCESS.run([id, check])?;
    let result = caught(|| {
        allocator::check()?;
        body(&run, run.directive(layer)?)
    });
    if result.is_err() {
        run.fail();
    }
    result
}

/// A layer that is served from the cache is not to be computed.
pub(super) fn refuse_if_served(layer: usize, directive: Directive) -> Result<(), Error> {
    if directive.work == Work::Reuse {
        return Err(Error::graph(format!(
            "layer {layer} is served from the cache in this run, yet it was computed; \
             the If around it must take its condition from the skip output of the same run"
        )));
    }
    Ok(())
}

/// Calls the generic operator for the element type of its input.
pub(super) trait ByType {
    fn call<T: Real>(self) -> Result<(), Error>;
}

pub(super) fn by_type(element: ElementType, body: impl ByType) -> Result<(), Error> {
    match element {
        ElementType::F32 => body.call::<f32>(),
        ElementType::F16 => body.call::<f16>(),
        ElementType::BF16 => body.call::<bf16>(),
        other => Err(Error::invalid(format!(
            "the tensor is of type {other}, expected float, float16 or bfloat16"
        ))),
    }
}

/// Copies that are smaller than this are not worth a task.
const COPY_CHUNK: usize = 1 << 18;

/// `to` becomes a copy of `from`, on the session's threads.
///
/// # Panics
/// If the lengths differ.
pub(super) fn copy<T: Copy + Send + Sync>(context: &KernelContext<'_>, from: &[T], to: &mut [T]) {
    copy_parts(context, from, to, |_| {});
}

/// [`copy`], and whether all numbers are finite.
pub(super) fn copy_finite<T: Real>(context: &KernelContext<'_>, from: &[T], to: &mut [T]) -> bool {
    let finite = AtomicBool::new(true);
    copy_parts(context, from, to, |part| {
        if !is_finite(part) {
            finite.store(false, Ordering::Relaxed);
        }
    });
    finite.into_inner()
}

/// Copies in parts, and shows each part to `look` while it is in the cache.
fn copy_parts<T: Copy + Send + Sync>(
    context: &KernelContext<'_>,
    from: &[T],
    to: &mut [T],
    look: impl Fn(&[T]) + Sync,
) {
    assert_eq!(from.len(), to.len());
    let chunk = (COPY_CHUNK / size_of::<T>()).max(1);
    if from.len() <= chunk {
        to.copy_from_slice(from);
        look(from);
        return;
    }
    let mut parts = Vec::new();
    // A list as long as the tensor takes; without memory for it this thread copies alone.
    if parts.try_reserve_exact(from.len().div_ceil(chunk)).is_err() {
        to.copy_from_slice(from);
        look(from);
        return;
    }
    let pairs = from.chunks(chunk).zip(to.chunks_mut(chunk));
    parts.extend(pairs.map(Mutex::new));
    context.run(parts.len(), &|i| {
        // Each task locks its own part: the lock only proves to the compiler that parts are disjoint.
        let mut part = parts[i].lock().unwrap_or_else(PoisonError::into_inner);
        let (from, to) = &mut *part;
        to.copy_from_slice(from);
        look(from);
    });
}

/// Whether all numbers are finite, on the session's threads.
pub(super) fn all_finite<T: Real>(context: &KernelContext<'_>, values: &[T]) -> bool {
    let finite = AtomicBool::new(true);
    let chunk = COPY_CHUNK / size_of::<T>();
    let chunks = values.len().div_ceil(chunk);
    context.run(chunks, &|i| {
        if !is_finite(&values[i * chunk..values.len().min((i + 1) * chunk)]) {
            finite.store(false, Ordering::Relaxed);
        }
    });
    finite.into_inner()
}

/// No early exit: the plain fold vectorises.
fn is_finite<T: Real>(values: &[T]) -> bool {
    (values.iter()).fold(true, |all, x| all & Real::is_finite(*x))
}
