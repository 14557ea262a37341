//! The stack machine that a pickle drives, and the values that it makes.

use std::collections::HashMap;

use super::refused;
use crate::PlanError;

/// More values than any plan needs: what is shared counts once. The memo has no more entries.
const MOST_VALUES: usize = 1 << 20;
/// A value's index.
pub(super) type Id = usize;

#[derive(Debug)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Id>),
    Tuple(Vec<Id>),
    Dict(Vec<(Id, Id)>),
}

#[derive(Default)]
pub(super) struct Machine {
    pub(super) values: Vec<Value>,
    pub(super) stack: Vec<Id>,
    /// The stack's length at each MARK.
    pub(super) marks: Vec<usize>,
    /// Indices are the file's and may be any, so this is no list.
    pub(super) memo: HashMap<u64, Id>,
}

impl Machine {
    pub(super) fn push(&mut self, at: usize, value: Value) -> Result<(), PlanError> {
        if self.values.len() >= MOST_VALUES {
            let what = format!("more than {MOST_VALUES} values; a plan has fewer");
            return Err(refused(at, &what));
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    pub(super) fn text(&mut self, at: usize, bytes: &[u8]) -> Result<(), PlanError> {
        let text = str::from_utf8(bytes).map_err(|_| refused(at, "a string is not UTF-8"))?;
        self.push(at, Value::Text(text.to_owned()))
    }

    pub(super) fn pop(&mut self, at: usize) -> Result<Id, PlanError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > floor {
            true => Ok(self.stack.pop().expect("the stack is above its floor")),
            false => Err(refused(at, "the opcode needs a value, but there is none")),
        }
    }

    pub(super) fn pop_mark(&mut self, at: usize) -> Result<Vec<Id>, PlanError> {
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

    pub(super) fn extend_list(&mut self, at: usize, items: Vec<Id>) -> Result<(), PlanError> {
        let top = self.top(at)?;
        match &mut self.values[top] {
            Value::List(list) => {
                list.extend(items);
                Ok(())
            }
            _ => Err(refused(at, "items are appended to what is no list")),
        }
    }

    pub(super) fn extend_dict(&mut self, at: usize, items: Vec<(Id, Id)>) -> Result<(), PlanError> {
        let top = self.top(at)?;
        match &mut self.values[top] {
            Value::Dict(dict) => {
                dict.extend(items);
                Ok(())
            }
            _ => Err(refused(at, "items are set in what is no dict")),
        }
    }

    pub(super) fn put(&mut self, at: usize, index: u64) -> Result<(), PlanError> {
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

    pub(super) fn get(&mut self, at: usize, index: u64) -> Result<(), PlanError> {
        let id = self.memo.get(&index).copied();
        let id = id.ok_or_else(|| refused(at, &format!("the memo has no entry {index}")))?;
        self.stack.push(id);
        Ok(())
    }
}
