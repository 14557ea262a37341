//! The kernels under NVIDIA's run-time compiler, which is not everywhere: `scripts/cuda-kernels` runs this where it has
//! installed it. `DITFASTATTN_NVRTC` names its folder.

use ditfastattn_kernels::DType;
use ditfastattn_kernels::cuda::{AttentionMode, Variant, compile_at_run_time};

#[test]
#[ignore = "needs NVRTC; scripts/cuda-kernels runs it"]
fn kernels_compile_at_run_time_for_every_architecture() {
    let tensor_core = |dim, mode, masked| Variant::TensorCore {
        dtype: DType::BF16,
        dim,
        queries: 64,
        mode,
        masked,
    };
    for variant in [
        tensor_core(72, AttentionMode::Capture, false),
        tensor_core(72, AttentionMode::Window, true),
        tensor_core(40, AttentionMode::Full, false),
        Variant::Copy { dtype: DType::F16 },
        Variant::Simple {
            dtype: DType::F32,
            max_dim: 64,
            mode: AttentionMode::Window,
        },
    ] {
        for arch in [80, 86, 90, 100, 120] {
            let cubin = compile_at_run_time(&variant, arch)
                .unwrap_or_else(|why| panic!("{} on {arch}: {why}", variant.name()));
            assert!(cubin.starts_with(b"\x7fELF"));
            // The kernel's name is a string in it.
            let name = variant.name();
            assert!(
                cubin
                    .windows(name.len())
                    .any(|part| part == name.as_bytes())
            );
        }
    }
}

#[test]
fn without_the_compiler_the_error_says_what_to_do() {
    if std::env::var_os("DITFASTATTN_NVRTC").is_some() {
        return;
    }
    if let Err(why) = compile_at_run_time(&Variant::Copy { dtype: DType::F16 }, 90) {
        assert!(why.contains("pip install nvidia-cuda-nvrtc"), "{why}");
    }
}
