//! `--emit-triton-config`: where `config.pbtxt` goes, and what it says.

use super::args::{RequestInputsArg, RewriteArgs, StateArg};
use super::rewrite::refuse_existing;
use super::{Failure, write};
use crate::find::Survey;
use crate::onnx::ModelFile;
use crate::run::host::find_library;
use crate::triton::config;
use anyhow::anyhow;
use bytes::Bytes;
use std::path::{Path, PathBuf};

/// A configuration that is ready to be written.
pub struct Configuration {
    pub path: PathBuf,
    text: String,
}

/// What `args` ask for, if they do: nothing is written yet.
///
/// # Errors
/// Flags that contradict, a file that is in the way, a model that Triton cannot describe, an op library that is not found.
pub fn configuration(
    args: &RewriteArgs,
    model: &ModelFile,
    survey: &Survey,
    output: &Path,
) -> Result<Option<Configuration>, Failure> {
    let Some(named) = &args.emit_triton_config else {
        return Ok(None);
    };
    if args.state == StateArg::Io {
        return Err(Failure::Bad(anyhow!(
            "--emit-triton-config is for models that find their request by Triton's sequence controls, and --state io has none; leave out one of them"
        )));
    }
    if matches!(args.request_inputs, RequestInputsArg::Optional) {
        return Err(Failure::Bad(anyhow!(
            "--emit-triton-config needs --request-inputs required: Triton's ONNX Runtime backend refuses sequence controls that have a default; leave out --request-inputs optional"
        )));
    }
    let path = match named {
        Some(path) => path.clone(),
        None => beside(output),
    };
    refuse_existing(&path, args.force)?;
    let library = match &args.library {
        // It lies on the server, which may be another machine.
        Some(named) => named.clone(),
        None => find_library(None)?,
    };
    let name = output.file_name().unwrap_or_default().to_string_lossy();
    let text = config(
        &model.graph,
        &survey.facts,
        &name,
        &library.to_string_lossy(),
    );
    let text = text.map_err(|e| Failure::No(e.into()))?;
    Ok(Some(Configuration { path, text }))
}

impl Configuration {
    /// Writes it, and then `model`; without the one there is not the other.
    pub fn write_with(
        self,
        model: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<PathBuf, Failure> {
        write(&self.path, &[Bytes::from(self.text)])?;
        if let Err(failure) = model() {
            let _ = std::fs::remove_file(&self.path);
            return Err(failure);
        }
        Ok(self.path)
    }
}

/// Where Triton looks: in a repository (`NAME/1/model.onnx`) the folder above the version, else the model's own folder.
fn beside(output: &Path) -> PathBuf {
    let absolute = std::path::absolute(output).unwrap_or_else(|_| output.to_owned());
    let is_version = |folder: &Path| {
        let name = folder.file_name().and_then(|n| n.to_str()).unwrap_or("");
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit())
    };
    match (output.parent(), absolute.parent()) {
        (Some(folder), Some(version)) if is_version(version) => match folder.parent() {
            Some(above) => above.join("config.pbtxt"),
            None => Path::new("..").join("config.pbtxt"),
        },
        _ => output.with_file_name("config.pbtxt"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_goes_where_triton_looks() {
        let at = |output: &str| beside(Path::new(output)).to_str().unwrap().to_owned();
        assert_eq!(at("repo/dit/1/model.onnx"), "repo/dit/config.pbtxt");
        assert_eq!(at("/repo/dit/12/model.dfa.onnx"), "/repo/dit/config.pbtxt");
        assert_eq!(at("1/model.onnx"), "config.pbtxt");
        assert_eq!(at("out/model.dfa.onnx"), "out/config.pbtxt");
        assert_eq!(at("model.dfa.onnx"), "config.pbtxt");
    }
}
