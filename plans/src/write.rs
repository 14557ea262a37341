//! From a [`Plan`] to its file. Canonical: equal plans give equal text.
//!
//! Nothing is checked here: a plan that `parse` would refuse is written as it is.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

use crate::Plan;
use crate::parse::{FORMAT, VERSION};

impl Plan {
    /// The plan as one line of JSON. Canonical, and `Plan::parse(&plan.to_json())` is `plan`.
    pub fn to_json(&self) -> String {
        let members = self.members("").into_iter();
        let members: Vec<String> = members
            .map(|(key, value)| format!("\"{key}\":{value}"))
            .collect();
        format!("{{{}}}", members.join(","))
    }

    /// The plan as JSON for people: one line per member and per step, with a final newline.
    pub fn to_json_pretty(&self) -> String {
        let mut members = self.members(" ");
        if let Some((_, steps)) = members.last_mut() {
            let rows: Vec<String> = self
                .steps
                .iter()
                .map(|row| format!("    {}", json(row, " ")))
                .collect();
            *steps = format!("[\n{}\n  ]", rows.join(",\n"));
        }
        let members: Vec<String> = members
            .into_iter()
            .map(|(key, value)| format!("  \"{key}\": {value}"))
            .collect();
        format!("{{\n{}\n}}\n", members.join(",\n"))
    }

    /// Keys and values in the order of the file, `steps` last. Defaults that carry meaning
    /// (`window`, `cfg`) are written out, absent options are not.
    fn members(&self, space: &'static str) -> Vec<(&'static str, String)> {
        let members = [
            ("format", Some(json(FORMAT, space))),
            ("version", Some(json(&VERSION, space))),
            ("name", self.name.as_ref().map(|v| json(v, space))),
            ("delta", self.delta.as_ref().map(|v| json(v, space))),
            ("window", Some(json(&self.window, space))),
            ("cfg", Some(json(&self.cfg, space))),
            ("timesteps", self.timesteps.as_ref().map(|v| json(v, space))),
            ("text", self.text.as_ref().map(|v| json(v, space))),
            ("model", self.model.as_ref().map(|v| json(v, space))),
            ("steps", Some(json(&self.steps, space))),
        ];
        members
            .into_iter()
            .filter_map(|(key, value)| Some((key, value?)))
            .collect()
    }
}

/// One line of JSON with `space` after every comma and colon. Non-finite numbers become `null`.
fn json<T: Serialize + ?Sized>(value: &T, space: &'static str) -> String {
    let mut bytes = Vec::new();
    let written = value.serialize(&mut Serializer::with_formatter(&mut bytes, Spaced(space)));
    // Writing to memory cannot fail, and no map here has keys that are not strings.
    written.expect("plan members are plain data");
    String::from_utf8(bytes).expect("serde_json writes UTF-8")
}

struct Spaced(&'static str);

impl Spaced {
    fn separate<W: Write + ?Sized>(&self, writer: &mut W, first: bool) -> io::Result<()> {
        if first {
            Ok(())
        } else {
            write!(writer, ",{}", self.0)
        }
    }
}

impl Formatter for Spaced {
    fn begin_array_value<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.separate(writer, first)
    }

    fn begin_object_key<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.separate(writer, first)
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        write!(writer, ":{}", self.0)
    }
}
