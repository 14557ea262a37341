//! Which kernels there are: every one is a source file and a set of macros.

use std::collections::BTreeMap;

use crate::tensor::DType;

/// What a kernel computes; [`Mode`](crate::Mode) without its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AttentionMode {
    Full,
    Capture,
    Window,
}

impl AttentionMode {
    pub const ALL: [AttentionMode; 3] = [
        AttentionMode::Full,
        AttentionMode::Capture,
        AttentionMode::Window,
    ];

    fn word(self) -> &'static str {
        match self {
            AttentionMode::Full => "full",
            AttentionMode::Capture => "capture",
            AttentionMode::Window => "window",
        }
    }
}

/// One compiled kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// `attention.cu`: float16 and bfloat16 on tensor cores.
    TensorCore {
        dtype: DType,
        /// Head dimension: a multiple of 8, at most 128.
        dim: usize,
        /// Queries per block: 64 or 128.
        queries: usize,
        mode: AttentionMode,
        masked: bool,
    },
    /// `simple.cu`: any type and strides, head dimensions up to `max_dim`.
    Simple {
        dtype: DType,
        max_dim: usize,
        mode: AttentionMode,
    },
    /// `dfa_copy_*` of `support.cu`.
    Copy { dtype: DType },
}

/// Head dimensions that are compiled ahead of time; other multiples of 8 are compiled when they are met.
pub const DIMS: [usize; 5] = [64, 72, 80, 96, 128];

/// Sizes of [`Variant::Simple`].
pub const SIMPLE_DIMS: [usize; 3] = [64, 128, 256];

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn dtype_word(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::BF16 => "bf16",
    }
}

impl Variant {
    /// All that are compiled ahead of time.
    pub fn all() -> Vec<Variant> {
        let mut all = Vec::new();
        for dtype in DTYPES {
            all.push(Variant::Copy { dtype });
            for mode in AttentionMode::ALL {
                all.extend(SIMPLE_DIMS.map(|max_dim| Variant::Simple {
                    dtype,
                    max_dim,
                    mode,
                }));
                if dtype == DType::F32 {
                    continue;
                }
                for dim in DIMS {
                    for (queries, masked) in [(64, false), (64, true), (128, false)] {
                        all.push(Variant::TensorCore {
                            dtype,
                            dim,
                            queries,
                            mode,
                            masked,
                        });
                    }
                }
            }
        }
        all
    }

    /// Whether it is compiled ahead of time.
    pub fn is_common(&self) -> bool {
        match self {
            Variant::TensorCore { dim, .. } => DIMS.contains(dim),
            _ => true,
        }
    }

    /// The kernel's name in its module.
    pub fn name(&self) -> String {
        match *self {
            Variant::TensorCore {
                dtype,
                dim,
                queries,
                mode,
                masked,
            } => format!(
                "dfa_attention_{}_d{dim}_m{queries}_{}{}",
                dtype_word(dtype),
                mode.word(),
                if masked { "_masked" } else { "" }
            ),
            Variant::Simple {
                dtype,
                max_dim,
                mode,
            } => format!(
                "dfa_simple_{}_d{max_dim}_{}",
                dtype_word(dtype),
                mode.word()
            ),
            Variant::Copy { dtype } => format!("dfa_copy_{}", dtype_word(dtype)),
        }
    }

    /// The file to compile, in `kernels/cuda`.
    pub fn file(&self) -> &'static str {
        match self {
            Variant::TensorCore { .. } => "attention.cu",
            Variant::Simple { .. } => "simple.cu",
            Variant::Copy { .. } => "support.cu",
        }
    }

    /// The module that the kernel is compiled into: kernels that a model needs together are in one.
    pub fn module(&self) -> String {
        match *self {
            Variant::TensorCore { dtype, dim, .. } => {
                format!("attention_{}_d{dim}", dtype_word(dtype))
            }
            Variant::Simple { dtype, .. } => format!("simple_{}", dtype_word(dtype)),
            Variant::Copy { .. } => "support".to_owned(),
        }
    }

    /// The macros that choose it, name and value.
    pub fn macros(&self) -> Vec<(&'static str, String)> {
        let upper = |dtype| dtype_word(dtype).to_uppercase();
        match *self {
            Variant::TensorCore {
                dtype,
                dim,
                queries,
                mode,
                masked,
            } => vec![
                ("DFA_NAME", self.name()),
                ("DFA_TYPE", upper(dtype)),
                ("DFA_DIM", dim.to_string()),
                ("DFA_BM", queries.to_string()),
                ("DFA_MODE", mode.word().to_uppercase()),
                ("DFA_MASKED", masked.to_string()),
                ("DFA_BLOCKS", self.blocks_per_processor().to_string()),
            ],
            Variant::Simple {
                dtype,
                max_dim,
                mode,
            } => vec![
                ("DFA_NAME", self.name()),
                ("DFA_TYPE", upper(dtype)),
                ("DFA_DIM", max_dim.to_string()),
                ("DFA_MODE", mode.word().to_uppercase()),
            ],
            Variant::Copy { .. } => Vec::new(),
        }
    }

    /// Threads of a block, as `Tile::THREADS` and its like say.
    pub fn threads(&self) -> usize {
        match *self {
            Variant::TensorCore { dim, queries, .. } if queries == 128 && dim > 80 => 256,
            Variant::TensorCore { .. } | Variant::Simple { .. } => 128,
            Variant::Copy { .. } => 256,
        }
    }

    /// Queries of a block.
    pub fn queries(&self) -> usize {
        match *self {
            Variant::TensorCore { queries, .. } => queries,
            Variant::Simple { .. } => 32,
            Variant::Copy { .. } => 0,
        }
    }

    /// Bytes of dynamic shared memory, as `Tile` and `SimpleKernel` lay it out.
    pub fn shared_bytes(&self) -> usize {
        match *self {
            Variant::TensorCore {
                dim, queries, mode, ..
            } => {
                let row = dim.next_multiple_of(16) + 8;
                let operands = (queries + 2 * 64) * row * 2;
                let window = if mode == AttentionMode::Capture {
                    queries * dim * 4
                } else {
                    0
                };
                operands + window
            }
            Variant::Simple { max_dim, .. } => (2 * 32 * (max_dim + 1) + 32 * 33) * 4,
            Variant::Copy { .. } => 0,
        }
    }

    /// Blocks per multiprocessor that registers must leave room for, which is how the compiler is told the budget.
    fn blocks_per_processor(&self) -> usize {
        const REGISTERS: usize = 65536;
        REGISTERS / (self.threads() * self.register_budget().next_multiple_of(8))
    }

    /// The most registers that a thread may use: blocks of 64 queries are for short sequences, where two or three of them
    /// must fit a multiprocessor to keep it busy.
    pub fn register_budget(&self) -> usize {
        match *self {
            Variant::TensorCore {
                queries: 64, dim, ..
            } if dim <= 80 => 168,
            Variant::TensorCore { .. } => 255,
            Variant::Simple { .. } => 255,
            Variant::Copy { .. } => 64,
        }
    }
}

/// The text of one source file per module that contains these kernels; by the module's name.
pub fn translation_units(variants: &[Variant]) -> BTreeMap<String, String> {
    let mut units = BTreeMap::<String, String>::new();
    for variant in variants {
        let text = units.entry(variant.module()).or_default();
        let include = format!("#include \"{}\"\n", variant.file());
        let macros = variant.macros();
        if macros.is_empty() && text.contains(&include) {
            continue;
        }
        for (name, value) in &macros {
            *text += &format!("#define {name} {value}\n");
        }
        *text += &include;
        for (name, _) in &macros {
            *text += &format!("#undef {name}\n");
        }
    }
    units
}
