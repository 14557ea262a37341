//! Explicit state: the graph itself carries what layers remember and what each of them does now.
//!
//! A node whose attribute `state` is `io` belongs to no run and no request. Its ticket input holds one directive per layer, its R
//! comes in as an input and goes out as an output, and so do kept outputs, which the graph hands over without an operator. Nothing
//! here remembers anything.

use ditfastattn_contract::attributes::state;
use ditfastattn_contract::directive;
use ditfastattn_plans::{Action, Cfg, Plan};

use crate::abi::allocator;
use crate::abi::error::Error;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::tensor::Tensor;
use crate::state::{Directive, Rows, Work};

use super::contract::check_contract;

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
        match info.string(state::STATE).as_deref() {
            None => return Ok(None),
            Some(state::STATE_IO) => {}
            Some(other) => {
                return Err(Error::graph(format!(
                    "the attribute `state` is `{other}`, expected `io` or none"
                )));
            }
        }
        check_contract(info)?;
        // A decimal string, because a float attribute has only 32 bits and could round to another half-width.
        let window = match info.string(state::WINDOW) {
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
        let cfg = match info.string(state::CFG).as_deref() {
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
    let meaning = directive::Directive::decode(code);
    let action = meaning.and_then(|d| Action::ALL.get(usize::from(d.action)));
    let (Some(meaning), Some(action)) = (meaning, action) else {
        return Err(Error::invalid(format!(
            "the directive of layer {layer} is {code}, expected 0 to 4, plus 8 if R and plus 16 if the output is read later"
        )));
    };
    let (work, rows) = match action {
        Action::Full => (Work::Full, Rows::All),
        Action::Asc => (Work::Full, Rows::Half),
        Action::WaRs => (Work::Window, Rows::All),
        Action::WaRsAsc => (Work::Window, Rows::Half),
        Action::Ast => (Work::Reuse, Rows::All),
    };
    Ok(Directive::explicit(work, rows, meaning.residual_live))
}
