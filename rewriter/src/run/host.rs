//! ONNX Runtime and the op library: where they are, and sessions with both.

use ort::environment::{Environment, GlobalThreadPoolOptions};
use ort::ep::{CUDA, ExecutionProviderDispatch};
use ort::session::Session;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The first ONNX Runtime that loads a model from memory whose weights are in files beside it.
const WEIGHTS_BESIDE_MEMORY: (u32, u32) = (1, 19);

const LIBRARY: &str = "libditfastattn.so";

/// Why ONNX Runtime or the op library cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(
        "no ONNX Runtime: expected --onnxruntime PATH or ORT_DYLIB_PATH to name libonnxruntime.so or a folder with it (the onnxruntime wheel has it in onnxruntime/capi), and `python3 -c \"import onnxruntime\"` finds none"
    )]
    NoRuntime,
    #[error("no ONNX Runtime in {}: expected libonnxruntime.so or a folder with it (the onnxruntime wheel has it in onnxruntime/capi)", .0.display())]
    NoRuntimeIn(PathBuf),
    #[error("no libonnxruntime.so in {}, which `python3 -c \"import onnxruntime\"` finds: wheels of onnxruntime have it from 1.19 on; install a newer one, or name a library with --onnxruntime PATH or ORT_DYLIB_PATH", .0.display())]
    NoRuntimeInPackage(PathBuf),
    #[error("{} cannot be loaded as ONNX Runtime: {what}", path.display())]
    Runtime { path: PathBuf, what: String },
    #[error("no op library at {}: expected libditfastattn.so there (`cargo build --release` makes it, `pip install ditfastattn` brings it); name it with --library", .0.display())]
    NoLibrary(PathBuf),
    #[error("ONNX Runtime does not load {what}")]
    Load { what: String, source: ort::Error },
    #[error("ONNX Runtime does not run {what}")]
    Run { what: String, source: ort::Error },
}

/// What runs the nodes of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Provider {
    #[default]
    Cpu,
    Cuda,
}

impl Provider {
    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPU",
            Self::Cuda => "CUDA",
        }
    }

    /// What a session is told; a host without the provider is an error, not slow.
    fn providers(self) -> Vec<ExecutionProviderDispatch> {
        match self {
            Self::Cpu => Vec::new(),
            Self::Cuda => vec![CUDA::default().build().error_on_failure()],
        }
    }
}

/// ONNX Runtime with the op library.
pub struct Host {
    environment: Environment,
    library: PathBuf,
    version: (u32, u32),
    provider: Provider,
}

impl Host {
    /// Loads ONNX Runtime from `runtime` (a file, or a folder that holds it), else from `ORT_DYLIB_PATH`, else from the wheel that
    /// `python3` imports. `library` is the op library, else the one beside this program, else the ditfastattn wheel's. `threads`: 0 lets
    /// ONNX Runtime choose.
    ///
    /// # Errors
    /// What is missing, and how to name it.
    pub fn load(
        runtime: Option<&Path>,
        library: Option<&Path>,
        threads: usize,
    ) -> Result<Self, HostError> {
        let path = find_runtime(runtime)?;
        let library = find_library(library)?;
        let wrong = |what: String| HostError::Runtime {
            path: path.clone(),
            what,
        };
        let builder = ort::init_from(&path).map_err(|e| wrong(e.to_string()))?;
        // Segments take turns: one pool for all, or their threads would spin against each other.
        let pool = GlobalThreadPoolOptions::default();
        let pool = pool
            .with_intra_threads(threads)
            .map_err(|e| wrong(e.to_string()))?;
        let environment = builder
            .with_name("dfa-rewrite")
            .with_global_thread_pool(pool)
            .build()
            .map_err(|e| wrong(e.to_string()))?;
        let version = version(&path);
        Ok(Self {
            environment,
            library,
            version,
            provider: Provider::Cpu,
        })
    }

    /// The same, but sessions run on `provider`.
    pub fn on(self, provider: Provider) -> Self {
        Self { provider, ..self }
    }

    pub fn provider(&self) -> Provider {
        self.provider
    }

    /// A session for a model in memory whose external weights are in `folder`. `what` names it in errors.
    ///
    /// # Errors
    /// ONNX Runtime's own words.
    pub fn session(
        &self,
        what: &str,
        model: &[u8],
        folder: &Path,
        external: bool,
    ) -> Result<Session, HostError> {
        let failed = |source: ort::Error| HostError::Load {
            what: what.to_owned(),
            source,
        };
        let mut builder = Session::builder(&self.environment)
            .map_err(failed)?
            .with_operator_library(&self.library)
            .map_err(|e| failed(e.into()))?
            .with_log_level(ort::logging::LogLevel::Error)
            .map_err(|e| failed(e.into()))?
            .with_execution_providers(self.provider.providers())
            .map_err(|e| failed(e.into()))?;
        if !external {
            return builder.commit_from_memory(model).map_err(failed);
        }
        if self.version >= WEIGHTS_BESIDE_MEMORY {
            let folder = folder.to_string_lossy();
            return builder
                .with_config_entry(
                    "session.model_external_initializers_file_folder_path",
                    folder,
                )
                .map_err(|e| failed(e.into()))?
                .commit_from_memory(model)
                .map_err(failed);
        }
        // Older hosts look for weights beside the file only.
        let io = |e: std::io::Error| failed(ort::Error::new(e.to_string()));
        let file = tempfile::Builder::new()
            .prefix(".dfa-rewrite-")
            .suffix(".onnx")
            .tempfile_in(folder)
            .map_err(io)?;
        std::fs::write(file.path(), model).map_err(io)?;
        builder.commit_from_file(file.path()).map_err(failed)
    }
}

fn find_runtime(named: Option<&Path>) -> Result<PathBuf, HostError> {
    let variable = std::env::var_os("ORT_DYLIB_PATH").filter(|v| !v.is_empty());
    let named = named.map(Path::to_owned).or(variable.map(PathBuf::from));
    if let Some(named) = named {
        return library_in(&named).ok_or(HostError::NoRuntimeIn(named));
    }
    let folder = package_folder("onnxruntime").ok_or(HostError::NoRuntime)?;
    library_in(&folder).ok_or(HostError::NoRuntimeInPackage(folder))
}

/// Where the `python3` beside this program, else the one on PATH, would import a package from.
fn package_folder(package: &str) -> Option<PathBuf> {
    let code = format!(
        "import importlib.util as u; print(u.find_spec('{package}').submodule_search_locations[0])"
    );
    let beside = std::env::current_exe().ok()?.with_file_name("python3");
    [beside, PathBuf::from("python3")]
        .iter()
        .filter_map(|python| Command::new(python).args(["-c", &code]).output().ok())
        .filter(|output| output.status.success())
        .find_map(|output| String::from_utf8(output.stdout).ok())
        .map(|folder| PathBuf::from(folder.trim()))
}

/// ONNX Runtime's library: `path` itself, or in it, or in its `capi`.
fn library_in(path: &Path) -> Option<PathBuf> {
    if path.is_file() {
        return Some(path.to_owned());
    }
    [path.to_owned(), path.join("capi"), path.join("lib")]
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flat_map(|entries| entries.filter_map(Result::ok))
        .map(|entry| entry.path())
        .find(|file| {
            let name = file.file_name().and_then(|n| n.to_str()).unwrap_or("");
            name.starts_with("libonnxruntime.so") || name == "libonnxruntime.dylib"
        })
}

/// `named`, or the op library beside this program or in the wheel it came with.
///
/// # Errors
/// [`HostError::NoLibrary`] if there is none.
pub fn find_library(named: Option<&Path>) -> Result<PathBuf, HostError> {
    let beside = std::env::current_exe()
        .unwrap_or_default()
        .with_file_name(LIBRARY);
    let path = named.map_or(beside, Path::to_owned);
    if path.is_file() {
        return Ok(path);
    }
    // The wheel puts programs and libraries into different folders.
    let packaged = || Some(package_folder("ditfastattn")?.join(LIBRARY));
    match named {
        None => packaged().filter(|path| path.is_file()),
        Some(_) => None,
    }
    .ok_or(HostError::NoLibrary(path))
}

/// The version in the file's name, `libonnxruntime.so.1.32.0`; without one a current host is assumed.
fn version(path: &Path) -> (u32, u32) {
    let name = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = name.file_name().and_then(|n| n.to_str()).unwrap_or("");
    let mut numbers = name.split('.').filter_map(|part| part.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor),
        _ => (u32::MAX, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_in_the_name() {
        assert_eq!(version(Path::new("libonnxruntime.so.1.17.3")), (1, 17));
        assert!(version(Path::new("libonnxruntime.so")) >= WEIGHTS_BESIDE_MEMORY);
    }
}
