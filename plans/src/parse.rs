//! From a plan file to a [`Plan`]: every rule of the format, each with its place in the file.
//!
//! This module decides what is valid; nothing else in the project does. It must stay in step
//! with the JSON Schema in `schema`, which states the part that a schema can express.

use crate::plan::{Cfg, DEFAULT_WINDOW, Fingerprint, Plan, Side, TextTokens};
use crate::source::{Source, Token, position};
use crate::{Action, PlanError, PlanErrorKind as Kind};

/// The largest plan file that is read, in bytes.
///
/// 1000 steps of 100 layers, one action to a line, take 2 MB; what is larger is no plan, and
/// would be read into memory several times over before anybody could say so.
pub const MAX_PLAN_BYTES: usize = 4 << 20;

/// The value of `format`.
pub(crate) const FORMAT: &str = "ditfastattn-plan";
/// The value of `version`.
pub(crate) const VERSION: u32 = 1;

const KEYS: [&str; 10] = [
    "format",
    "version",
    "name",
    "delta",
    "window",
    "cfg",
    "timesteps",
    "text",
    "model",
    "steps",
];

impl Plan {
    /// Reads a plan file.
    ///
    /// # Errors
    ///
    /// The first rule that the file breaks, with the line and column of the token that breaks it.
    pub fn parse(json: &str) -> Result<Plan, PlanError> {
        refuse_large(json.len())?;
        let document = Source::read(json)?;
        let plan = document.object("a plan")?;

        // Which format and version comes first: another version may well have other keys.
        if let Some(format) = plan.get("format")
            && format.string("format")? != FORMAT
        {
            let found = format.shown();
            let what = format!("format must be `{FORMAT}`, found {found}; this is no plan file");
            return Err(format.error(Kind::WrongFormat, what));
        }
        if let Some(version) = plan.get("version")
            && version.text() != VERSION.to_string()
        {
            let kind = if version.is_number() {
                Kind::WrongVersion
            } else {
                Kind::WrongType
            };
            let found = version.shown();
            let what = format!(
                "plan version {found} is not supported, expected the number {VERSION}; use a release that reads it"
            );
            return Err(version.error(kind, what));
        }
        plan.refuse_others(&KEYS)?;
        plan.required("format")?;
        plan.required("version")?;
        let steps = plan.required("steps")?;

        let name = plan
            .optional("name")?
            .map(|t| t.string("name"))
            .transpose()?;
        let delta = plan
            .optional("delta")?
            .map(|t| at_least_zero(&t, "delta"))
            .transpose()?;
        let window = plan
            .optional("window")?
            .map_or(Ok(DEFAULT_WINDOW), |t| window(&t))?;
        let cfg = plan
            .optional("cfg")?
            .map_or(Ok(Cfg::None), |t| cfg_name(&t))?;
        let timesteps = plan
            .optional("timesteps")?
            .map(|t| Ok((t, timestep_values(&t)?)))
            .transpose()?;
        let text = plan
            .optional("text")?
            .map(|t| text_tokens(&t))
            .transpose()?;
        let model = plan
            .optional("model")?
            .map(|t| fingerprint(&t))
            .transpose()?;
        let steps = rows(&steps, cfg)?;
        if let Some((token, values)) = &timesteps
            && values.len() != steps.len()
        {
            let what = format!(
                "timesteps has {} values but steps has {} rows; give one timestep per step",
                values.len(),
                steps.len()
            );
            return Err(token.error(Kind::TimestepsLength, what));
        }
        let timesteps = timesteps.map(|(_, values)| values);
        Ok(Plan {
            name,
            delta,
            window,
            cfg,
            timesteps,
            text,
            model,
            steps,
        })
    }

    /// Reads a plan file from bytes that may not be text.
    ///
    /// # Errors
    ///
    /// As [`Plan::parse`]; bytes that are not UTF-8 are refused at the first of them.
    pub fn parse_bytes(json: &[u8]) -> Result<Plan, PlanError> {
        refuse_large(json.len())?;
        if json.starts_with(b"PK\x03\x04") || json.starts_with(b"\x80") {
            let message =
                "this is a Python pickle, as the authors of DiTFastAttn write their plans; \
                           import it (docs/plan-format.md)"
                    .to_owned();
            return Err(PlanError {
                kind: Kind::Pickle,
                line: 1,
                column: 1,
                message,
            });
        }
        Plan::parse(utf8(json)?)
    }
}

/// The bytes as text; refused at the first that is not UTF-8.
pub(crate) fn utf8(json: &[u8]) -> Result<&str, PlanError> {
    std::str::from_utf8(json).map_err(|error| {
        let (line, column) = position(json, error.valid_up_to());
        let message =
            "a plan is UTF-8 text, and this byte is not; save the file as UTF-8".to_owned();
        PlanError {
            kind: Kind::NotUtf8,
            line,
            column,
            message,
        }
    })
}

pub(crate) fn refuse_large(bytes: usize) -> Result<(), PlanError> {
    if bytes <= MAX_PLAN_BYTES {
        return Ok(());
    }
    let message =
        format!("a plan has at most {MAX_PLAN_BYTES} bytes, found more; is this the right file?");
    Err(PlanError {
        kind: Kind::TooLarge,
        line: 1,
        column: 1,
        message,
    })
}

fn at_least_zero(token: &Token<'_>, name: &str) -> Result<f64, PlanError> {
    let number = token.number(name)?;
    if number >= 0.0 {
        return Ok(number);
    }
    let what = format!("{name} must not be negative, found {}", token.shown());
    Err(token.error(Kind::OutOfRange, what))
}

fn window(token: &Token<'_>) -> Result<f64, PlanError> {
    let window = token.number("window")?;
    if window > 0.0 && window <= 1.0 {
        return Ok(window);
    }
    let what = format!(
        "window is the band's half-width as a fraction of the tokens, above 0 and at most 1, found {}; the paper uses 0.125",
        token.shown()
    );
    Err(token.error(Kind::OutOfRange, what))
}

pub(crate) fn cfg_name(token: &Token<'_>) -> Result<Cfg, PlanError> {
    let name = token.string("cfg")?;
    let known = Cfg::ALL.into_iter().find(|cfg| cfg.name() == name);
    known.ok_or_else(|| {
        let names = Cfg::ALL.map(Cfg::name).join(", ");
        token.error(
            Kind::UnknownCfg,
            format!(
                "unknown cfg {}, expected one of {names}",
                token.shown_name()
            ),
        )
    })
}

pub(crate) fn timestep_values(token: &Token<'_>) -> Result<Vec<f64>, PlanError> {
    let values = token.array("timesteps", "numbers")?;
    let named = values.iter().enumerate();
    named
        .map(|(i, value)| value.number(&format!("timesteps[{i}]")))
        .collect()
}

pub(crate) fn text_tokens(token: &Token<'_>) -> Result<TextTokens, PlanError> {
    let text = token.object("text")?;
    text.refuse_others(&["tokens", "side"])?;
    let tokens = text.required("tokens")?.count("text.tokens", 0)?;
    let side = text.required("side")?;
    let side = match side.string("text.side")?.as_str() {
        "start" => Side::Start,
        "end" => Side::End,
        _ => {
            let what = format!(
                "unknown text.side {}, expected start or end",
                side.shown_name()
            );
            return Err(side.error(Kind::UnknownSide, what));
        }
    };
    Ok(TextTokens { tokens, side })
}

pub(crate) fn fingerprint(token: &Token<'_>) -> Result<Fingerprint, PlanError> {
    let model = token.object("model")?;
    model.refuse_others(&["layers", "heads", "head_dim", "tokens"])?;
    let count = |key: &str| {
        let value = model.optional(key)?;
        value
            .map(|t| t.count(&format!("model.{key}"), 1))
            .transpose()
    };
    Ok(Fingerprint {
        layers: count("layers")?,
        heads: count("heads")?,
        head_dim: count("head_dim")?,
        tokens: count("tokens")?,
    })
}

fn rows(token: &Token<'_>, cfg: Cfg) -> Result<Vec<Vec<Action>>, PlanError> {
    let rows = token.array("steps", "rows of actions")?;
    if rows.is_empty() {
        return Err(token.error(Kind::Empty, "steps is empty; a plan has at least one step"));
    }
    let mut steps: Vec<Vec<Action>> = Vec::with_capacity(rows.len());
    for (step, row) in rows.iter().enumerate() {
        let name = format!("steps[{step}]");
        let tokens = row.array(&name, "actions")?;
        let mut actions = Vec::with_capacity(tokens.len());
        for (layer, token) in tokens.iter().enumerate() {
            actions.push(action(token, step, layer, cfg)?);
        }
        let layers = steps.first().map_or(actions.len(), Vec::len);
        if actions.is_empty() && step == 0 {
            return Err(row.error(
                Kind::Empty,
                "steps[0] is empty; a plan has at least one layer",
            ));
        }
        if actions.len() != layers {
            let what = format!(
                "{name} has {} actions but steps[0] has {layers}; every row has one action per layer",
                actions.len()
            );
            return Err(row.error(Kind::RowLength, what));
        }
        steps.push(actions);
    }
    Ok(steps)
}

fn action(token: &Token<'_>, step: usize, layer: usize, cfg: Cfg) -> Result<Action, PlanError> {
    let name = format!("steps[{step}][{layer}]");
    let action: Action = token.string(&name)?.parse().map_err(|_| {
        let names = Action::ALL.map(Action::name).join(", ");
        let what = format!(
            "unknown action {}, expected one of {names}",
            token.shown_name()
        );
        token.error(Kind::UnknownAction, what)
    })?;
    refuse_misplaced(action, &name, token, step, cfg)?;
    Ok(action)
}

/// The rules that an action has to keep because of where it is.
pub(crate) fn refuse_misplaced(
    action: Action,
    name: &str,
    token: &Token<'_>,
    step: usize,
    cfg: Cfg,
) -> Result<(), PlanError> {
    if step == 0 && !action.is_full() {
        let what = format!(
            "{name} is `{action}`, but the first step has nothing to reuse; use full or asc"
        );
        return Err(token.error(Kind::FirstRow, what));
    }
    if action.uses_halves() && cfg == Cfg::None {
        let what = format!(
            "{name} is `{action}`, which needs the two halves of guidance, but cfg is none; set cfg to cond-first, uncond-first or separate"
        );
        return Err(token.error(Kind::HalvesWithoutCfg, what));
    }
    Ok(())
}
