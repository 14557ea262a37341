//! Attention kernels for DiTFastAttn on raw tensors: full, full with capture of the residual, and window attention.
//!
//! A Diffusion Transformer under DiTFastAttn (arXiv 2406.08552) computes O = softmax(scale·QKᵀ)V at some steps and
//! keeps R = O − W there, W being the same with the softmax taken inside a band of keys only; at the steps after
//! that it computes W alone and returns W + R. [`Mode`] is these three. The crate knows nothing of ONNX, ONNX
//! Runtime or plans: tensors are pointers with [`Strides`], threads are somebody else's ([`Parallel`]).
//!
//! ```
//! use ditfastattn_kernels::*;
//!
//! let shape = Shape { batch: 1, heads: 2, kv_heads: 2, q_tokens: 5, kv_tokens: 5, head_dim: 4, v_dim: 4 };
//! let strides = Strides::bhsd(2, 5, 4);
//! let (q, k, v) = (vec![0.5f32; 40], vec![0.25f32; 40], vec![2.0f32; 40]);
//! let (mut out, mut residual) = (vec![0f32; 40], vec![1f32; 40]);
//! attention(
//!     &Attention {
//!         shape,
//!         scale: 0.5,
//!         q: Input::from_slice(&q, strides),
//!         k: Input::from_slice(&k, strides),
//!         v: Input::from_slice(&v, strides),
//!         mask: None,
//!         out: Output::from_slice(&mut out, strides),
//!         mode: Mode::FullCapture { band: Band::new(1), residual: Output::from_slice(&mut residual, strides) },
//!     },
//!     &Sequential,
//! )?;
//! assert!(out.iter().all(|o| (o - 2.0).abs() < 1e-6));
//! assert!(residual.iter().all(|r| r.abs() < 1e-6)); // All values are the same, so a window misses nothing.
//! # Ok::<(), KernelError>(())
//! ```
//!
//! # The data flow of the CPU kernel
//!
//! Block sizes depend on the instruction set:
//!
//! | | AVX-512 | AVX2 | NEON | portable |
//! |---|---|---|---|---|
//! | queries in a block (BLOCK_M) | 64: 4 vectors of 16 | 16: 2 of 8 | 16: 4 of 4 | 16: 2 of 8 |
//! | keys in a block (BLOCK_N) | 120 | 120 | 120 | 120 |
//! | query blocks in a task, at most | 8 | 32 | 32 | 32 |
//! | K and V are packed per call above so many queries | 900 (Intel), 1280 (others) | 512 | 512 | 512 |
//!
//! **Tasks.** The queries of each (batch, head) are cut into blocks of BLOCK_M, and up to 512 neighbouring queries make one
//! task (`cpu`), of two heads where heads share a mask. Tasks share nothing, and how they are cut does not depend on the
//! pool, so results are the same bits on any number of threads.
//!
//! **Packing.** A task reads its queries into `[head_dim, BLOCK_M]`, a query per vector lane, converting float16 and
//! bfloat16 to float32 (`load_store`, `transpose`). Then its main loop runs over the keys in blocks of BLOCK_N. Float32 K
//! and V with contiguous channels are read in place; others are packed block by block, once for all query blocks of the
//! task. Where many queries see a key (the last row of the table), all of K and V is packed once before the tasks begin
//! (`kv`): with heads inside tokens, every token of a head lies in another page of memory, and tasks would translate its
//! address again and again. Queries are packed when they meet their first keys. What comes next is prefetched from inside
//! the matrix kernel (`prefetch`): the next block of K and V, the next queries, and residual and output of queries that
//! are about to be done.
//!
//! **Scores.** S = K·Qᵀ, `[keys, BLOCK_M]`: six keys times all vectors of queries stay in registers over all channels
//! (`gemm`). Since a lane is a query, keys and channels are plain loop counts: nothing is padded, head dim 72 costs
//! exactly 72, and the softmax never looks across lanes.
//!
//! **Softmax.** Online (Milakov & Gimelshein, arXiv 1805.02867), in powers of two: each query has a running maximum m and a
//! row sum Σ 2^(s − m). Rescaling is lazy, as in FlashAttention-4: only when a block's maximum exceeds m by more than 8 are
//! sum and output so far rescaled and m raised; a factor of 2⁸ is harmless in float32. The exponential is a polynomial of
//! degree 5 (`exp`).
//!
//! **Values.** O += Vᵀ·P, `[v_dim, BLOCK_M]`, by the same matrix kernel.
//!
//! **Products in bfloat16** ([`Products`]). A step of both products takes a pair of elements in one 32-bit word (`precision`):
//! two channels of K and Q, two keys of V and P. K in bfloat16 is that already, everything else is rounded and
//! interleaved where it is packed anyway (`pack_bf16`), P in place after the exponential. A segment that begins or ends
//! inside a pair has a probability of 0 there. Running maxima are whole powers of two then: rounded probabilities are the
//! same in every mode.
//!
//! **The band.** `key_ranges` cuts each key block into segments in which the same vectors of queries see something; blocks
//! without any are skipped, corners are computed to one vector of queries, and scores inside a segment that a query does not
//! see become −∞. Capture keeps two softmax states for a query: over the keys inside the band, which give W, and over the
//! others. Scores are computed once, vectors on the band's edge are masked and summed once for either side, and at the end
//! the merged states give O, and R = O − W.
//!
//! **Masks.** Where a call has one, a tile of it is transposed to `[keys, BLOCK_M]` too (`mask_tile`), in powers of two, and added
//! to the scores before the softmax; what a boolean mask hides is −∞ there. Tiles of zeros are not added, and blocks
//! in which every key is hidden are left out, so padding costs nothing and a causal mask less than none.
//!
//! **The epilogue.** As soon as queries have seen their last key, O is divided by the row sums, the residual is subtracted or
//! added in float32, and rows are transposed back into the caller's layout and dtype (`epilogue`), one vector of queries
//! at a time.
//!
//! Infinities and NaN go where the definition takes them; values that are not finite reach only queries that see
//! them, through band and mask. [`oracle`] is that definition in float64, for tests at every level of the project.
//!
//! # Instruction sets
//!
//! AVX-512, AVX2 with FMA, NEON, or arrays the compiler vectorises, detected at run time (`cpu::isa`), through the `pulp`
//! crate. `DITFASTATTN_ISA` forces another one that the machine has, for tests. Sums of products are fused or not
//! according to the machine, so results differ between machines in the last bits.

mod api;
mod check;
mod cpu;
pub mod cuda;
mod error;
mod mask;
pub mod oracle;
mod parallel;
mod tensor;

pub use api::{Attention, Band, Computed, Mode, Products, Shape};
#[doc(hidden)]
pub use cpu::{Isa, MatrixKernel, kernels as matrix_kernels};
pub use error::KernelError;
pub use mask::{Mask, MaskStrides, MaskType};
pub use parallel::{Parallel, Sequential, Threads};
pub use tensor::{DType, Element, Input, Output, Strides};

/// Computes one attention call; see [`Mode`] for what is written where.
///
/// Empty tensors are fine: without keys the output is zero, without queries nothing happens. The result does not
/// depend on `pool`, bit for bit. Each thread keeps scratch memory for its next call: at head dim 72 about 0.6 MB, and a
/// thread that calls with long sequences up to 48 MiB for copies of keys and values. Where one head needs more than
/// that, they are read as in short sequences.
///
/// # Errors
/// [`KernelError`] if shapes, strides, mask and band do not fit together; nothing is written then.
pub fn attention(a: &Attention<'_>, pool: &dyn Parallel) -> Result<Computed, KernelError> {
    attention_in(a, pool, Products::Float32)
}

/// [`attention`], multiplying as `products` says where the machine and the tensors allow it.
///
/// # Errors
/// As [`attention`].
pub fn attention_in(
    a: &Attention<'_>,
    pool: &dyn Parallel,
    products: Products,
) -> Result<Computed, KernelError> {
    attention_at(a, pool, Isa::selected(), products)
}

/// [`attention_in`] at a given instruction set; for tests and benchmarks.
///
/// # Panics
/// If this machine lacks the instruction set.
#[doc(hidden)]
pub fn attention_at(
    a: &Attention<'_>,
    pool: &dyn Parallel,
    isa: Isa,
    products: Products,
) -> Result<Computed, KernelError> {
    assert!(isa.is_available(), "this machine has no {isa:?}");
    check::check(a)?;
    Ok(cpu::attention(a, pool, isa, products))
}
