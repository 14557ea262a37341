//! Which tokens of a layer are text, and the band that follows from it and the plan.

use ditfastattn_contract::attributes::attention as names;
use ditfastattn_kernels::Band;
use ditfastattn_plans::{Plan, Side};

use crate::abi::error::Error;
use crate::abi::kernel_info::KernelInfo;
use crate::abi::tensor::Tensor;

/// What a node says about text tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct TextTokens {
    /// The attribute `text`: how many there are, if the graph shows it.
    tokens: Option<i64>,
    /// The attribute `text_side`: where those of the graph are.
    side: Side,
    /// The attribute `joint`: whether the plan's text tokens are in this layer's sequence.
    joint: bool,
}

impl TextTokens {
    /// From the optional attributes `text`, `text_side` (`end`, the default, or `start`) and `joint` (default 1).
    pub fn of(info: &KernelInfo<'_>) -> Result<TextTokens, Error> {
        let side = match info.string(names::TEXT_SIDE).as_deref() {
            None | Some(names::SIDE_END) => Side::End,
            Some(names::SIDE_START) => Side::Start,
            Some(other) => {
                return Err(Error::graph(format!(
                    "the attribute `text_side` is `{other}`, expected `start` or `end`"
                )));
            }
        };
        Ok(TextTokens {
            tokens: info.int(names::TEXT),
            side,
            joint: info.int(names::JOINT).unwrap_or(1) != 0,
        })
    }

    /// The band of a sequence of `tokens`. The plan, the user's word, comes before `fed`, the number that the graph
    /// computes, and that before the attribute.
    ///
    /// # Errors
    /// If `fed` is not one int64, or there is more text than there are tokens.
    pub fn band(
        &self,
        plan: &Plan,
        fed: Option<&Tensor<'_>>,
        tokens: usize,
    ) -> Result<Band, Error> {
        let planned = plan.text.filter(|_| self.joint);
        let (text, side, whose) = match (planned, fed) {
            (Some(text), _) => (text.tokens as i64, text.side, "the plan"),
            (None, Some(fed)) => (one(fed)?, self.side, "input 5"),
            (None, None) => (self.tokens.unwrap_or(0), self.side, "the attribute `text`"),
        };
        let text = usize::try_from(text)
            .ok()
            .filter(|&text| text <= tokens)
            .ok_or_else(|| {
                Error::invalid(format!(
                    "{whose} says that {text} tokens are text, the sequence has {tokens}"
                ))
            })?;
        Ok(Band {
            half_width: plan.half_width(tokens, text),
            text,
            text_at_start: side == Side::Start,
        })
    }
}

fn one(tensor: &Tensor<'_>) -> Result<i64, Error> {
    match tensor.as_slice::<i64>() {
        Some(&[number]) => Ok(number),
        _ => Err(Error::invalid(format!(
            "the number of text tokens (input 5) is {} {:?}, expected one int64",
            tensor.element(),
            tensor.dims()
        ))),
    }
}
