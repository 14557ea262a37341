//! Python pickles that hold nothing but plain data, read without running anything.
//!
//! A pickle is a program for a small stack machine. Of its opcodes (protocols 0 to 5) those that
//! make `None`, booleans, numbers, strings, lists, tuples and dicts are obeyed; one that would
//! import or call something ends the reading. Values live in one list and refer to each other by
//! index, as a pickle's memo may share them and make them contain themselves.

mod machine;
mod object;
mod opcodes;
mod text;

use crate::{PlanError, PlanErrorKind};
use machine::{Id, Machine, Value};
use object::Object;
use opcodes::refusal;
use text::{decimal, decimal_index, unescaped, unquoted};

/// What `torch.save` of before 1.6 begins with.
const LEGACY_MAGIC: i128 = 0x1950_a86a_20f9_469c_fc6c;

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

    /// One opcode; here those of the stack itself.
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
            _ => self.constant_or_number(opcode, at, machine),
        }
    }

    /// Opcodes that put None, a truth value or a number on the stack.
    fn constant_or_number(
        &mut self,
        opcode: u8,
        at: usize,
        machine: &mut Machine,
    ) -> Result<(), PlanError> {
        match opcode {
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
            _ => self.string(opcode, at, machine),
        }
    }

    /// Opcodes that put a string on the stack.
    fn string(&mut self, opcode: u8, at: usize, machine: &mut Machine) -> Result<(), PlanError> {
        match opcode {
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
            _ => self.container(opcode, at, machine),
        }
    }

    /// Opcodes that make lists, tuples and dicts, or add to them.
    fn container(&mut self, opcode: u8, at: usize, machine: &mut Machine) -> Result<(), PlanError> {
        match opcode {
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
            _ => self.memo(opcode, at, machine),
        }
    }

    /// Opcodes that remember the top of the stack, and put it there again; any other is refused.
    fn memo(&mut self, opcode: u8, at: usize, machine: &mut Machine) -> Result<(), PlanError> {
        match opcode {
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

fn pairs(at: usize, items: Vec<Id>) -> Result<Vec<(Id, Id)>, PlanError> {
    match items.len() % 2 {
        0 => Ok(items
            .chunks_exact(2)
            .map(|pair| (pair[0], pair[1]))
            .collect()),
        _ => Err(refused(at, "a dict's key without a value")),
    }
}
