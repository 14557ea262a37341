//! JSON text whose every token knows where it is.
//!
//! serde_json does the reading; this module only keeps the borrowed raw tokens, whose addresses
//! inside the text are their positions. It knows JSON, not plans.

use std::collections::HashSet;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::{PlanError, PlanErrorKind};

/// A JSON document under inspection.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a>(&'a str);

/// One JSON value (or key), as written.
#[derive(Clone, Copy)]
pub(crate) struct Token<'a> {
    source: Source<'a>,
    text: &'a str,
}

impl<'a> Source<'a> {
    /// Checks the syntax of the whole document and returns its one value.
    pub(crate) fn read(text: &'a str) -> Result<Token<'a>, PlanError> {
        let source = Source(text);
        if text.starts_with('\u{feff}') {
            let what = "the file begins with a byte order mark; save it as UTF-8 without one";
            return Err(source.error_at(0, PlanErrorKind::Syntax, what.to_owned()));
        }
        match serde_json::from_str::<&RawValue>(text) {
            Ok(raw) => Ok(source.token(raw)),
            Err(error) => Err(source.syntax_error(&error)),
        }
    }

    fn token(self, raw: &'a RawValue) -> Token<'a> {
        Token {
            source: self,
            text: raw.get(),
        }
    }

    /// serde_json counts columns in bytes, and points before the first one at the end of a line.
    fn syntax_error(self, error: &serde_json::Error) -> PlanError {
        let start: usize = self
            .0
            .split_inclusive('\n')
            .take(error.line().max(1) - 1)
            .map(str::len)
            .sum();
        let at = match error.is_eof() {
            true => self.0.len(),
            false => start + error.column().max(1) - 1,
        };
        let text = error.to_string();
        let what = text.split(" at line ").next().unwrap_or(&text);
        self.error_at(at, PlanErrorKind::Syntax, format!("not JSON: {what}"))
    }

    fn error_at(self, at: usize, kind: PlanErrorKind, message: String) -> PlanError {
        let (line, column) = position(self.0.as_bytes(), at);
        PlanError {
            kind,
            line,
            column,
            message,
        }
    }
}

/// Line and column, from 1 and in characters, of the byte `at` of a text.
pub(crate) fn position(text: &[u8], at: usize) -> (usize, usize) {
    let before = &text[..at.min(text.len())];
    let line_start = before
        .iter()
        .rposition(|&b| b == b'\n')
        .map_or(0, |i| i + 1);
    let line = before.iter().filter(|&&b| b == b'\n').count() + 1;
    // Every byte but a continuation byte begins a character.
    let column = before[line_start..]
        .iter()
        .filter(|&&b| b & 0xC0 != 0x80)
        .count()
        + 1;
    (line, column)
}

impl<'a> Token<'a> {
    /// A refusal that points at this token.
    pub(crate) fn error(&self, kind: PlanErrorKind, message: impl Into<String>) -> PlanError {
        let at = self.text.as_ptr() as usize - self.source.0.as_ptr() as usize;
        self.source.error_at(at, kind, message.into())
    }

    /// The token for a message: scalars as written, cut to a sensible length; others by type.
    pub(crate) fn shown(&self) -> String {
        match self.text.as_bytes().first() {
            Some(b'{') => "an object".to_owned(),
            Some(b'[') => "an array".to_owned(),
            _ => quoted(self.text),
        }
    }

    /// A string that should have been one of a few names, without its JSON quotes.
    pub(crate) fn shown_name(&self) -> String {
        quoted(self.text.trim_matches('"'))
    }

    /// The value is a number.
    pub(crate) fn is_number(&self) -> bool {
        self.starts_with(b"-0123456789")
    }

    /// The token as written.
    pub(crate) fn text(&self) -> &'a str {
        self.text
    }

    fn wrong_type(&self, name: &str, expected: &str) -> PlanError {
        let message = format!("{name} must be {expected}, found {}", self.shown());
        self.error(PlanErrorKind::WrongType, message)
    }

    /// The value is an array.
    pub(crate) fn is_array(&self) -> bool {
        self.starts_with(b"[")
    }

    fn starts_with(&self, bytes: &[u8]) -> bool {
        self.text
            .as_bytes()
            .first()
            .is_some_and(|b| bytes.contains(b))
    }

    /// The value as an object called `name`; a key that occurs twice is refused.
    pub(crate) fn object(&self, name: &str) -> Result<Object<'a>, PlanError> {
        if !self.starts_with(b"{") {
            return Err(self.wrong_type(name, "an object"));
        }
        let Members(raw) = self.reread(name)?;
        let mut seen = HashSet::new();
        let mut members = Vec::with_capacity(raw.len());
        for (key, value) in raw {
            let (key, value) = (self.source.token(key), self.source.token(value));
            let text = key.string("a key")?;
            if !seen.insert(text.clone()) {
                let what = format!("key {} occurs twice in {name}; keep one", key.shown_name());
                return Err(key.error(PlanErrorKind::DuplicateKey, what));
            }
            members.push(Member { text, key, value });
        }
        Ok(Object {
            name: name.to_owned(),
            token: *self,
            members,
        })
    }

    /// The elements of an array.
    pub(crate) fn array(&self, name: &str, of: &str) -> Result<Vec<Token<'a>>, PlanError> {
        if !self.starts_with(b"[") {
            return Err(self.wrong_type(name, &format!("an array of {of}")));
        }
        let raw: Vec<&'a RawValue> = self.reread(name)?;
        Ok(raw.into_iter().map(|raw| self.source.token(raw)).collect())
    }

    /// The decoded text of a string.
    pub(crate) fn string(&self, name: &str) -> Result<String, PlanError> {
        if !self.starts_with(b"\"") {
            return Err(self.wrong_type(name, "a string"));
        }
        self.reread(name)
    }

    /// A finite number, rounded to the nearest float64.
    pub(crate) fn number(&self, name: &str) -> Result<f64, PlanError> {
        if !self.is_number() {
            return Err(self.wrong_type(name, "a number"));
        }
        match self.text.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(number),
            _ => {
                let what = format!("{name} must be a finite float64, found {}", self.shown());
                Err(self.error(PlanErrorKind::OutOfRange, what))
            }
        }
    }

    /// A whole number from `least` to 2³² − 1, written without point or exponent.
    pub(crate) fn count(&self, name: &str, least: u32) -> Result<usize, PlanError> {
        if !self.is_number() || self.text.contains(['.', 'e', 'E']) {
            return Err(self.wrong_type(name, "a whole number"));
        }
        match self.text.parse::<u32>() {
            Ok(count) if count >= least => Ok(count as usize),
            _ => {
                let range = format!("{name} must be a whole number from {least} to {}", u32::MAX);
                let what = format!("{range}, found {}", self.shown());
                Err(self.error(PlanErrorKind::OutOfRange, what))
            }
        }
    }

    /// Decodes the token. The whole text was read once, so what can still fail is what serde_json
    /// leaves for later: a string's `\u` escapes that are no character.
    fn reread<T: Deserialize<'a>>(&self, name: &str) -> Result<T, PlanError> {
        serde_json::from_str(self.text).map_err(|error| {
            let text = error.to_string();
            let what = text.split(" at line ").next().unwrap_or(&text);
            self.error(PlanErrorKind::Syntax, format!("{name} is not JSON: {what}"))
        })
    }
}

/// One member of an object.
pub(crate) struct Member<'a> {
    /// The decoded key.
    pub(crate) text: String,
    pub(crate) key: Token<'a>,
    pub(crate) value: Token<'a>,
}

/// An object with distinct keys, in the order of the file.
pub(crate) struct Object<'a> {
    name: String,
    token: Token<'a>,
    pub(crate) members: Vec<Member<'a>>,
}

impl<'a> Object<'a> {
    /// The value of a key, if it is there.
    pub(crate) fn get(&self, key: &str) -> Option<Token<'a>> {
        self.members
            .iter()
            .find(|member| member.text == key)
            .map(|member| member.value)
    }

    /// The value of a key that may be absent; `null` is no way to say so.
    pub(crate) fn optional(&self, key: &str) -> Result<Option<Token<'a>>, PlanError> {
        match self.get(key) {
            Some(value) if value.text == "null" => {
                let what = format!("{key} in {} is null; leave the key out instead", self.name);
                Err(value.error(PlanErrorKind::WrongType, what))
            }
            value => Ok(value),
        }
    }

    /// The value of a key that must be there.
    pub(crate) fn required(&self, key: &str) -> Result<Token<'a>, PlanError> {
        self.get(key).ok_or_else(|| {
            let what = format!(
                "{} needs the key `{key}`, which is absent; add it",
                self.name
            );
            self.token.error(PlanErrorKind::MissingKey, what)
        })
    }

    /// Refuses the first key that is not among the `known`.
    pub(crate) fn refuse_others(&self, known: &[&str]) -> Result<(), PlanError> {
        let other = self
            .members
            .iter()
            .find(|member| !known.contains(&member.text.as_str()));
        other.map_or(Ok(()), |member| {
            let (key, known) = (member.key.shown_name(), known.join(", "));
            let what = format!(
                "unknown key {key} in {}, expected one of {known}",
                self.name
            );
            Err(member.key.error(PlanErrorKind::UnknownKey, what))
        })
    }
}

/// Text for a message, in backticks. All that is not plain ASCII is spelled out: a hostile file
/// cannot rewrite the terminal, and a look-alike letter shows as what it is.
fn quoted(text: &str) -> String {
    const LONGEST: usize = 40;
    let plain = |c: char| c.is_ascii_graphic() || c == ' ';
    let mut shown = String::from("`");
    for c in text.chars().take(LONGEST) {
        match plain(c) {
            true => shown.push(c),
            false => shown.extend(c.escape_default()),
        }
    }
    shown.push_str(if text.chars().nth(LONGEST).is_some() {
        "…`"
    } else {
        "`"
    });
    shown
}

/// An object's members, raw and in order, repeated keys included.
struct Members<'a>(Vec<(&'a RawValue, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Members<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(key) = map.next_key()? {
                    let value = map.next_value().map_err(A::Error::custom)?;
                    pairs.push((key, value));
                }
                Ok(Members(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}
