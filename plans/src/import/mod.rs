//! Plans of other implementations, read into ours.
//!
//! Two dialects: xDiT's JSON, `{"block0": {"step0": "FULL_ATTN", …}, …}`, and the authors' list
//! over blocks, `[{"attn1": ["full_attn", …], …}, …]`, which they write with `torch.save`, as a
//! Python pickle in a zip archive (whatever the file's name says). A pickle is turned into the
//! JSON that it amounts to; nothing in it is run. Neither dialect says how wide the window was or
//! how guidance was batched, so the caller has to.
//!
//! Plans found for xDiT, and for PixArt by the authors, were searched with the residual of the
//! wrong half under `wa-rs+asc`; they stay valid here, only better than their search thought.

mod archive;
mod pickle;

use crate::parse::{refuse_large, refuse_misplaced, utf8};
use crate::source::{Member, Source, Token};
use crate::{Action, Cfg, Plan, PlanError, PlanErrorKind as Kind};

/// xDiT's name, the authors' name, ours.
const NAMES: [(&str, &str, Action); 5] = [
    ("FULL_ATTN", "full_attn", Action::Full),
    (
        "FULL_ATTN_CFG_SHARE",
        "full_attn+cfg_attn_share",
        Action::Asc,
    ),
    ("RESIDUAL_WINDOW_ATTN", "residual_window_attn", Action::WaRs),
    (
        "RESIDUAL_WINDOW_ATTN_CFG_SHARE",
        "residual_window_attn+cfg_attn_share",
        Action::WaRsAsc,
    ),
    ("OUTPUT_SHARE", "output_share", Action::Ast),
];

impl Plan {
    /// Reads a plan of xDiT (JSON) or of the authors (a pickle, plain or as `torch.save` wraps it
    /// in a zip archive or did before its version 1.6; or the same as JSON). The contents decide,
    /// not a file's name.
    ///
    /// `window` is the band's half-width as a fraction of the image tokens (their half-width in
    /// tokens, which is in the file's name, over the number of tokens); `cfg` is how guidance
    /// reached their model.
    ///
    /// # Errors
    ///
    /// The first thing that is not as expected, with its line and column. Of a pickle that cannot
    /// be read the line is 1 and the column 1 + the offset of the byte; of one that can, but is
    /// no plan, they are those in the JSON that it amounts to. A `window` out of range is
    /// reported at line 1, column 1.
    pub fn import(file: impl AsRef<[u8]>, window: f64, cfg: Cfg) -> Result<Plan, PlanError> {
        let file = file.as_ref();
        refuse_large(file.len())?;
        let unzipped;
        let (file, zipped) = match file.starts_with(b"PK\x03\x04") {
            true => {
                unzipped = archive::pickle(file)?;
                (&unzipped[..], true)
            }
            false => (file, false),
        };
        // Protocols 2 and later begin with 0x80, earlier ones with an opcode; JSON never so.
        let pickled = zipped || matches!(file.first(), Some(0x80 | b'(' | b']' | b'}'));
        let unpickled;
        let json = match pickled {
            true => {
                unpickled = pickle::to_json(file)?;
                &unpickled
            }
            false => utf8(file)?,
        };
        let document = Source::read(json)?;
        if !(window > 0.0 && window <= 1.0) {
            let what =
                format!("the window to import with must be above 0 and at most 1, found {window}");
            return Err(document.error(Kind::OutOfRange, what));
        }
        let blocks = if document.is_array() {
            authors(&document)?
        } else {
            xdit(&document)?
        };
        let steps = transposed(&document, &blocks, cfg)?;
        let layers = blocks.len();
        Ok(Plan {
            window,
            cfg,
            steps,
            ..Plan::all_full(layers, 0)
        })
    }
}

/// One block's name, its token, and its methods by step.
struct Block<'a> {
    name: String,
    token: Token<'a>,
    methods: Vec<Token<'a>>,
}

fn authors<'a>(document: &Token<'a>) -> Result<Vec<Block<'a>>, PlanError> {
    let mut blocks = Vec::new();
    for (i, token) in document
        .array("the plan", "blocks")?
        .into_iter()
        .enumerate()
    {
        let name = format!("block {i}");
        let methods = token.object(&name)?.required("attn1")?;
        let methods = methods.array(&format!("attn1 of {name}"), "methods")?;
        blocks.push(Block {
            name,
            token,
            methods,
        });
    }
    Ok(blocks)
}

fn xdit<'a>(document: &Token<'a>) -> Result<Vec<Block<'a>>, PlanError> {
    let blocks = numbered(document, "the plan", "block")?
        .into_iter()
        .enumerate();
    blocks
        .map(|(i, token)| {
            let name = format!("block{i}");
            let methods = numbered(&token, &name, "step")?;
            Ok(Block {
                name,
                token,
                methods,
            })
        })
        .collect()
}

/// The values of `{"<prefix>0": …, "<prefix>1": …}` in the order of their numbers.
fn numbered<'a>(object: &Token<'a>, name: &str, prefix: &str) -> Result<Vec<Token<'a>>, PlanError> {
    let members = object.object(name)?.members;
    let mut values = vec![None; members.len()];
    for Member {
        text: key,
        key: key_token,
        value,
    } in &members
    {
        let number = key
            .strip_prefix(prefix)
            .and_then(|number| number.parse::<usize>().ok());
        // `block+1` and `block01` parse as numbers, but nobody writes them.
        let number = number.filter(|number| *key == format!("{prefix}{number}"));
        let number = number.ok_or_else(|| {
            let what = format!(
                "unknown key {} in {name}, expected {prefix}0, {prefix}1, …",
                key_token.shown_name()
            );
            key_token.error(Kind::UnknownKey, what)
        })?;
        let slot = values.get_mut(number).ok_or_else(|| {
            let what = format!(
                "{name} has {} members but one is {}; some number below is missing",
                members.len(),
                key_token.shown_name()
            );
            key_token.error(Kind::Import, what)
        })?;
        *slot = Some(*value);
    }
    // Keys are distinct and below the number of members, so every slot is filled.
    Ok(values.into_iter().flatten().collect())
}

fn transposed(
    document: &Token<'_>,
    blocks: &[Block<'_>],
    cfg: Cfg,
) -> Result<Vec<Vec<Action>>, PlanError> {
    let count = blocks.first().map_or(0, |block| block.methods.len());
    if count == 0 {
        return Err(document.error(
            Kind::Empty,
            "the plan has no blocks or no steps; nothing to import",
        ));
    }
    let mut steps = vec![Vec::with_capacity(blocks.len()); count];
    for block in blocks {
        if block.methods.len() != count {
            let what = format!(
                "{} has {} steps but {} has {count}",
                block.name,
                block.methods.len(),
                blocks[0].name
            );
            return Err(block.token.error(Kind::Import, what));
        }
        for (step, token) in block.methods.iter().enumerate() {
            let name = format!("step {step} of {}", block.name);
            let method = token.string(&name)?;
            let known = NAMES
                .iter()
                .find(|(xdit, authors, _)| method == *xdit || method == *authors);
            let (.., action) = known.ok_or_else(|| {
                let names: Vec<&str> = NAMES
                    .iter()
                    .flat_map(|(xdit, authors, _)| [*xdit, *authors])
                    .collect();
                let what = format!(
                    "unknown method {}, expected one of {}",
                    token.shown_name(),
                    names.join(", ")
                );
                token.error(Kind::UnknownAction, what)
            })?;
            refuse_misplaced(*action, &name, token, step, cfg)?;
            steps[step].push(*action);
        }
    }
    Ok(steps)
}
