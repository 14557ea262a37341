//! Explicit state: the graph itself carries what layers remember and what each of them does now.
//!
//! A node whose attribute `state` is `io` belongs to no run and no request. Its ticket input holds one directive per layer, its R
//! comes in as an input and goes out as an output, and so do kept outputs, which the graph hands over without an operator. Owns
//! the meaning of a directive's number; nothing here remembers anything.

use ditfastattn_plans::{Cfg, Plan};

use crate::abi::allocator;
use crate::abi::error::Error;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::tensor::Tensor;
use crate::state::{Directive, Rows, Work};

use super::contract::check_contract;

/// Added to a directive: R is still read after this step, so attention over all keys leaves it and window attention hands it on.
const RESIDUAL_LIVE: i64 = 8;
/// Added to a directive: the output is still read after this step. The graph looks at it, the operators do not.
const OUTPUT_LIVE: i64 = 16;

/// What a node with explicit state has to know of the plan, from its attributes `window` and `cfg`.
#[derive(Debug)]
pub(super) struct Io {
    plan: Plan,
}

impl Io {
    /// `None` for a node without the attribute `state`: its state is a run's.
    ///
    /// # Errors
    /// Another `state` than `io`; another contract; a `window` or `cfg` that no plan has.
    pub fn of(info: &KernelInfo<'_>) -> Result<Option<Io>, Error> {
        match info.string("state").as_deref() {
            None => return Ok(None),
            Some("io") => {}
            Some(other) => {
                return Err(Error::graph(format!(
                    "the attribute `state` is `{other}`, expected `io` or none"
                )));
            }
        }
        check_contract(info)?;
        // A decimal string, because a float attribute has only 32 bits and could round to another half-width.
        let window = match info.string("window") {
            None => ditfastattn_plans::DEFAULT_WINDOW,
            Some(text) => text
                .parse()
                .ok()
                .filter(|window| *window > 0.0 && *window <= 1.0)
                .ok_or_else(|| {
                    Error::graph(format!(
                        "the attribute `window` is `{text}`, expected a number above 0, at most 1"
                    ))
                })?,
        };
        let cfg = match info.string("cfg").as_deref() {
            None => Cfg::None,
            Some(name) => Cfg::ALL
                .into_iter()
                .find(|cfg| cfg.name() == name)
                .ok_or_else(|| {
                    Error::graph(format!(
                        "the attribute `cfg` is `{name}`, expected cond-first, uncond-first, separate or none"
                    ))
                })?,
        };
        let plan = Plan {
            window,
            cfg,
            ..Plan::all_full(1, 1)
        };
        Ok(Some(Io { plan }))
    }

    /// A plan with this node's window and guidance; its steps mean nothing.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Whether the conditional half of a batch is the first one.
    pub fn conditional_first(&self) -> bool {
        self.plan.cfg != Cfg::UncondFirst
    }
}

/// What the directives say about `layer`: 0 `full`, 1 `asc`, 2 `wa-rs`, 3 `wa-rs+asc`, 4 `ast`, plus 8 where R is still read
/// afterwards, plus 16 where the output is.
///
/// # Errors
/// If they are no int64 vector that has the layer, or the number means nothing; and while memory is short.
pub(super) fn directive(directives: &Tensor<'_>, layer: usize) -> Result<Directive, Error> {
    allocator::check()?;
    let all = directives.as_slice::<i64>().unwrap_or_default();
    let code = *all.get(layer).ok_or_else(|| {
        Error::invalid(format!(
            "the directives are {} {:?}, expected int64 with one number per layer (this one is layer {layer})",
            directives.element(),
            directives.dims()
        ))
    })?;
    let (work, rows) = match code & !(RESIDUAL_LIVE | OUTPUT_LIVE) {
        0 => (Work::Full, Rows::All),
        1 => (Work::Full, Rows::Half),
        2 => (Work::Window, Rows::All),
        3 => (Work::Window, Rows::Half),
        4 => (Work::Reuse, Rows::All),
        _ => {
            return Err(Error::invalid(format!(
                "the directive of layer {layer} is {code}, expected 0 to 4, plus 8 if R and plus 16 if the output is read later"
            )));
        }
    };
    Ok(Directive::explicit(work, rows, code & RESIDUAL_LIVE != 0))
}
