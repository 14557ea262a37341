//! Compiles the kernels as plain C++. What was compiled before from the same text is used again.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use ditfastattn_kernels::cuda::{self, Variant};

/// The kernels' sources, perhaps changed, and which kernels to compile.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Contents by path below `kernels/cuda`.
    files: BTreeMap<PathBuf, String>,
    variants: Vec<Variant>,
}

/// One compilation at a time in this process; tests run on several threads.
static COMPILING: Mutex<()> = Mutex::new(());

impl Sources {
    /// The sources as they are, and all kernels that the product compiles ahead of time.
    ///
    /// # Panics
    /// If they cannot be read, as everything here does: this is for tests.
    pub fn new() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cuda");
        let mut files = BTreeMap::new();
        for folder in ["", "emulator"] {
            for entry in std::fs::read_dir(root.join(folder)).expect("kernels/cuda") {
                let path = entry.expect("a file of kernels/cuda").path();
                if path.is_file() {
                    let name = path.strip_prefix(&root).expect("inside").to_owned();
                    files.insert(name, std::fs::read_to_string(&path).expect("a text file"));
                }
            }
        }
        Sources {
            files,
            variants: Variant::all(),
        }
    }

    /// The same with other kernels.
    #[must_use]
    pub fn only(mut self, variants: impl IntoIterator<Item = Variant>) -> Self {
        self.variants = variants.into_iter().collect();
        self
    }

    /// The same with a change.
    ///
    /// # Panics
    /// If `old` does not occur exactly once in `file`.
    #[must_use]
    pub fn with(mut self, file: &str, old: &str, new: &str) -> Self {
        let text = self.files.get_mut(Path::new(file)).expect("a source file");
        assert_eq!(text.matches(old).count(), 1, "{old:?} in {file}");
        *text = text.replace(old, new);
        self
    }

    /// The program of [`Process`](crate::Process), with sanitizers.
    pub fn program(&self) -> PathBuf {
        let flags =
            "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -DEMULATOR_CHECKS";
        self.build(
            "emulated",
            flags,
            "-rdynamic -ldl",
            &["runtime.cc", "main.cc"],
        )
    }

    /// A folder with a `libcuda.so.1` that runs the kernels on the CPU. No sanitizers: it is loaded into other programs.
    pub fn driver(&self) -> PathBuf {
        let library = self.build(
            "libcuda.so.1",
            "-O2 -fPIC -fvisibility=default",
            "-shared -Wl,-soname,libcuda.so.1 -ldl -pthread",
            &["runtime.cc", "driver.cc"],
        );
        library.parent().expect("a folder").to_owned()
    }

    fn build(&self, output: &str, flags: &str, link: &str, runtime: &[&str]) -> PathBuf {
        let _one = COMPILING
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let units = cuda::translation_units(&self.variants);
        let key = BuildHasherDefault::<DefaultHasher>::default().hash_one((
            &self.files,
            &units,
            flags,
            link,
            &compiler,
        ));
        let folder = target().join(format!("{output}-{key:016x}"));
        let built = folder.join(output);
        if built.exists() {
            return built;
        }
        // Another process may compile the same: each has a folder of its own, and the first to finish names it.
        let work = target().join(format!("{output}-{key:016x}.{}", std::process::id()));
        for (name, text) in &self.files {
            write(&work.join(name), text);
        }
        let mut objects = Vec::new();
        for (name, text) in &units {
            write(&work.join(name).with_extension("cc"), text);
            objects.push((
                PathBuf::from(name).with_extension("cc"),
                PathBuf::from(name).with_extension("o"),
            ));
        }
        for name in runtime {
            let source = Path::new("emulator").join(name);
            objects.push((source.clone(), source.with_extension("o")));
        }
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
                scope.spawn(|| {
                    while let Some((source, object)) =
                        objects.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        let mut command = Command::new(&compiler);
                        command
                            .args("-std=c++17 -Wall -Wextra -Werror -I. -c".split_whitespace())
                            .args(flags.split_whitespace())
                            .arg(source)
                            .arg("-o")
                            .arg(object);
                        run(command.current_dir(&work));
                    }
                });
            }
        });
        let mut command = Command::new(&compiler);
        command
            .args(flags.split_whitespace())
            .args(objects.iter().map(|(_, object)| object))
            .args(link.split_whitespace())
            .arg("-o")
            .arg(output);
        run(command.current_dir(&work));
        if std::fs::rename(&work, &folder).is_err() {
            assert!(
                built.exists(),
                "cannot rename {} to {}",
                work.display(),
                folder.display()
            );
            let _ = std::fs::remove_dir_all(&work);
        }
        built
    }
}

impl Default for Sources {
    fn default() -> Self {
        Sources::new()
    }
}

/// A folder of empty images, one per module: what the product is to load where the emulated driver, which has all kernels
/// in itself, is its driver.
pub fn image_folder() -> PathBuf {
    let folder = target().join("images");
    std::fs::create_dir_all(&folder).expect("a folder in target");
    for variant in Variant::all() {
        write(
            &folder.join(variant.module()).with_extension("fatbin"),
            "emulated",
        );
    }
    write(&folder.join(cuda::MANIFEST), &cuda::source_hash());
    folder
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"),
            PathBuf::from,
        )
        .join("emulator")
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder in target");
    std::fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; a C++ compiler is needed"));
    assert!(
        output.status.success(),
        "{command:?}:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
