//! `DiTFastAttnStep`: one per model. Looks at what the run is fed, and tells every layer what to do.
//!
//! Owns the session's state, and the translation of tensors into a [`Call`].

use std::sync::Arc;

use ditfastattn_contract::attributes::step as names;
use ditfastattn_contract::graph;
use ditfastattn_contract::operators::step::{END, LATENTS, REQUEST, START, TIMESTEP};
use ditfastattn_plans::Plan;
use half::{bf16, f16};

use crate::abi::allocator;
use crate::abi::error::{Code, Error};
use crate::abi::kernel_context::KernelContext;
use crate::abi::kernel_info::{KernelInfo, Logger};
use crate::abi::op::Kernel;
use crate::abi::tensor::{ElementType, Tensor};
use crate::state::{
    Call, CompiledPlan, Feed, FeedShapes, Run, RunSignature, SchedulePolicy, Session, Values,
};

use super::cache_entry::CachedTensor;
use super::contract::check_contract;
use super::process::PROCESS;
use super::stats;

/// Rows of one timestep tensor may differ by this part of their size and still be one timestep.
const SAME_TIMESTEP: f64 = 1e-6;

/// What a plan of one byte takes at most while it is read and once it is.
const PARSED: usize = 32;

/// timestep, request id, start, end, latents, conditioning… → ticket `[2]`, then one bool per layer: true if the layer is
/// served from the cache and its region skipped; then one bool for each of `dense_layers`: true if the host computes its
/// attention with the exporter's nodes.
#[derive(Debug)]
pub(crate) struct Step {
    session: Arc<Session<CachedTensor>>,
    layers: usize,
    /// Layers that keep the exporter's attention beside ours.
    dense: Vec<usize>,
    /// The model has inputs that this operator is not shown, so that nothing vouches for anonymous runs.
    blind: bool,
    logger: Option<Logger>,
}

impl Kernel for Step {
    fn create(info: &KernelInfo<'_>) -> Result<Self, Error> {
        check_contract(info)?;
        let text = info
            .string(names::PLAN)
            .ok_or_else(|| Error::graph("the attribute `plan` (string) is missing"))?;
        room_to_parse(&text)?;
        let plan = Plan::parse(&text)
            .map_err(|error| Error::graph(format!("the attribute `plan`: {error}")))?;
        let layers = plan.layers();
        let declared = info.int(names::LAYERS).unwrap_or(layers as i64);
        if declared != layers as i64 {
            return Err(Error::graph(format!(
                "the attribute `layers` is {declared}, its plan has {layers} layers"
            )));
        }
        let fed = fed(info, &plan)?;
        let blind = info.int(names::BLIND).unwrap_or(0) != 0;
        let core = layers_named(info, names::CORE_LAYERS, layers)?;
        let dense = layers_named(info, names::DENSE_LAYERS, layers)?;
        let (outputs, expected) = (info.output_count()?, 1 + layers + dense.len());
        if outputs != expected {
            return Err(Error::graph(format!(
                "it has {outputs} outputs, expected {expected}: the ticket, one per layer and one for each of `dense_layers`"
            )));
        }
        Ok(Step {
            session: Session::new(
                Arc::clone(&PROCESS),
                CompiledPlan::new(plan, &core)
                    .with_halves_in_graph(info.int(names::HALVES_IN_GRAPH).unwrap_or(0) != 0),
                fed,
            ),
            layers,
            dense,
            blind,
            logger: info.logger(),
        })
    }

    fn compute(&self, context: &KernelContext<'_>) -> Result<(), Error> {
        allocator::check()?;
        let call = self.read_call(context)?;
        let (run, notices) = self.session.begin(call)?;
        for notice in notices {
            context.warn(&notice.to_string());
        }
        let written = self.write(context, &run);
        if written.is_err() {
            run.fail();
        }
        written
    }
}

impl Step {
    fn read_call(&self, context: &KernelContext<'_>) -> Result<Call, Error> {
        let request = context.input(REQUEST)?;
        let request = match request.as_slice::<i64>() {
            Some(&[id]) => id,
            _ => {
                return Err(Error::invalid(format!(
                    "dfa_request_id is {} {:?}, expected one int64",
                    request.element(),
                    request.dims()
                )));
            }
        };
        let start = flag(&context.input(START)?, graph::START)?;
        let end = flag(&context.input(END)?, graph::END)?;
        let fed = (LATENTS..context.input_count()?)
            .filter_map(|index| context.optional_input(index).transpose())
            .collect::<Result<Vec<_>, _>>()?;
        let rows = fed
            .first()
            .and_then(|latents| latents.dims().first().copied())
            .unwrap_or(1);
        let time = context.input(TIMESTEP)?;
        let feeds: Vec<Feed<'_>> = fed.iter().map(feed).collect();
        let signature = match feeds.split_first() {
            Some((latents, conditioning)) if request == 0 && !self.blind => {
                let signature = RunSignature::new(*latents, conditioning, rows)?;
                Some(signature.with_timestep(&feed(&time)))
            }
            // The latents tell the second run of a step from another first one; whose it is, the id says.
            Some((latents, _)) if request != 0 && self.session.needs_signature() => {
                Some(RunSignature::new(*latents, &[], rows)?)
            }
            _ => None,
        };
        Ok(Call {
            timestep: timestep(&time)?,
            request,
            start,
            end,
            rows,
            shapes: FeedShapes(
                fed.iter()
                    .map(|tensor| (tag(tensor.element()), tensor.dims().to_vec()))
                    .collect(),
            ),
            signature,
        })
    }

    fn write(&self, context: &KernelContext<'_>, run: &Run<CachedTensor>) -> Result<(), Error> {
        let mut ticket = context.output(0, &[2])?;
        ticket
            .as_mut_slice::<i64>()
            .ok_or_else(|| Error::graph("the ticket output is not int64"))?
            .copy_from_slice(&run.ticket());
        let skips = (0..self.layers).map(|layer| run.skips(layer));
        let dense = self.dense.iter().map(|&layer| run.leave_to_host(layer));
        for (index, flag) in skips.chain(dense).enumerate() {
            let mut output = context.output(index + 1, &[])?;
            let byte = output.bytes().and_then(<[u8]>::first_mut);
            *byte.ok_or_else(|| Error::graph("a skip output is not bool"))? = u8::from(flag);
        }
        Ok(())
    }
}

/// Which timesteps the plan serves, by the attribute `schedule`.
fn fed(info: &KernelInfo<'_>, plan: &Plan) -> Result<SchedulePolicy, Error> {
    match info.string(names::SCHEDULE).as_deref() {
        None | Some("planned") => Ok(SchedulePolicy::Planned),
        Some(names::SCHEDULE_ANY) => match plan.one_way() {
            Ok(()) => Ok(SchedulePolicy::Any),
            Err(why) => Err(Error::graph(format!(
                "the attribute `schedule` is any, but {why}"
            ))),
        },
        Some(other) => Err(Error::graph(format!(
            "the attribute `schedule` is {other}, expected planned or any"
        ))),
    }
}

/// The layers that an attribute lists.
fn layers_named(
    info: &KernelInfo<'_>,
    attribute: &str,
    layers: usize,
) -> Result<Vec<usize>, Error> {
    let listed = info.ints(attribute).unwrap_or_default();
    let known = |layer: i64| usize::try_from(layer).ok().filter(|&l| l < layers);
    let check = |layer| {
        known(layer).ok_or_else(|| {
            Error::graph(format!(
                "the attribute `{attribute}` names layer {layer} of {layers}"
            ))
        })
    };
    listed.into_iter().map(check).collect()
}

impl Drop for Step {
    fn drop(&mut self) {
        let mut lines: Vec<String> = vec![];
        let numbers = self.session.counters.all();
        let numbers = numbers.iter().filter(|(_, value)| *value > 0);
        lines.push(format!(
            "session ends:{}",
            numbers
                .map(|(name, value)| format!(" {name}={value}"))
                .collect::<String>()
        ));
        lines.extend(stats::write_stats().err());
        if let Some(logger) = &self.logger {
            lines.iter().for_each(|line| logger.info(line));
        }
    }
}

/// Reading a plan takes many lists of which only long ones could be refused, each of them an end of the process. So
/// memory for all of it is asked for once, before.
fn room_to_parse(text: &str) -> Result<(), Error> {
    let bytes = text.len().saturating_mul(PARSED);
    Vec::<u8>::new().try_reserve_exact(bytes).map_err(|_| {
        Error::new(
            Code::Fail,
            format!("no memory for the attribute `plan`: reading it takes {bytes} bytes"),
        )
    })
}

fn flag(tensor: &Tensor<'_>, name: &str) -> Result<bool, Error> {
    match (tensor.element(), tensor.bytes()) {
        (ElementType::Bool, Some(&[byte])) => Ok(byte != 0),
        (element, _) => Err(Error::invalid(format!(
            "{name} is {element} {:?}, expected one bool",
            tensor.dims()
        ))),
    }
}

/// The one value of a timestep tensor; `None` if it has none, or several.
fn timestep(tensor: &Tensor<'_>) -> Result<Option<f64>, Error> {
    let one = match tensor.element() {
        ElementType::F32 => common(tensor.as_slice::<f32>(), |&x| f64::from(x)),
        ElementType::F64 => common(tensor.as_slice::<f64>(), |&x| x),
        ElementType::F16 => common(tensor.as_slice::<f16>(), |&x| x.to_f64()),
        ElementType::BF16 => common(tensor.as_slice::<bf16>(), |&x| x.to_f64()),
        ElementType::I32 => common(tensor.as_slice::<i32>(), |&x| f64::from(x)),
        ElementType::I64 => common(tensor.as_slice::<i64>(), |&x| x as f64),
        other => {
            return Err(Error::invalid(format!(
                "the timestep is of type {other}, \
                 expected float, double, float16, bfloat16, int32 or int64"
            )));
        }
    };
    Ok(one)
}

fn common<T>(values: Option<&[T]>, number: impl Fn(&T) -> f64) -> Option<f64> {
    let values = values?;
    let first = number(values.first()?);
    let near = |x: f64| (x - first).abs() <= SAME_TIMESTEP * first.abs();
    values.iter().all(|x| near(number(x))).then_some(first)
}

fn feed<'a>(tensor: &'a Tensor<'a>) -> Feed<'a> {
    let values = match tensor.element() {
        ElementType::F32 => tensor.as_slice().map(Values::F32),
        ElementType::F64 => tensor.as_slice().map(Values::F64),
        ElementType::F16 => tensor.as_slice().map(Values::F16),
        ElementType::BF16 => tensor.as_slice().map(Values::BF16),
        ElementType::I32 => tensor.as_slice().map(Values::I32),
        ElementType::I64 => tensor.as_slice().map(Values::I64),
        _ => None,
    };
    Feed {
        dims: tensor.dims(),
        element: tag(tensor.element()),
        bytes: tensor.bytes(),
        values: values.unwrap_or(Values::Other),
    }
}

/// A number per element type.
fn tag(element: ElementType) -> u32 {
    use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
    match element {
        ElementType::Other(raw) => raw.unsigned_abs() | 1 << 31,
        known => (BuildHasherDefault::<DefaultHasher>::default().hash_one(known) as u32) >> 1,
    }
}
