//! Where tensors outside the file say they are, and whether that may be.
//!
//! Owns the one check of external-data locations: every tensor of the model, wherever it hides. Weights are never opened here,
//! but a rewritten model must not carry on a path that leads whoever loads it out of the model's folder.

use super::graph::{FIELD_INITIALIZER, FIELD_NODE, MAX_SUBGRAPH_DEPTH};
use super::wire::{self, Field};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::path::Path;

const MODEL_GRAPH: u32 = 7;
const MODEL_TRAINING_INFO: u32 = 20;
const MODEL_FUNCTIONS: u32 = 25;
const FUNCTION_NODE: u32 = 7;
const FUNCTION_ATTRIBUTE: u32 = 11;
const GRAPH_SPARSE_INITIALIZER: u32 = 15;
const NODE_ATTRIBUTE: u32 = 5;
const TENSOR_NAME: u32 = 8;
const TENSOR_EXTERNAL_DATA: u32 = 13;

/// Locations of external data, each with the name of a tensor that has it.
pub type Locations = BTreeMap<String, String>;

/// Whether weights may be reached through links.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Links {
    /// A symbolic link out of the model's folder, and a file with several names, are refused.
    #[default]
    Refused,
    Allowed,
}

/// The external data of a model, given its fields.
///
/// # Errors
/// A location that is no plain path below the model's folder, named with its tensor; messages that are nested too deep or do not
/// parse.
pub fn locations(model: &[Field]) -> Result<Locations, String> {
    let mut found = Locations::new();
    for (number, payload) in parts(model) {
        match number {
            MODEL_GRAPH => graph(payload, 0, &mut found)?,
            MODEL_TRAINING_INFO => {
                for (_, payload) in parts(&split(payload)?) {
                    // `initialization` and `algorithm` are graphs; the bindings have no tensors and no graphs either.
                    graph(payload, 0, &mut found)?;
                }
            }
            MODEL_FUNCTIONS => {
                for (number, payload) in parts(&split(payload)?) {
                    match number {
                        FUNCTION_NODE => node(payload, 0, &mut found)?,
                        FUNCTION_ATTRIBUTE => attribute(payload, 0, &mut found)?,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

/// Follows the locations to the files, without opening any. What is not there is not checked: a model may be rewritten without
/// its weights.
///
/// # Errors
/// Names the first tensor whose weights are reached through a link, or are no file.
pub fn refuse_links(model: &Path, locations: &Locations) -> Result<(), String> {
    let parent = |path: &Path| match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => Path::new(".").to_path_buf(),
    };
    let folder = parent(model);
    // A model that is itself a link (the cache of a model hub) may have its weights beside what it leads to.
    let homes: Vec<_> = [
        folder.canonicalize().ok(),
        model.canonicalize().ok().map(|real| parent(&real)),
    ]
    .into_iter()
    .flatten()
    .collect();
    for (location, tensor) in locations {
        let Ok(real) = folder.join(location).canonicalize() else {
            continue;
        };
        let refuse = |what: &str| {
            Err(format!(
                "the weights of the tensor `{}` are in `{}`, which {what}; copy the file into the model's folder, or pass --allow-linked-weights if it is yours",
                shown(tensor),
                shown(location)
            ))
        };
        if !homes.iter().any(|home| real.starts_with(home)) {
            return refuse("is a link that leads out of the model's folder");
        }
        let Ok(about) = real.metadata() else {
            continue;
        };
        if !about.is_file() {
            return refuse("is no file");
        }
        #[cfg(unix)]
        if std::os::unix::fs::MetadataExt::nlink(&about) > 1 {
            return refuse("has other names elsewhere (hard links)");
        }
    }
    Ok(())
}

fn split(message: &Bytes) -> Result<Vec<Field>, String> {
    wire::split(message).map_err(|e| e.to_string())
}

fn parts(fields: &[Field]) -> impl Iterator<Item = (u32, &Bytes)> {
    fields
        .iter()
        .filter_map(|f| Some((f.number, f.payload.as_ref()?)))
}

fn graph(message: &Bytes, depth: usize, found: &mut Locations) -> Result<(), String> {
    if depth > MAX_SUBGRAPH_DEPTH {
        return Err(format!(
            "subgraphs are nested more than {MAX_SUBGRAPH_DEPTH} deep"
        ));
    }
    for (number, payload) in parts(&split(message)?) {
        match number {
            FIELD_NODE => node(payload, depth, found)?,
            FIELD_INITIALIZER => tensor(payload, found)?,
            GRAPH_SPARSE_INITIALIZER => sparse(payload, found)?,
            _ => {}
        }
    }
    Ok(())
}

fn node(message: &Bytes, depth: usize, found: &mut Locations) -> Result<(), String> {
    for (number, payload) in parts(&split(message)?) {
        if number == NODE_ATTRIBUTE {
            attribute(payload, depth, found)?;
        }
    }
    Ok(())
}

fn attribute(message: &Bytes, depth: usize, found: &mut Locations) -> Result<(), String> {
    for (number, payload) in parts(&split(message)?) {
        match number {
            // t, tensors
            5 | 10 => tensor(payload, found)?,
            // g, graphs
            6 | 11 => graph(payload, depth + 1, found)?,
            // sparse_tensor, sparse_tensors
            22 | 23 => sparse(payload, found)?,
            _ => {}
        }
    }
    Ok(())
}

fn sparse(message: &Bytes, found: &mut Locations) -> Result<(), String> {
    for (number, payload) in parts(&split(message)?) {
        // values, indices
        if number == 1 || number == 2 {
            tensor(payload, found)?;
        }
    }
    Ok(())
}

fn tensor(message: &Bytes, found: &mut Locations) -> Result<(), String> {
    let fields = split(message)?;
    let text = |wanted: u32| {
        let last = parts(&fields).filter(|&(n, _)| n == wanted).last();
        last.map_or(String::new(), |(_, p)| {
            String::from_utf8_lossy(p).into_owned()
        })
    };
    let mut location = None;
    for (_, entry) in parts(&fields).filter(|&(n, _)| n == TENSOR_EXTERNAL_DATA) {
        let entry = split(entry)?;
        let of = |wanted: u32| {
            let last = parts(&entry).filter(|&(n, _)| n == wanted).last();
            last.map_or(&b""[..], |(_, p)| &p[..])
        };
        if of(1) != b"location" {
            continue;
        }
        let value = String::from_utf8_lossy(of(2)).into_owned();
        let refuse = |what: &str| {
            Err(format!(
                "the tensor `{}` says its weights are in `{}`, {what}; expected a file below the model's folder",
                shown(&text(TENSOR_NAME)),
                shown(&value)
            ))
        };
        if let Some(what) = escapes(&value) {
            return refuse(what);
        }
        if location.as_ref().is_some_and(|known| *known != value) {
            return refuse("and elsewhere too");
        }
        location = Some(value);
    }
    if let Some(location) = location {
        found.entry(location).or_insert_with(|| text(TENSOR_NAME));
    }
    Ok(())
}

/// What is wrong with a location, if anything. The rules hold on every system: a model travels.
fn escapes(location: &str) -> Option<&'static str> {
    let drive = location.as_bytes().get(1) == Some(&b':');
    let mut components = location.split(['/', '\\']);
    if location.is_empty() {
        Some("which is no name")
    } else if location.contains('\0') {
        Some("which has a NUL in it")
    } else if location.starts_with(['/', '\\']) || drive {
        Some("an absolute path")
    } else if location.starts_with("*/") {
        Some("an address in memory")
    } else if components.any(|c| c == "..") {
        Some("which leads upwards")
    } else {
        None
    }
}

/// A name from the file, fit for a terminal: short, and without control characters.
fn shown(name: &str) -> String {
    let short: String = name.chars().take(80).collect();
    let more = if short.len() < name.len() { "…" } else { "" };
    format!("{}{more}", short.escape_default())
}

#[cfg(test)]
mod tests {
    use super::escapes;

    #[test]
    fn plain_paths_pass_and_others_do_not() {
        for fine in ["weights.bin", "a/b.bin", "..weights", "a..b/c", "*.data"] {
            assert_eq!(escapes(fine), None, "{fine}");
        }
        for bad in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a/..",
            "..\\x",
            "\\\\host\\x",
            "C:\\x",
            "c:x",
            "a\0b",
            "*/_ORT_MEM_ADDR_/*",
        ] {
            assert!(escapes(bad).is_some(), "{bad:?}");
        }
    }
}
