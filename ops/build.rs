//! Marks the shared library as one that stays loaded.
//!
//! ONNX Runtime closes it when the last session goes. Unloading Rust code whose threads still have thread-local
//! destructors to run crashes the process (rust-lang/rust#91979), and kernels run on threads that we do not own.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if os == "linux" || os == "android" || os == "freebsd" {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
