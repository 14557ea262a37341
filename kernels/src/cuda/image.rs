//! Where the code of a kernel comes from: a folder, this library, or NVIDIA's run-time compiler and a cache on disk.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::driver::CudaError;
use super::nvrtc;
use super::sources::{hex, source_hash};
use super::variant::Variant;

/// The fatbins that `build.rs` found: module and contents. Empty unless the library was built with them.
const EMBEDDED: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// The file beside ahead-of-time fatbins that says which sources they are of.
pub const MANIFEST: &str = "sources.sha256";

/// The places to look for code.
#[derive(Debug)]
pub(super) struct Images {
    /// `DITFASTATTN_CUDA_KERNELS`: a folder of fatbins, as `scripts/cuda-kernels` makes it.
    folder: Option<PathBuf>,
    /// `DITFASTATTN_CUDA_CACHE`, else `ditfastattn` in the user's cache; `None` if set to nothing.
    cache: Option<PathBuf>,
}

impl Images {
    pub fn from_environment() -> Self {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let some = |path: PathBuf| (!path.as_os_str().is_empty()).then_some(path);
        Images {
            folder: variable("DITFASTATTN_CUDA_KERNELS").and_then(some),
            cache: match variable("DITFASTATTN_CUDA_CACHE") {
                Some(path) => some(path),
                None => variable("XDG_CACHE_HOME")
                    .and_then(some)
                    .or_else(|| Some(variable("HOME").and_then(some)?.join(".cache")))
                    .map(|cache| cache.join("ditfastattn")),
            },
        }
    }

    /// The fatbin of the variant's module, if it was compiled ahead of time from these sources.
    pub fn ahead_of_time(&self, variant: &Variant) -> Option<Arc<[u8]>> {
        if !variant.is_common() {
            return None;
        }
        let module = variant.module();
        if let Some(folder) = &self.folder
            && std::fs::read_to_string(folder.join(MANIFEST))
                .is_ok_and(|hash| hash.trim() == source_hash())
            && let Ok(image) = std::fs::read(folder.join(&module).with_extension("fatbin"))
        {
            return Some(image.into());
        }
        let embedded = EMBEDDED.iter().find(|(name, _)| *name == module);
        embedded.map(|(_, image)| Arc::from(*image))
    }

    /// Code made at run time for `arch` alone, from the cache if it is there. `load` gives it to the driver; code from the
    /// cache that the driver refuses is made anew.
    ///
    /// # Errors
    /// If it can be neither found nor compiled.
    pub fn compiled<M>(
        &self,
        variant: &Variant,
        arch: u32,
        load: impl Fn(&Arc<[u8]>) -> Result<M, CudaError>,
    ) -> Result<M, CudaError> {
        let no_code = |why: String| CudaError::NoCode {
            kernel: variant.name(),
            arch,
            why,
        };
        let place = self
            .cache
            .as_ref()
            .map(|folder| folder.join(cache_name(variant, arch)));
        if let Some(place) = &place
            && let Ok(image) = std::fs::read(place)
            && image.starts_with(b"\x7fELF")
            && let Ok(module) = load(&image.into())
        {
            return Ok(module);
        }
        let image = nvrtc::compile(variant, arch).map_err(no_code)?;
        if let Some(place) = &place {
            write(place, &image);
        }
        load(&image.into())
    }
}

fn cache_name(variant: &Variant, arch: u32) -> String {
    let mut hash = Sha256::new();
    hash.update(source_hash());
    for (name, value) in variant.macros() {
        hash.update(format!("{name}={value}\n"));
    }
    let hash = hex(&hash.finalize());
    format!("{}-sm{arch}-{}.cubin", variant.name(), &hash[..16])
}

/// Readers never see half a file. A cache that cannot be written is none.
fn write(place: &Path, image: &[u8]) {
    let mut partial = Cow::from(place.as_os_str()).into_owned();
    partial.push(format!(".{}", std::process::id()));
    let written = place
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(&partial, image))
        .and_then(|()| std::fs::rename(&partial, place));
    if written.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
}
