//! The five things an attention layer can do at a step, and their names.
//!
//! Only names and classifications live here; what an action costs is in `cost`, what it needs
//! from earlier steps in `liveness`.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::Serialize;

/// What one attention layer computes at one step (DiTFastAttn, §3; arXiv 2406.08552).
///
/// `W` is attention inside the band, `R = O − W` the residual that the latest full step left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, JsonSchema)]
pub enum Action {
    /// Attention over all keys; refreshes R.
    #[serde(rename = "full")]
    Full,
    /// `full` on the conditional half of the batch, copied to the other half; refreshes R.
    #[serde(rename = "asc")]
    Asc,
    /// Window attention with residual sharing: `W + R`.
    #[serde(rename = "wa-rs")]
    WaRs,
    /// `wa-rs` on the conditional half, copied to the other half.
    #[serde(rename = "wa-rs+asc")]
    WaRsAsc,
    /// The latest output of the module that was not itself shared; nothing is computed.
    #[serde(rename = "ast")]
    Ast,
}

impl Action {
    /// Every action, in the order in which tables and legends show them.
    pub const ALL: [Action; 5] = [
        Action::Full,
        Action::Asc,
        Action::WaRs,
        Action::WaRsAsc,
        Action::Ast,
    ];

    /// The name in plan files.
    pub const fn name(self) -> &'static str {
        match self {
            Action::Full => "full",
            Action::Asc => "asc",
            Action::WaRs => "wa-rs",
            Action::WaRsAsc => "wa-rs+asc",
            Action::Ast => "ast",
        }
    }

    /// Computes only the conditional half of the batch (`asc`, `wa-rs+asc`).
    pub const fn uses_halves(self) -> bool {
        matches!(self, Action::Asc | Action::WaRsAsc)
    }

    /// Attends over all keys and so refreshes R (`full`, `asc`).
    pub const fn is_full(self) -> bool {
        matches!(self, Action::Full | Action::Asc)
    }

    /// Attends inside the band and so reads R (`wa-rs`, `wa-rs+asc`).
    pub const fn is_windowed(self) -> bool {
        matches!(self, Action::WaRs | Action::WaRsAsc)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no [`Action`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown action `{0}`, expected one of full, asc, wa-rs, wa-rs+asc, ast")]
pub struct UnknownAction(pub String);

impl FromStr for Action {
    type Err = UnknownAction;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Action::ALL
            .into_iter()
            .find(|action| action.name() == name)
            .ok_or_else(|| UnknownAction(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip_and_agree_with_serde() {
        for action in Action::ALL {
            assert_eq!(action.to_string().parse(), Ok(action));
            assert_eq!(
                serde_json::to_value(action).unwrap(),
                serde_json::Value::from(action.name())
            );
        }
    }

    #[test]
    fn names_are_exact() {
        for name in ["", "Full", "full ", "wa_rs", "asc+wa-rs"] {
            assert_eq!(name.parse::<Action>(), Err(UnknownAction(name.to_owned())));
        }
    }

    #[test]
    fn every_action_but_ast_is_either_full_or_windowed() {
        for action in Action::ALL {
            assert_eq!(
                action.is_full() ^ action.is_windowed(),
                action != Action::Ast
            );
        }
    }
}
