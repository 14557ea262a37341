//! NVIDIA's run-time compiler (NVRTC), where it can be found.
//!
//! It is part of CUDA and of the Python packages that bring CUDA to ONNX Runtime and PyTorch, which are not on the loader's
//! path; so it is looked for beside the CUDA libraries that this process has loaded already.

use std::ffi::{CString, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::OnceLock;

use cudarc::nvrtc::sys;

use super::sources::SOURCES;
use super::variant::Variant;

/// Compiles one kernel for one compute capability (90 for 9.0) into a cubin.
pub(super) fn compile(variant: &Variant, arch: u32) -> Result<Vec<u8>, String> {
    if !is_available() {
        return Err(
            "it was not compiled into this library, and NVIDIA's run-time compiler (libnvrtc) cannot be loaded; \
             install it (pip install nvidia-cuda-nvrtc) or set DITFASTATTN_CUDA_KERNELS to a folder of fatbins"
                .into(),
        );
    }
    let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
    let main = SOURCES.iter().find(|(name, _)| *name == variant.file());
    let main = text(main.map_or("", |(_, text)| text))?;
    let names = SOURCES.map(|(name, _)| text(name));
    let names = names.into_iter().collect::<Result<Vec<_>, _>>()?;
    let bodies = SOURCES.map(|(_, body)| text(body));
    let bodies = bodies.into_iter().collect::<Result<Vec<_>, _>>()?;
    let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
    let (names, bodies) = (pointers(&names), pointers(&bodies));
    let file = text(variant.file())?;

    let mut options = vec![text(&format!("-arch=sm_{arch}"))?, text("-std=c++17")?];
    for (name, value) in variant.macros() {
        options.push(text(&format!("-D{name}={value}"))?);
    }
    let options = pointers(&options);

    let mut program = null_mut();
    // SAFETY: NUL-terminated strings that live until the call returns; the library copies them.
    let made = unsafe {
        sys::nvrtcCreateProgram(
            &mut program,
            main.as_ptr(),
            file.as_ptr(),
            bodies.len() as i32,
            bodies.as_ptr(),
            names.as_ptr(),
        )
    };
    check("nvrtcCreateProgram", made)?;
    let cubin = build(program, &options);
    // SAFETY: made above, destroyed once.
    unsafe {
        let _ = sys::nvrtcDestroyProgram(&mut program);
    }
    cubin
}

fn build(program: sys::nvrtcProgram, options: &[*const c_char]) -> Result<Vec<u8>, String> {
    let mut size = 0;
    // SAFETY: a live program; strings that outlive the call; buffers of the sizes that the library asks for.
    unsafe {
        let compiled = sys::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr());
        if let Err(error) = check("nvrtcCompileProgram", compiled) {
            check(
                "nvrtcGetProgramLogSize",
                sys::nvrtcGetProgramLogSize(program, &mut size),
            )?;
            let mut log = vec![0u8; size];
            check(
                "nvrtcGetProgramLog",
                sys::nvrtcGetProgramLog(program, log.as_mut_ptr().cast()),
            )?;
            return Err(format!("{error}\n{}", String::from_utf8_lossy(&log)));
        }
        check(
            "nvrtcGetCUBINSize",
            sys::nvrtcGetCUBINSize(program, &mut size),
        )?;
        let mut cubin = vec![0u8; size];
        check(
            "nvrtcGetCUBIN",
            sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()),
        )?;
        Ok(cubin)
    }
}

fn check(call: &str, result: sys::nvrtcResult) -> Result<(), String> {
    if result == sys::nvrtcResult::NVRTC_SUCCESS {
        Ok(())
    } else {
        Err(format!("{call}: {result:?}"))
    }
}

/// Whether the library can be called.
pub(super) fn is_available() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    *PRESENT.get_or_init(|| {
        // SAFETY: loads a library by name and nothing else.
        let present = || unsafe { sys::is_culib_present() };
        present() || (load_beside_cuda() && present())
    })
}

/// Loads the compiler from where other CUDA libraries of this process are. Once it is loaded, its bare name finds it.
fn load_beside_cuda() -> bool {
    let named = std::env::var_os("DITFASTATTN_NVRTC").map(PathBuf::from);
    let maps = std::fs::read("/proc/self/maps").unwrap_or_default();
    let loaded = maps
        .split(|&byte| byte == b'\n')
        .filter_map(|line| Some(&line[line.iter().position(|&byte| byte == b'/')?..]))
        .map(|path| Path::new(OsStr::from_bytes(path)))
        .filter(|path| {
            let name = path.file_name().map(OsStr::as_bytes).unwrap_or_default();
            [&b"libcudart"[..], b"libcublas", b"libcudnn", b"libcurand"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        })
        .filter_map(Path::parent)
        .map(Path::to_owned);
    let mut folders: Vec<PathBuf> = named.into_iter().chain(loaded).collect();
    folders.dedup();
    // Packages of CUDA 12 have one folder per library: nvidia/cuda_runtime/lib, nvidia/cuda_nvrtc/lib.
    let beside: Vec<PathBuf> = folders
        .iter()
        .filter_map(|folder| Some(folder.parent()?.parent()?.join("cuda_nvrtc/lib")))
        .collect();
    folders.extend(beside);
    folders.iter().any(|folder| open_all(folder))
}

/// Loads the compiler of `folder` and the library that it loads by name itself.
fn open_all(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return false;
    };
    let files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    let find = |prefix: &str, not: &str| {
        files.iter().find(|file| {
            let name = file.file_name().and_then(OsStr::to_str).unwrap_or_default();
            name.starts_with(prefix) && !name.contains(not)
        })
    };
    let builtins = find("libnvrtc-builtins.so", ".alt");
    let compiler = find("libnvrtc.so", ".alt");
    builtins.is_none_or(|file| open(file)) && compiler.is_some_and(|file| open(file))
}

fn open(file: &Path) -> bool {
    let Ok(name) = CString::new(file.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: a NUL-terminated path. NVIDIA's libraries run nothing that minds being loaded; it stays loaded.
    !unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null()
}
