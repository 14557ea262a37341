//! Builds the emulated CUDA driver and prints, as shell assignments, the environment in which the op library runs its CUDA
//! operators on it, through an ONNX Runtime without CUDA: `eval "$(cargo run --example emulated_cuda)"`.

fn main() {
    let driver = ditfastattn_emulator::Sources::new().driver();
    let images = ditfastattn_emulator::image_folder();
    let path = |path: &std::path::Path| {
        let path = path.canonicalize().expect("it was just made");
        path.display().to_string()
    };
    println!("export LD_LIBRARY_PATH='{}'", path(&driver));
    println!("export DITFASTATTN_CUDA_KERNELS='{}'", path(&images));
    println!("export DITFASTATTN_EMULATED_CUDA=1");
}
