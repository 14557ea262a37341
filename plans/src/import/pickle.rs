//! Python pickles that hold nothing but plain data, read without running anything.
//!
//! A pickle is a program for a small stack machine. Of its opcodes (protocols 0 to 5) those that
//! make `None`, booleans, numbers, strings, lists, tuples and dicts are obeyed; one that would
//! import or call something ends the reading. Values live in one list and refer to each other by
//! index, as a pickle's memo may share them and make them contain themselves.

use std::collections::HashMap;
use std::fmt::Write;

use crate::parse::MAX_PLAN_BYTES;
use crate::{PlanError, PlanErrorKind};

/// More values than any plan needs: what is shared counts once. The memo has no more entries.
const MOST_VALUES: usize = 1 << 20;
/// A plan's are three deep.
const DEEPEST: usize = 16;

/// What `torch.save` of before 1.6 begins with.
const LEGACY_MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;

/// Opcodes that import, call or look up what is not in the file.
const CODE: [(u8, &str); 15] = [
    (b'c', "GLOBAL"),
    (0x93, "STACK_GLOBAL"),
    (b'R', "REDUCE"),
    (b'b', "BUILD"),
    (b'i', "INST"),
    (b'o', "OBJ"),
    (0x81, "NEWOBJ"),
    (0x92, "NEWOBJ_EX"),
    (0x82, "EXT1"),
    (0x83, "EXT2"),
    (0x84, "EXT4"),
    (b'P', "PERSID"),
    (b'Q', "BINPERSID"),
    (0x97, "NEXT_BUFFER"),
    (0x98, "READONLY_BUFFER"),
];

/// Opcodes of harmless types that JSON does not have.
const OTHER_TYPES: [(u8, &str); 7] = [
    (b'B', "BINBYTES"),
    (b'C', "SHORT_BINBYTES"),
    (0x8e, "BINBYTES8"),
    (0x96, "BYTEARRAY8"),
    (0x8f, "EMPTY_SET"),
    (0x90, "ADDITEMS"),
    (0x91, "FROZENSET"),
];

/// A value's index.
type Id = usize;

#[derive(Debug)]
enum Value {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
}

/// The JSON that a pickle amounts to, of a plain `pickle.dump` or of an old `torch.save`.
pub(super) fn to_json(bytes: &[u8]) -> Result<String, PlanError> {
    let mut reader = Reader { bytes, at: 0 };
    let first = reader.load()?;
    let Value::Int(LEGACY_MAGIC) = first.values[first.root] else {
        reader.end()?;
        return first.json();
    };
    // The protocol's version, the sizes of C's types, the object, the keys of its tensors.
    reader.load()?;
    reader.load()?;
    let object = reader.load()?;
    let at = reader.at;
    let keys = reader.load()?;
    match &keys.values[keys.root] {
        Value::List(keys) if keys.is_empty() => {}
        _ => return Err(refused(at, "the file holds tensors; a plan has none")),
    }
    reader.end()?;
    object.json()
}

/// A refusal of the byte at `at`.
pub(super) fn refused(at: usize, what: &str) -> PlanError {
    PlanError {
        kind: PlanErrorKind::Pickle,
        line: 1,
        column: at + 1,
        message: format!("the pickle, byte {at}: {what}"),
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Runs one pickle, up to and including its STOP.
    fn load(&mut self) -> Result<Object, PlanError> {
        let mut machine = Machine::default();
        loop {
            let at = self.at;
            let opcode = self.take(1)?[0];
            if opcode == b'.' {
                let root = machine.pop(at)?;
                return Ok(Object {
                    values: machine.values,
                    root,
                });
            }
            self.execute(opcode, at, &mut machine)?;
        }
    }

    fn end(&self) -> Result<(), PlanError> {
        match self.bytes.len() - self.at {
            0 => Ok(()),
            more => Err(refused(
                self.at,
                &format!("{more} more bytes follow its end"),
            )),
        }
    }

    fn execute(&mut self, opcode: u8, at: usize, machine: &mut Machine) -> Result<(), PlanError> {
        match opcode {
            0x80 => match self.byte()? {
                0..=5 => Ok(()),
                newer => Err(refused(at, &format!("protocol {newer}, expected 0 to 5"))),
            },
            // FRAME: only a hint for reading ahead.
            0x95 => self.take(8).map(drop),
            b'(' => {
                machine.marks.push(machine.stack.len());
                Ok(())
            }
            b'0' => {
                if machine.marks.last() == Some(&machine.stack.len()) {
                    machine.marks.pop();
                    return Ok(());
                }
                machine.pop(at).map(drop)
            }
            b'1' => machine.pop_mark(at).map(drop),
            b'2' => {
                let top = machine.pop(at)?;
                machine.stack.extend([top, top]);
                Ok(())
            }

            b'N' => machine.push(at, Value::None),
            0x88 => machine.push(at, Value::Bool(true)),
            0x89 => machine.push(at, Value::Bool(false)),
            b'I' => match self.line()? {
                b"00" => machine.push(at, Value::Bool(false)),
                b"01" => machine.push(at, Value::Bool(true)),
                digits => machine.push(at, decimal(at, digits)?),
            },
            b'L' => {
                let line = self.line()?;
                machine.push(at, decimal(at, line.strip_suffix(b"L").unwrap_or(line))?)
            }
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                machine.push(at, Value::Int(number.into()))
            }
            b'K' => {
                let number = self.byte()?;
                machine.push(at, Value::Int(number.into()))
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                machine.push(at, Value::Int(number.into()))
            }
            0x8a => {
                let length = self.byte()?;
                self.long(at, length.into(), machine)
            }
            0x8b => {
                let length = u32::from_le_bytes(self.array()?);
                self.long(at, length as usize, machine)
            }
            b'F' => {
                let line = self.line()?;
                let number = str::from_utf8(line).ok().and_then(|t| t.parse().ok());
                let number = number.ok_or_else(|| refused(at, "FLOAT is no number"))?;
                machine.push(at, Value::Float(number))
            }
            b'G' => {
                let number = f64::from_be_bytes(self.array()?);
                machine.push(at, Value::Float(number))
            }

            b'S' => {
                let line = self.line()?;
                let text = unquoted(line).ok_or_else(|| refused(at, "STRING is not quoted"))?;
                machine.text(at, text)
            }
            b'U' => {
                let length = self.byte()?;
                let text = self.take(length.into())?;
                machine.text(at, text)
            }
            b'T' => {
                let length = u32::from_le_bytes(self.array()?);
                let text = self.take(length as usize)?;
                machine.text(at, text)
            }
            b'V' => {
                let text =
                    unescaped(self.line()?).ok_or_else(|| refused(at, "UNICODE is no text"))?;
                machine.push(at, Value::Text(text))
            }
            0x8c => {
                let length = self.byte()?;
                let text = self.take(length.into())?;
                machine.text(at, text)
            }
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                let text = self.take(length as usize)?;
                machine.text(at, text)
            }
            0x8d => {
                let length = u64::from_le_bytes(self.array()?);
                let text = self.take(usize::try_from(length).unwrap_or(usize::MAX))?;
                machine.text(at, text)
            }

            b']' => machine.push(at, Value::List(Vec::new())),
            b'l' => {
                let items = machine.pop_mark(at)?;
                machine.push(at, Value::List(items))
            }
            b'a' => {
                let item = machine.pop(at)?;
                machine.extend_list(at, vec![item])
            }
            b'e' => {
                let items = machine.pop_mark(at)?;
                machine.extend_list(at, items)
            }
            b')' => machine.push(at, Value::Tuple(Vec::new())),
            b't' => {
                let items = machine.pop_mark(at)?;
                machine.push(at, Value::Tuple(items))
            }
            0x85..=0x87 => {
                let mut items = Vec::new();
                for _ in 0x84..opcode {
                    items.insert(0, machine.pop(at)?);
                }
                machine.push(at, Value::Tuple(items))
            }
            b'}' => machine.push(at, Value::Dict(Vec::new())),
            b'd' => {
                let items = pairs(at, machine.pop_mark(at)?)?;
                machine.push(at, Value::Dict(items))
            }
            b's' => {
                let value = machine.pop(at)?;
                let key = machine.pop(at)?;
                machine.extend_dict(at, vec![(key, value)])
            }
            b'u' => {
                let items = pairs(at, machine.pop_mark(at)?)?;
                machine.extend_dict(at, items)
            }

            b'p' => {
                let index = decimal_index(at, self.line()?)?;
                machine.put(at, index)
            }
            b'q' => {
                let index = self.byte()?;
                machine.put(at, index.into())
            }
            b'r' => {
                let index = u32::from_le_bytes(self.array()?);
                machine.put(at, index.into())
            }
            0x94 => machine.put(at, machine.memo.len() as u64),
            b'g' => {
                let index = decimal_index(at, self.line()?)?;
                machine.get(at, index)
            }
            b'h' => {
                let index = self.byte()?;
                machine.get(at, index.into())
            }
            b'j' => {
                let index = u32::from_le_bytes(self.array()?);
                machine.get(at, index.into())
            }
            other => Err(refused(at, &refusal(other))),
        }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], PlanError> {
        let rest = &self.bytes[self.at..];
        let taken = rest
            .get(..length)
            .ok_or_else(|| refused(self.bytes.len(), "the file ends in the middle of it"))?;
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], PlanError> {
        let taken = self.take(N)?;
        Ok(std::array::from_fn(|i| taken[i]))
    }

    fn byte(&mut self) -> Result<u8, PlanError> {
        self.array().map(|[byte]| byte)
    }

    /// Up to the next line break, which is skipped.
    fn line(&mut self) -> Result<&'a [u8], PlanError> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|&b| b == b'\n');
        let line = self.take(length.unwrap_or(usize::MAX))?;
        self.at += 1;
        Ok(line)
    }

    /// An integer in two's complement, least significant byte first.
    fn long(&mut self, at: usize, length: usize, machine: &mut Machine) -> Result<(), PlanError> {
        let bytes = self.take(length)?;
        if length > 16 {
            return Err(refused(at, "an integer of more than 128 bits"));
        }
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut number = [if negative { 0xff } else { 0 }; 16];
        number[..length].copy_from_slice(bytes);
        machine.push(at, Value::Int(i128::from_le_bytes(number)))
    }
}

/// What to say of an opcode that is not obeyed.
fn refusal(opcode: u8) -> String {
    let name = |opcodes: &[(u8, &'static str)]| {
        let found = opcodes.iter().find(|(code, _)| *code == opcode);
        found.map(|(_, name)| *name)
    };
    if let Some(name) = name(&CODE) {
        return format!(
            "opcode {name} would import or call code; a plan has only lists, dicts and strings, so this is none, and nothing was run"
        );
    }
    match name(&OTHER_TYPES) {
        Some(name) => {
            format!("opcode {name} makes bytes or a set; a plan has only lists, dicts and strings")
        }
        None => format!("unknown opcode 0x{opcode:02x}"),
    }
}

fn decimal(at: usize, digits: &[u8]) -> Result<Value, PlanError> {
    let number = str::from_utf8(digits).ok().and_then(|t| t.parse().ok());
    let number = number.ok_or_else(|| refused(at, "not an integer of at most 128 bits"))?;
    Ok(Value::Int(number))
}

fn decimal_index(at: usize, digits: &[u8]) -> Result<u64, PlanError> {
    let index = str::from_utf8(digits).ok().and_then(|t| t.parse().ok());
    index.ok_or_else(|| refused(at, "the memo's index is no number"))
}

/// Python 2's quoted strings, as far as nothing in them is escaped.
fn unquoted(line: &[u8]) -> Option<&[u8]> {
    let quote = line.first().filter(|q| matches!(q, b'"' | b'\''))?;
    let inner = line[1..].strip_suffix(&[*quote])?;
    (!inner.contains(&b'\\')).then_some(inner)
}

/// Latin-1 with `\uXXXX` and `\UXXXXXXXX`.
fn unescaped(line: &[u8]) -> Option<String> {
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

fn pairs(at: usize, items: Vec<Id>) -> Result<Vec<(Id, Id)>, PlanError> {
    match items.len() % 2 {
        0 => Ok(items
            .chunks_exact(2)
            .map(|pair| (pair[0], pair[1]))
            .collect()),
        _ => Err(refused(at, "a dict's key without a value")),
    }
}

#[derive(Default)]
struct Machine {
    values: Vec<Value>,
    stack: Vec<Id>,
    /// The stack's length at each MARK.
    marks: Vec<usize>,
    /// Indices are the file's and may be any, so this is no list.
    memo: HashMap<u64, Id>,
}

impl Machine {
    fn push(&mut self, at: usize, value: Value) -> Result<(), PlanError> {
        if self.values.len() >= MOST_VALUES {
            let what = format!("more than {MOST_VALUES} values; a plan has fewer");
            return Err(refused(at, &what));
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    fn text(&mut self, at: usize, bytes: &[u8]) -> Result<(), PlanError> {
        let text = str::from_utf8(bytes).map_err(|_| refused(at, "a string is not UTF-8"))?;
        self.push(at, Value::Text(text.to_owned()))
    }

    fn pop(&mut self, at: usize) -> Result<Id, PlanError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => Ok(self.stack.pop().expect("the stack is above its floor")),
            false => Err(refused(at, "the opcode needs a value, but there is none")),
        }
    }

    fn pop_mark(&mut self, at: usize) -> Result<Vec<Id>, PlanError> {
        let mark = self.marks.pop();
        let mark = mark.ok_or_else(|| refused(at, "the opcode needs a mark, but there is none"))?;
        Ok(self.stack.split_off(mark))
    }

    /// The value on top of the stack, which stays there.
    fn top(&self, at: usize) -> Result<Id, PlanError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = self.stack[floor..].last().copied();
        top.ok_or_else(|| refused(at, "the opcode needs a value, but there is none"))
    }

    fn extend_list(&mut self, at: usize, items: Vec<Id>) -> Result<(), PlanError> {
        let top = self.top(at)?;
        match &mut self.values[top] {
            Value::List(list) => {
                list.extend(items);
                Ok(())
            }
            _ => Err(refused(at, "items are appended to what is no list")),
        }
    }

    fn extend_dict(&mut self, at: usize, items: Vec<(Id, Id)>) -> Result<(), PlanError> {
        let top = self.top(at)?;
        match &mut self.values[top] {
            Value::Dict(dict) => {
                dict.extend(items);
                Ok(())
            }
            _ => Err(refused(at, "items are set in what is no dict")),
        }
    }

    fn put(&mut self, at: usize, index: u64) -> Result<(), PlanError> {
        let top = self.top(at)?;
        self.memo.insert(index, top);
        match self.memo.len() <= MOST_VALUES {
            true => Ok(()),
            false => {
                let what = format!("more than {MOST_VALUES} memo entries; a plan has fewer");
                Err(refused(at, &what))
            }
        }
    }

    fn get(&mut self, at: usize, index: u64) -> Result<(), PlanError> {
        let id = self.memo.get(&index).copied();
        let id = id.ok_or_else(|| refused(at, &format!("the memo has no entry {index}")))?;
        self.stack.push(id);
        Ok(())
    }
}

/// A pickle's result.
struct Object {
    values: Vec<Value>,
    root: Id,
}

impl Object {
    fn json(&self) -> Result<String, PlanError> {
        let mut text = String::new();
        self.write(self.root, 0, &mut text)?;
        Ok(text)
    }

    /// Writes what is shared as often as it is reached, so that depth and length need bounds.
    fn write(&self, id: Id, depth: usize, text: &mut String) -> Result<(), PlanError> {
        if depth > DEEPEST {
            let what = format!("nested more than {DEEPEST} deep, or in itself; a plan is not");
            return Err(refused(0, &what));
        }
        if text.len() > MAX_PLAN_BYTES {
            let what = format!("it amounts to more than {MAX_PLAN_BYTES} bytes; a plan does not");
            return Err(refused(0, &what));
        }
        match &self.values[id] {
            Value::None => text.push_str("null"),
            Value::Bool(value) => text.push_str(if *value { "true" } else { "false" }),
            // Writing to a String cannot fail.
            Value::Int(value) => drop(write!(text, "{value}")),
            Value::Float(value) if value.is_finite() => drop(write!(text, "{value:?}")),
            Value::Float(_) => return Err(refused(0, "it holds a float that is not finite")),
            Value::Text(value) => text.push_str(&serde_json::Value::from(&value[..]).to_string()),
            Value::List(items) | Value::Tuple(items) => {
                text.push('[');
                for (i, item) in items.iter().enumerate() {
                    // The list of blocks has one to a line, for the positions in messages.
                    text.push_str(match (i, depth) {
                        (0, _) => "",
                        (_, 0) => ",\n",
                        _ => ", ",
                    });
                    self.write(*item, depth + 1, text)?;
                }
                text.push(']');
            }
            Value::Dict(items) => {
                text.push('{');
                for (i, (key, value)) in items.iter().enumerate() {
                    text.push_str(if i == 0 { "" } else { ", " });
                    let Value::Text(_) = &self.values[*key] else {
                        return Err(refused(0, "a dict has a key that is no string"));
                    };
                    self.write(*key, depth + 1, text)?;
                    text.push_str(": ");
                    self.write(*value, depth + 1, text)?;
                }
                text.push('}');
            }
        }
        Ok(())
    }
}
