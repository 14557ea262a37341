//! A model file: read whole, edited field by field, written through a temporary file.
//!
//! Owns `ModelProto` and the file system side. Weights stored outside the file are never opened.

use super::graph::{Graph, GraphEdit};
use super::proto::{OperatorSetIdProto, StringStringEntryProto, TensorProto};
use super::wire::{self, Field};
use bytes::Bytes;
use prost::Message;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

const FIELD_IR_VERSION: u32 = 1;
const FIELD_PRODUCER: u32 = 2;
pub(super) const FIELD_GRAPH: u32 = 7;
const FIELD_OPSET_IMPORT: u32 = 8;
const FIELD_METADATA: u32 = 14;
const FIELD_FUNCTIONS: u32 = 25;

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
}

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
    /// Number of model-local functions.
    pub functions: usize,
    fields: Vec<Field>,
}

impl ModelFile {
    /// Reads `path`.
    ///
    /// # Errors
    /// I/O failures and anything that is not a `ModelProto` with a graph.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        let bytes = std::fs::read(path).map_err(|source| ReadError::Io {
            path: path.into(),
            source,
        })?;
        Self::parse(path, bytes.into())
    }

    /// Parses the bytes of a model; `path` is only remembered.
    ///
    /// # Errors
    /// Anything that is not a `ModelProto` with a graph.
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
        let mut graphs = fields
            .iter()
            .filter(|f| f.number == FIELD_GRAPH)
            .filter_map(|f| f.payload.clone());
        let graph = graphs
            .next()
            .ok_or_else(|| malformed("it has no graph (field 7)".into()))?;
        if graphs.next().is_some() {
            return Err(malformed("it has more than one graph (field 7)".into()));
        }
        let mut graph = Graph::parse(&graph).map_err(malformed)?;
        let payloads = |number: u32| {
            fields
                .iter()
                .filter(move |f| f.number == number)
                .filter_map(|f| f.payload.clone())
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
        let functions = payloads(FIELD_FUNCTIONS).count();
        Ok(Self {
            path: path.into(),
            size,
            graph,
            ir_version,
            producer,
            opset_imports,
            metadata,
            functions,
            fields,
        })
    }

    pub(super) fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// The opset version of the ONNX domain, 0 if it is not imported.
    pub fn onnx_opset(&self) -> i64 {
        self.graph.opset
    }

    /// File names (as written in the model) of the external data its initializers refer to.
    pub fn external_data_locations(&self) -> BTreeSet<String> {
        self.graph
            .initializer_payloads()
            .filter_map(|p| TensorProto::decode(p).ok())
            .filter(|t| t.data_location == 1)
            .flat_map(|t| {
                t.external_data
                    .into_iter()
                    .filter(|e| e.key == "location")
                    .map(|e| e.value)
            })
            .collect()
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
        for field in &self.fields {
            if field.number == FIELD_GRAPH {
                let graph = self.graph.serialize(edit);
                let length = graph.iter().map(Bytes::len).sum();
                pieces.push(wire::header(FIELD_GRAPH, length).into());
                pieces.extend(graph);
            } else {
                pieces.push(field.raw.clone());
            }
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
    let mut builder = tempfile::Builder::new();
    builder.prefix(".dfa-rewrite-").suffix(".tmp");
    // A temporary file is private by default; the finished model gets what any new file of this
    // user would get.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder).map_err(fail)?;
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

fn onnx_version(imports: &[(String, i64)]) -> i64 {
    imports
        .iter()
        .find(|(domain, _)| domain.is_empty() || domain == "ai.onnx")
        .map_or(0, |&(_, version)| version)
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
