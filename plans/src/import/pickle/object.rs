//! The result of a pickle, as JSON.

use std::fmt::Write;

use super::machine::{Id, Value};
use super::refused;
use crate::PlanError;
use crate::parse::MAX_PLAN_BYTES;

/// A plan's are three deep.
const DEEPEST: usize = 16;

/// A pickle's result.
pub(super) struct Object {
    pub(super) values: Vec<Value>,
    pub(super) root: Id,
}

impl Object {
    pub(super) fn json(&self) -> Result<String, PlanError> {
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
