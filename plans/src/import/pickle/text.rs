//! Numbers and strings that pickles write as lines of text.

use super::machine::Value;
use super::refused;
use crate::PlanError;

pub(super) fn decimal(at: usize, digits: &[u8]) -> Result<Value, PlanError> {
    let number = str::from_utf8(digits).ok().and_then(|t| t.parse().ok());
    let number = number.ok_or_else(|| refused(at, "not an integer of at most 128 bits"))?;
    Ok(Value::Int(number))
}

pub(super) fn decimal_index(at: usize, digits: &[u8]) -> Result<u64, PlanError> {
    let index = str::from_utf8(digits).ok().and_then(|t| t.parse().ok());
    index.ok_or_else(|| refused(at, "the memo's index is no number"))
}

/// Python 2's quoted strings, as far as nothing in them is escaped.
pub(super) fn unquoted(line: &[u8]) -> Option<&[u8]> {
    let quote = line.first().filter(|q| matches!(q, b'"' | b'\''))?;
    let inner = line[1..].strip_suffix(&[*quote])?;
    (!inner.contains(&b'\\')).then_some(inner)
}

/// Latin-1 with `\uXXXX` and `\UXXXXXXXX`.
pub(super) fn unescaped(line: &[u8]) -> Option<String> {
    let mut text = String::new();
    let mut rest = line;
    while let [first, tail @ ..] = rest {
        let digits = match (first, tail.first()) {
            (b'\\', Some(b'u')) => 4,
            (b'\\', Some(b'U')) => 8,
            _ => {
                text.push(char::from(*first));
                rest = tail;
                continue;
            }
        };
        let hex = str::from_utf8(tail.get(1..=digits)?).ok()?;
        let hex = hex.bytes().all(|b| b.is_ascii_hexdigit()).then_some(hex)?;
        text.push(char::from_u32(u32::from_str_radix(hex, 16).ok()?)?);
        rest = &tail[1 + digits..];
    }
    Some(text)
}
