//! Embeds kernels that were compiled ahead of time, if `DITFASTATTN_CUDA_KERNELS` names a folder of them.
//!
//! Without it the library compiles the kernels it needs at run time, with NVRTC.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// As `SOURCES` in `src/cuda/sources.rs`.
const SOURCES: [&str; 8] = [
    "params.cuh",
    "device.cuh",
    "band.cuh",
    "attention.cuh",
    "simple.cuh",
    "attention.cu",
    "simple.cu",
    "support.cu",
];

fn main() {
    println!("cargo::rerun-if-env-changed=DITFASTATTN_CUDA_KERNELS");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cuda");
    let mut list = String::from("&[");
    if let Some(folder) = std::env::var_os("DITFASTATTN_CUDA_KERNELS").map(PathBuf::from)
        && !folder.as_os_str().is_empty()
    {
        println!("cargo::rerun-if-changed={}", folder.display());
        match fatbins(&folder) {
            Ok(files) => {
                for file in files {
                    let module = file.file_stem().unwrap_or_default().to_string_lossy();
                    let _ = write!(list, "({module:?}, include_bytes!({file:?})),");
                }
            }
            // Embedding stale code would be worse than embedding none.
            Err(why) => panic!("DITFASTATTN_CUDA_KERNELS={}: {why}", folder.display()),
        }
    }
    list.push(']');
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    std::fs::write(out.join("embedded.rs"), list).expect("OUT_DIR is writable");
}

fn fatbins(folder: &Path) -> Result<Vec<PathBuf>, String> {
    let folder = folder.canonicalize().map_err(|error| error.to_string())?;
    let manifest = folder.join("sources.sha256");
    let of = std::fs::read_to_string(&manifest)
        .map_err(|error| format!("{}: {error}", manifest.display()))?;
    if of.trim() != source_hash() {
        return Err("its kernels are of other sources; run scripts/cuda-kernels again".into());
    }
    let entries = std::fs::read_dir(&folder).map_err(|error| error.to_string())?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "fatbin")
        })
        .collect();
    files.sort();
    Ok(files)
}

fn source_hash() -> String {
    let mut hash = Sha256::new();
    for name in SOURCES {
        hash.update(name);
        hash.update([0]);
        let text = std::fs::read(Path::new("cuda").join(name)).expect("the kernels' sources");
        hash.update(text);
        hash.update([0]);
    }
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
