//! The record of a search as a file: JSON Lines, one line per decided layer-step behind a header
//! that holds everything that determines the search.
//!
//! Lines are appended and flushed one by one. A search that was killed leaves at worst an
//! unfinished last line, which reading drops.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};

use serde_json::json;

use super::settings::Settings;
use super::table::{Cell, LossTable, Tried};
use crate::parse::{cfg_name, fingerprint, text_tokens, timestep_values};
use crate::source::{Object, Source, Token};
use crate::{Action, PlanError, PlanErrorKind as Kind};

const FORMAT: &str = "ditfastattn-search";
const VERSION: u32 = 1;

/// The header's keys, in its order.
const KEYS: [&str; 14] = [
    "format",
    "version",
    "model_hash",
    "inputs_hash",
    "model",
    "steps",
    "layers",
    "delta",
    "metric",
    "window",
    "cfg",
    "timesteps",
    "text",
    "candidates",
];

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It could not be read or written.
    #[error("the search's journal: {0}")]
    Io(#[from] io::Error),
    /// Another process has it open.
    #[error("another search is writing this journal; wait for it or use another file")]
    InUse,
    /// It is no journal, or not one that a search has written.
    #[error("the search's journal, line {line}, column {column}: {message}")]
    Broken {
        /// Line, from 1.
        line: usize,
        /// Column, from 1, in characters.
        column: usize,
        /// What was expected and found.
        message: String,
    },
    /// It belongs to another search.
    #[error(
        "the journal belongs to another search: its {field} is {journal}, this search's is {search}; use another file, or resume with the journal's settings"
    )]
    OtherSearch {
        /// The header's first key whose values differ.
        field: &'static str,
        /// The value in the journal, as JSON.
        journal: String,
        /// The value in the settings, as JSON.
        search: String,
    },
    /// The table that the search was started with has less than the journal.
    #[error(
        "the journal has {journal} layer-steps but the search starts behind {table}; start it with the table that opening the journal returned"
    )]
    Ahead {
        /// Layer-steps in the journal.
        journal: usize,
        /// Layer-steps in the table.
        table: usize,
    },
}

/// Where decided layer-steps go: a [`Journal`], or `()` for nowhere.
pub trait Record {
    /// Called once at the start: records what `table` has and the record has not.
    ///
    /// # Errors
    ///
    /// When that is impossible.
    fn catch_up(&mut self, table: &LossTable) -> Result<(), JournalError>;

    /// Records the next layer-step, durably enough to survive the process.
    ///
    /// # Errors
    ///
    /// When that is impossible; it ends the search.
    fn record(&mut self, cell: &Cell) -> Result<(), JournalError>;
}

impl Record for () {
    fn catch_up(&mut self, _: &LossTable) -> Result<(), JournalError> {
        Ok(())
    }

    fn record(&mut self, _: &Cell) -> Result<(), JournalError> {
        Ok(())
    }
}

/// A journal that is being written.
#[derive(Debug)]
pub struct Journal<W> {
    out: W,
    cells: usize,
}

impl<W: Write> Journal<W> {
    /// Begins a journal: writes the header.
    ///
    /// # Errors
    ///
    /// When `out` cannot be written.
    pub fn new(mut out: W, settings: &Settings) -> Result<Journal<W>, JournalError> {
        out.write_all(header(settings).as_bytes())?;
        out.flush()?;
        Ok(Journal { out, cells: 0 })
    }
}

impl Journal<File> {
    /// Begins a journal in an empty file, or resumes the one in it, and returns what it holds.
    ///
    /// `file` must be open for reading and writing. It is locked until the journal is dropped.
    /// An unfinished last line is cut off.
    ///
    /// # Errors
    ///
    /// When the file belongs to another search, is no journal, is in use, or on I/O errors. Then
    /// it is left as it is.
    pub fn open(
        mut file: File,
        settings: &Settings,
    ) -> Result<(Journal<File>, LossTable), JournalError> {
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::InUse),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.read_to_end(&mut bytes)?;
        let header = header(settings);
        // Also where the header itself was cut short.
        let begun = !header.as_bytes().starts_with(&bytes);
        let (table, keep) = match begun {
            true => LossTable::read(&bytes)?,
            false => (LossTable::new(settings.clone()).map_err(refused)?, 0),
        };
        refuse_other(table.settings(), settings)?;
        file.set_len(keep as u64)?;
        file.seek(SeekFrom::Start(keep as u64))?;
        let journal = match begun {
            true => Journal {
                out: file,
                cells: table.cells().len(),
            },
            false => Journal::new(file, settings)?,
        };
        Ok((journal, table))
    }
}

impl<W: Write> Record for Journal<W> {
    fn catch_up(&mut self, table: &LossTable) -> Result<(), JournalError> {
        let cells = table.cells();
        if self.cells > cells.len() {
            return Err(JournalError::Ahead {
                journal: self.cells,
                table: cells.len(),
            });
        }
        cells[self.cells..]
            .iter()
            .try_for_each(|cell| self.record(cell))
    }

    fn record(&mut self, cell: &Cell) -> Result<(), JournalError> {
        self.out.write_all(line(cell).as_bytes())?;
        self.out.flush()?;
        self.cells += 1;
        Ok(())
    }
}

impl LossTable {
    /// Reads a journal. An unfinished last line is dropped.
    ///
    /// # Errors
    ///
    /// The first thing that no search would have written, with its line and column.
    pub fn parse(journal: &[u8]) -> Result<LossTable, JournalError> {
        LossTable::read(journal).map(|(table, _)| table)
    }

    /// The table as the journal of its search.
    pub fn to_jsonl(&self) -> String {
        let lines = self.cells().iter().map(line);
        std::iter::once(header(self.settings()))
            .chain(lines)
            .collect()
    }

    /// The table of a journal, and how many bytes of the journal its finished lines are.
    fn read(journal: &[u8]) -> Result<(LossTable, usize), JournalError> {
        let keep = journal
            .iter()
            .rposition(|&b| b == b'\n')
            .map_or(0, |i| i + 1);
        let text = match std::str::from_utf8(&journal[..keep]) {
            Ok(text) => text,
            Err(error) => {
                let lines = journal[..error.valid_up_to()].split(|&b| b == b'\n');
                let message = "not UTF-8; this is no journal of a search".to_owned();
                return Err(broken(lines.count(), 1, message));
            }
        };
        let mut lines = text.lines().enumerate();
        let Some((_, first)) = lines.next() else {
            let message = "expected a header, found no finished line".to_owned();
            return Err(broken(1, 1, message));
        };
        let settings = read_header(first).map_err(|error| at(1, error))?;
        let mut table = LossTable::new(settings).map_err(refused)?;
        for (i, line) in lines {
            let cell = read_cell(line).map_err(|error| at(i + 1, error))?;
            table
                .push(cell)
                .map_err(|message| broken(i + 1, 1, message))?;
        }
        Ok((table, keep))
    }
}

fn broken(line: usize, column: usize, message: String) -> JournalError {
    JournalError::Broken {
        line,
        column,
        message,
    }
}

fn at(line: usize, error: PlanError) -> JournalError {
    broken(line, error.column, error.message)
}

fn refused(error: super::InvalidSettings) -> JournalError {
    broken(1, 1, error.to_string())
}

/// The header's values, in the order of [`KEYS`].
fn values(settings: &Settings) -> [serde_json::Value; KEYS.len()] {
    [
        json!(FORMAT),
        json!(VERSION),
        json!(settings.model_hash),
        json!(settings.inputs_hash),
        json!(settings.model),
        json!(settings.steps),
        json!(settings.layers()),
        json!(settings.delta),
        json!(settings.metric.name()),
        json!(settings.window),
        json!(settings.cfg),
        json!(settings.timesteps),
        json!(settings.text),
        json!(settings.candidates),
    ]
}

fn header(settings: &Settings) -> String {
    let members = KEYS.iter().zip(values(settings));
    let members: Vec<String> = members
        .map(|(key, value)| format!("\"{key}\":{value}"))
        .collect();
    format!("{{{}}}\n", members.join(","))
}

fn line(cell: &Cell) -> String {
    let losses: Vec<_> = cell
        .tried
        .iter()
        .map(|t| json!([t.action, t.loss]))
        .collect();
    let (step, layer) = (cell.step, cell.layer);
    let (action, losses) = (json!(cell.action), json!(losses));
    format!("{{\"step\":{step},\"layer\":{layer},\"action\":{action},\"losses\":{losses}}}\n")
}

fn refuse_other(journal: &Settings, search: &Settings) -> Result<(), JournalError> {
    let pairs = values(journal).into_iter().zip(values(search));
    for (field, (journal, search)) in KEYS.into_iter().zip(pairs) {
        if journal != search {
            return Err(JournalError::OtherSearch {
                field,
                journal: journal.to_string(),
                search: search.to_string(),
            });
        }
    }
    Ok(())
}

fn read_header(line: &str) -> Result<Settings, PlanError> {
    let token = Source::read(line)?;
    let header = token.object("the header")?;
    let format = header.required("format")?;
    if format.string("format")? != FORMAT {
        let found = format.shown();
        let what = format!("format must be `{FORMAT}`, found {found}; this is no search's journal");
        return Err(format.error(Kind::WrongFormat, what));
    }
    let version = header.required("version")?;
    if version.text() != VERSION.to_string() {
        let found = version.shown();
        let what = format!("journal version {found} is not supported, expected {VERSION}");
        return Err(version.error(Kind::WrongVersion, what));
    }
    header.refuse_others(&KEYS)?;
    let metric = header.required("metric")?;
    let metric = metric
        .string("metric")?
        .parse()
        .map_err(|error| metric.error(Kind::WrongType, format!("{error}")))?;
    let candidates = header.required("candidates")?;
    let mut lists = Vec::new();
    for list in candidates.array("candidates", "lists, one per layer")? {
        let list = list.array("candidates of a layer", "actions")?;
        lists.push(list.iter().map(action).collect::<Result<_, _>>()?);
    }
    if header.required("layers")?.count("layers", 1)? != lists.len() {
        let what = format!("layers is not the number of lists, {}", lists.len());
        return Err(candidates.error(Kind::RowLength, what));
    }
    Ok(Settings {
        model_hash: header.required("model_hash")?.string("model_hash")?,
        inputs_hash: header.required("inputs_hash")?.string("inputs_hash")?,
        model: nullable(&header, "model", fingerprint)?,
        steps: header.required("steps")?.count("steps", 1)?,
        delta: header.required("delta")?.number("delta")?,
        metric,
        window: header.required("window")?.number("window")?,
        cfg: cfg_name(&header.required("cfg")?)?,
        timesteps: nullable(&header, "timesteps", timestep_values)?,
        text: nullable(&header, "text", text_tokens)?,
        candidates: lists,
    })
}

fn read_cell(line: &str) -> Result<Cell, PlanError> {
    let token = Source::read(line)?;
    let cell = token.object("a layer-step")?;
    cell.refuse_others(&["step", "layer", "action", "losses"])?;
    let mut tried = Vec::new();
    for pair in cell.required("losses")?.array("losses", "pairs")? {
        let [candidate, loss] = pair.array("a pair", "a candidate and its loss")?[..] else {
            return Err(pair.error(Kind::RowLength, "a pair is a candidate and its loss"));
        };
        tried.push(Tried {
            action: action(&candidate)?,
            loss: match loss.text() {
                "null" => None,
                _ => Some(loss.number("a loss")?),
            },
        });
    }
    Ok(Cell {
        step: cell.required("step")?.count("step", 1)?,
        layer: cell.required("layer")?.count("layer", 0)?,
        action: action(&cell.required("action")?)?,
        tried,
    })
}

fn action(token: &Token<'_>) -> Result<Action, PlanError> {
    let name = token.string("an action")?;
    name.parse().map_err(|_| {
        let names = Action::ALL.map(Action::name).join(", ");
        let what = format!(
            "unknown action {}, expected one of {names}",
            token.shown_name()
        );
        token.error(Kind::UnknownAction, what)
    })
}

fn nullable<'a, T>(
    object: &Object<'a>,
    key: &str,
    read: fn(&Token<'a>) -> Result<T, PlanError>,
) -> Result<Option<T>, PlanError> {
    let token = object.required(key)?;
    match token.text() {
        "null" => Ok(None),
        _ => read(&token).map(Some),
    }
}
