//! Why a plan was refused, and where.
//!
//! One kind per refusal; the message is written where the refusal happens, because only there is
//! it known what was expected and found.

/// The reasons for which a plan is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PlanErrorKind {
    /// The file is larger than [`MAX_PLAN_BYTES`](crate::MAX_PLAN_BYTES).
    TooLarge,
    /// The file is not UTF-8.
    NotUtf8,
    /// The file is a Python pickle, as the authors' plans are; or one was to be imported, but it
    /// is damaged or holds more than plain data.
    Pickle,
    /// The file is not JSON.
    Syntax,
    /// A key occurs twice in one object.
    DuplicateKey,
    /// `format` is not `"ditfastattn-plan"`.
    WrongFormat,
    /// `version` is not one this library reads.
    WrongVersion,
    /// A key that the format does not have.
    UnknownKey,
    /// A key that the format requires is absent.
    MissingKey,
    /// A value of another JSON type than the format requires.
    WrongType,
    /// A number outside of its range.
    OutOfRange,
    /// `cfg` is none of its names.
    UnknownCfg,
    /// `text.side` is neither `start` nor `end`.
    UnknownSide,
    /// An action that does not exist.
    UnknownAction,
    /// No steps, or no layers in the first one.
    Empty,
    /// A row of `steps` has another length than the first.
    RowLength,
    /// The first row holds an action that needs an earlier step.
    FirstRow,
    /// `asc` or `wa-rs+asc` although `cfg` is `none`.
    HalvesWithoutCfg,
    /// `timesteps` has another length than `steps`.
    TimestepsLength,
    /// An imported plan skips or repeats a block or a step, or its blocks disagree in length.
    Import,
}

/// A refused plan: which rule, where in the file, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct PlanError {
    /// The rule that was broken.
    pub kind: PlanErrorKind,
    /// Line of the offending token, from 1.
    pub line: usize,
    /// Column of the offending token's first character, from 1, in characters.
    pub column: usize,
    /// What was expected and found, and what to do.
    pub message: String,
}
