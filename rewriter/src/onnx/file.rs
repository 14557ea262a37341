//! A model file: read whole, edited field by field, written through a temporary file.
//!
//! Owns `ModelProto` and the file system side. Weights stored outside the file are never opened.

use super::external::{self, Links, Locations};
use super::functions;
use super::graph::{FIELD_NODE, Graph, GraphEdit};
use super::proto::{OperatorSetIdProto, StringStringEntryProto};
use super::walk;
use super::wire::{self, Field};
use bytes::Bytes;
use prost::Message;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

const FIELD_IR_VERSION: u32 = 1;
const FIELD_PRODUCER: u32 = 2;
pub(super) const FIELD_GRAPH: u32 = functions::MODEL_GRAPH;
const FIELD_OPSET_IMPORT: u32 = 8;
const FIELD_METADATA: u32 = 14;
const FIELD_FUNCTIONS: u32 = functions::MODEL_FUNCTIONS;

/// Why a file could not be read as an ONNX model.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("cannot read the model {}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{} is not an ONNX model: {what}; expected a ModelProto as written by onnx.save or an exporter", path.display())]
    Malformed { path: PathBuf, what: String },
    #[error("the model {} is refused: {what}", path.display())]
    Refused { path: PathBuf, what: String },
}

/// The largest message that protobuf, and so any reader of ONNX, can handle.
const MAX_MODEL_BYTES: u64 = i32::MAX as u64;

/// Why a model could not be written. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}", path.display())]
pub struct WriteError {
    pub path: PathBuf,
    pub source: std::io::Error,
}

/// A model as it lies on disk, with its main graph opened up.
pub struct ModelFile {
    pub path: PathBuf,
    /// Size of the file in bytes, external data not included.
    pub size: usize,
    pub graph: Graph,
    pub ir_version: i64,
    /// Name and version of the program that wrote the file, as far as it says.
    pub producer: String,
    /// `(domain, version)`; the ONNX domain is the empty string.
    pub opset_imports: Vec<(String, i64)>,
    /// The model's own key/value metadata.
    pub metadata: Vec<(String, String)>,
    /// Whether calls of model-local functions were replaced: then the model is no longer what the file says, byte for byte.
    pub inlined: bool,
    external: Locations,
    fields: Vec<Field>,
}

impl ModelFile {
    /// Reads `path`. Weights outside the file must not be reached through links.
    ///
    /// # Errors
    /// As [`ModelFile::open_with`].
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        Self::open_with(path, Links::Refused)
    }

    /// Reads `path`; `links` says whether weights outside the file may be reached through links.
    ///
    /// # Errors
    /// I/O failures, files above 2 GiB, anything that is not a `ModelProto` with a graph, weights outside the model's folder.
    pub fn open_with(path: &Path, links: Links) -> Result<Self, ReadError> {
        let io = |source| ReadError::Io {
            path: path.into(),
            source,
        };
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path).map_err(io)?;
        let about = file.metadata().map_err(io)?;
        let too_large = || ReadError::Malformed {
            path: path.into(),
            what: "it has more than 2 GiB, the most that a protobuf message can have".into(),
        };
        if about.is_file() {
            if about.len() > MAX_MODEL_BYTES {
                return Err(too_large());
            }
            let size = usize::try_from(about.len()).unwrap_or(usize::MAX);
            let room = bytes.try_reserve_exact(size);
            room.map_err(|_| io(std::io::ErrorKind::OutOfMemory.into()))?;
        }
        // What is no file does not say how long it is, and a file may grow.
        let mut bounded = file.take(MAX_MODEL_BYTES + 1);
        bounded.read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_MODEL_BYTES {
            return Err(too_large());
        }
        let model = Self::parse(path, bytes.into())?;
        if links == Links::Refused {
            external::refuse_links(path, &model.external).map_err(|what| ReadError::Refused {
                path: path.into(),
                what,
            })?;
        }
        Ok(model)
    }

    /// Where the file lies, and weights outside of it are looked for.
    pub fn folder(&self) -> &Path {
        match self.path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        }
    }

    /// Parses the bytes of a model; `path` is only remembered.
    ///
    /// # Errors
    /// Anything that is not a `ModelProto` with a graph, and locations of weights outside the model's folder.
    pub fn parse(path: &Path, bytes: Bytes) -> Result<Self, ReadError> {
        let malformed = |what: String| ReadError::Malformed {
            path: path.into(),
            what,
        };
        if bytes.is_empty() {
            return Err(malformed("the file is empty".into()));
        }
        let size = bytes.len();
        let fields = wire::split(&bytes).map_err(|e| malformed(e.to_string()))?;
        let mut graphs = fields.iter().filter_map(|f| f.message(FIELD_GRAPH));
        let graph = graphs
            .next()
            .ok_or_else(|| malformed("it has no graph (field 7)".into()))?;
        if graphs.next().is_some() {
            return Err(malformed("it has more than one graph (field 7)".into()));
        }
        let refused = |what: String| ReadError::Refused {
            path: path.into(),
            what,
        };
        let without_calls = functions::inline(&fields).map_err(refused)?;
        let inlined = without_calls.is_some();
        let graph = graph.clone();
        let fields = without_calls.unwrap_or(fields);
        let graph = fields
            .iter()
            .find_map(|f| f.message(FIELD_GRAPH))
            .unwrap_or(&graph);
        let mut graph = Graph::parse(graph).map_err(malformed)?;
        let payloads = |number: u32| {
            fields
                .iter()
                .filter_map(move |f| f.message(number).cloned())
        };
        let opset_imports = payloads(FIELD_OPSET_IMPORT)
            .map(|p| OperatorSetIdProto::decode(p).map(|o| (o.domain, o.version)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| malformed(format!("bad opset_import: {e}")))?;
        graph.opset = onnx_version(&opset_imports);
        let metadata = payloads(FIELD_METADATA)
            .map(|p| StringStringEntryProto::decode(p).map(|e| (e.key, e.value)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| malformed(format!("bad metadata_props: {e}")))?;
        let ir_version = fields
            .iter()
            .find(|f| f.number == FIELD_IR_VERSION)
            .and_then(|f| f.varint)
            .and_then(|v| i64::try_from(v).ok())
            .unwrap_or(0);
        let producer = payloads(FIELD_PRODUCER)
            .chain(payloads(FIELD_PRODUCER + 1))
            .map(|p| String::from_utf8_lossy(&p).into_owned())
            .collect::<Vec<_>>()
            .join(" ");
        let external = external::locations(&fields).map_err(refused)?;
        Ok(Self {
            path: path.into(),
            size,
            graph,
            ir_version,
            producer,
            opset_imports,
            metadata,
            inlined,
            external,
            fields,
        })
    }

    pub(super) fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// Whether any node is of `domain`: in the graph, in a subgraph or in a function.
    pub fn has_node_of(&self, domain: &str) -> bool {
        let other = &mut |node: &[Field]| walk::text(node, walk::NODE_DOMAIN) != domain;
        let all_other = self.fields.iter().all(|field| {
            let parts = field
                .message(FIELD_GRAPH)
                .map(|graph| (graph, FIELD_NODE))
                .or_else(|| {
                    let function = field.message(FIELD_FUNCTIONS)?;
                    Some((function, walk::FUNCTION_NODE))
                });
            // What cannot be read is no node.
            parts.is_none_or(|(part, number)| walk::nodes(part, number, 0, other).unwrap_or(true))
        });
        !all_other
    }

    /// The opset version of the ONNX domain, 0 if it is not imported.
    pub fn onnx_opset(&self) -> i64 {
        self.graph.opset
    }

    /// File names (as written in the model) of the external data its tensors refer to.
    pub fn external_data_locations(&self) -> BTreeSet<String> {
        self.external.keys().cloned().collect()
    }

    /// The serialized model with `edit` applied to its graph, as pieces to be written in order. Fields the edit does not
    /// touch keep their exact bytes.
    pub fn serialize(
        &self,
        edit: &GraphEdit,
        opset_import: Option<(&str, i64)>,
        metadata: &[(String, String)],
    ) -> Vec<Bytes> {
        let mut pieces = Vec::new();
        let mut opset_import = opset_import;
        for field in &self.fields {
            if let Some(import) = field.message(FIELD_OPSET_IMPORT)
                && let Some((domain, version)) = opset_import
                && let Ok(import) = OperatorSetIdProto::decode(import.clone())
                && import.domain == domain
            {
                // A domain is imported once. Another version of it than that of the nodes that are added goes.
                if import.version != version {
                    continue;
                }
                opset_import = None;
            }
            let Some(before) = field.message(FIELD_GRAPH) else {
                pieces.push(field.raw.clone());
                continue;
            };
            let graph = self.graph.serialize(edit);
            let length = graph.iter().map(Bytes::len).sum();
            // There are longer ways to write the same length, which is then untouched like everything else.
            pieces.push(match length == before.len() {
                true => field.header(),
                false => wire::header(FIELD_GRAPH, length).into(),
            });
            pieces.extend(graph);
        }
        if let Some((domain, version)) = opset_import {
            let message = OperatorSetIdProto {
                domain: domain.into(),
                version,
            }
            .encode_to_vec();
            pieces.push(wire::header(FIELD_OPSET_IMPORT, message.len()).into());
            pieces.push(message.into());
        }
        for (key, value) in metadata {
            let message = StringStringEntryProto {
                key: key.clone(),
                value: value.clone(),
            }
            .encode_to_vec();
            pieces.push(wire::header(FIELD_METADATA, message.len()).into());
            pieces.push(message.into());
        }
        pieces
    }
}

/// Bytes written between two looks at whether to go on.
const CHUNK: usize = 8 << 20;

/// Writes `pieces` to `path` through a temporary file in the same folder: written, synced, renamed.
/// A failed write, or one that `interrupted` stops, leaves `path` as it was and no temporary file
/// behind.
///
/// # Errors
/// Any I/O failure, naming `path`.
pub fn write_atomically(
    path: &Path,
    pieces: &[Bytes],
    interrupted: &dyn Fn() -> bool,
) -> Result<(), WriteError> {
    // The temporary file's own name in a message would only puzzle.
    let fail = |source: std::io::Error| WriteError {
        path: path.into(),
        source: source.kind().into(),
    };
    let folder = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    remove_leftovers(folder);
    let mut file = temporary(folder).map_err(fail)?;
    for chunk in pieces.iter().flat_map(|p| p.chunks(CHUNK)) {
        if interrupted() {
            return Err(fail(std::io::ErrorKind::Interrupted.into()));
        }
        file.write_all(chunk).map_err(fail)?;
    }
    file.as_file().sync_all().map_err(fail)?;
    if interrupted() {
        return Err(fail(std::io::ErrorKind::Interrupted.into()));
    }
    file.persist(path).map_err(|e| fail(e.error))?;
    // The rename itself is durable once the folder is synced; a file system that cannot sync
    // folders is not an error.
    if let Ok(folder) = std::fs::File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

const TEMPORARY: (&str, &str) = (".dfa-rewrite-", ".tmp");

/// A temporary file in `folder`, locked for as long as it is being written, so that [`remove_leftovers`] can tell it from one whose
/// writer was killed.
fn temporary(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(TEMPORARY.0).suffix(TEMPORARY.1);
    // A temporary file is private by default; the finished model gets what any new file of this
    // user would get.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    loop {
        let file = builder.tempfile_in(folder)?;
        // Where files cannot be locked nothing is ever taken for a leftover.
        let locked = file.as_file().lock().is_ok();
        // Another run may have come between the two.
        if !locked || file.path().exists() {
            return Ok(file);
        }
    }
}

/// Removes the temporary files of runs that were killed.
fn remove_leftovers(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let ours = name.starts_with(TEMPORARY.0) && name.ends_with(TEMPORARY.1);
        if !ours || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            continue;
        }
        // The lock of a process goes with it.
        if let Ok(file) = std::fs::File::open(entry.path())
            && file.try_lock().is_ok()
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn onnx_version(imports: &[(String, i64)]) -> i64 {
    imports
        .iter()
        .find(|(domain, _)| domain.is_empty() || domain == "ai.onnx")
        .map_or(0, |&(_, version)| version)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A graph of one node with an operator, between numbers that have the fields of a graph's nodes.
    fn graph() -> Vec<u8> {
        let node = [&wire::header(4, 4)[..], b"Relu"].concat();
        let stray = [0x08, 0x01];
        [&stray, &wire::header(1, node.len())[..], &node, &stray].concat()
    }

    #[test]
    fn fields_that_are_no_graph_and_no_node_are_kept_and_lengths_as_they_were_written() {
        let graph = graph();
        let size = u8::try_from(graph.len()).unwrap();
        // Numbers in the field of the graph, of which protobuf reads none, around a length of three bytes.
        let (stray, key) = ([0x38, 0x02], [0x3a, 0x80 | size, 0x80, 0x00]);
        let bytes = [&stray, &key[..], &graph, &stray].concat();
        let model = ModelFile::parse(Path::new("model.onnx"), bytes.clone().into()).unwrap();
        assert_eq!(model.graph.nodes.len(), 1);
        let unchanged = model.serialize(&GraphEdit::default(), None, &[]);
        assert_eq!(unchanged.concat(), bytes);

        let twice = GraphEdit {
            nodes: Some(vec![model.graph.nodes[0].raw.clone(); 2]),
            ..GraphEdit::default()
        };
        let changed = model.serialize(&twice, None, &[]).concat();
        assert!(changed.starts_with(&stray) && changed.ends_with(&stray));
        let again = ModelFile::parse(Path::new("model.onnx"), changed.into()).unwrap();
        assert_eq!(again.graph.nodes.len(), 2);
        let numbers = again.graph.fields().iter().filter(|f| f.varint.is_some());
        assert_eq!(numbers.count(), 2);
    }

    #[test]
    fn a_node_of_a_domain_counts_wherever_it_is_and_an_import_does_not() {
        let model = |more: &str| {
            let around = "opset 17\nopset ai.ditfastattn 1\ninput x float [4]\noutput y float [4]";
            super::super::testing::model(&format!("{more}\n{around}\ny = Abs(x)"))
        };
        let inside = "graph g\nr = ai.ditfastattn::Step(x)\noutput r\nend";
        let function = "function my F (a) (r)\nr = ai.ditfastattn::Step(a)\nend";
        assert!(!model("").has_node_of("ai.ditfastattn"));
        assert!(!model(inside).has_node_of("ai.ditfastattn"));
        for more in [
            "z = ai.ditfastattn::Step(x)",
            &format!("{inside}\nz = If(x) then_branch=@g"),
            function,
        ] {
            assert!(model(more).has_node_of("ai.ditfastattn"), "{more}");
        }
    }

    #[test]
    fn a_domain_is_imported_once_and_in_the_version_that_is_asked_for() {
        for version in [1, 9] {
            let text = format!(
                "opset 17\nopset dom {version}\ninput x float [4]\ny = Abs(x)\noutput y float [4]"
            );
            let written = super::super::testing::model(&text).serialize(
                &GraphEdit::default(),
                Some(("dom", 1)),
                &[],
            );
            let again = ModelFile::parse(Path::new("m"), written.concat().into()).unwrap();
            let imports: Vec<_> = again
                .opset_imports
                .iter()
                .filter(|(d, _)| d == "dom")
                .collect();
            assert_eq!(imports, [&("dom".to_owned(), 1)]);
        }
    }

    #[test]
    fn an_interrupted_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        std::fs::write(&path, b"old").unwrap();
        let error = write_atomically(&path, &[Bytes::from_static(b"new")], &|| true).unwrap_err();
        assert_eq!(error.source.kind(), std::io::ErrorKind::Interrupted);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_run_left_goes_with_the_next_and_a_run_at_work_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join(".dfa-rewrite-left.tmp");
        std::fs::write(&left, b"half").unwrap();
        let at_work = temporary(folder.path()).unwrap();
        let path = folder.path().join("model.onnx");
        write_atomically(&path, &[Bytes::from_static(b"new")], &|| false).unwrap();
        assert!(!left.exists());
        assert!(at_work.path().exists());
    }
}
