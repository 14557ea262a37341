//! What a caller says about one attention call, and what it is told: shape, band, mode. Tensors are in `tensor`, masks in
//! `mask`.
//!
//! Owns the public types and nothing else: checking them is `check`, computing is `cpu`.

use crate::mask::Mask;
use crate::tensor::{Input, Output};

/// How the two products of a call, q kᵀ and probabilities times v, multiply. Sums, softmax and residuals are float32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Products {
    /// In float32, whatever the type of the tensors.
    #[default]
    Float32,
    /// In bfloat16 where q, k and v are bfloat16 or float16 and the machine has AVX-512 BF16; else in float32. Up to
    /// twice as fast there.
    ///
    /// Probabilities are rounded to bfloat16, and float16 inputs too, which have three bits more: the result is as close
    /// as that of a plain implementation that rounds the same, not as float16 could be. Values of float16 above 65408 are
    /// rounded to 65536, which is not finite in a float16 output.
    Bfloat16,
}

/// Sizes of one attention call.
///
/// q is `[batch, heads, q_tokens, head_dim]`, k `[batch, kv_heads, kv_tokens, head_dim]`,
/// v `[batch, kv_heads, kv_tokens, v_dim]`, output and residual `[batch, heads, q_tokens, v_dim]`, each laid out
/// by its own [`Strides`](crate::Strides). Query head `h` reads key/value head `h / (heads / kv_heads)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub batch: usize,
    pub heads: usize,
    /// Divides `heads`; equal to it except under grouped-query attention.
    pub kv_heads: usize,
    pub q_tokens: usize,
    /// May differ from `q_tokens` in [`Mode::Full`] only.
    pub kv_tokens: usize,
    pub head_dim: usize,
    pub v_dim: usize,
}

/// Which keys a query sees in window attention: token i sees j iff |i − j| ≤ `half_width`, or i or j is text.
///
/// Indices count all tokens, text included (DiTFastAttn, arXiv 2406.08552, §3.2, widened by the text tokens of
/// joint attention). Every token sees itself, so no row is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band {
    pub half_width: usize,
    /// How many tokens are text; they lie together at one end of the sequence.
    pub text: usize,
    pub text_at_start: bool,
}

impl Band {
    /// A band without text tokens.
    pub fn new(half_width: usize) -> Self {
        Band {
            half_width,
            text: 0,
            text_at_start: false,
        }
    }

    /// The half-open range of text tokens in a sequence of `tokens`.
    pub fn text_range(&self, tokens: usize) -> std::ops::Range<usize> {
        let text = self.text.min(tokens);
        if self.text_at_start {
            0..text
        } else {
            tokens - text..tokens
        }
    }

    /// Whether query `i` sees key `j` in a sequence of `tokens`.
    pub fn sees(&self, i: usize, j: usize, tokens: usize) -> bool {
        let text = self.text_range(tokens);
        i.abs_diff(j) <= self.half_width || text.contains(&i) || text.contains(&j)
    }

    /// Whether every query sees every key of a sequence of `tokens`: then W is O, and R is zero.
    pub fn covers(&self, tokens: usize) -> bool {
        self.half_width >= tokens.saturating_sub(self.text).saturating_sub(1)
    }
}

/// What is computed. O is attention over all keys, W attention over the band with the softmax renormalised there. A mask
/// stays in force in both.
#[derive(Debug)]
pub enum Mode<'a> {
    /// out = O.
    Full,
    /// out = O and residual = O − W, in one pass over the keys. The subtraction happens in float32, before
    /// rounding to the residual's dtype.
    FullCapture { band: Band, residual: Output<'a> },
    /// out = W, plus the residual if there is one (added in float32, before rounding to the output's dtype).
    Window {
        band: Band,
        residual: Option<Input<'a>>,
    },
}

/// One attention call: softmax(`scale` · q kᵀ + `mask`) v for every batch row and head.
#[derive(Debug)]
pub struct Attention<'a> {
    pub shape: Shape,
    pub scale: f32,
    pub q: Input<'a>,
    pub k: Input<'a>,
    pub v: Input<'a>,
    /// `[batch, heads, q_tokens, kv_tokens]`; `None` is as good as one that shows everything, and faster.
    pub mask: Option<Mask<'a>>,
    pub out: Output<'a>,
    pub mode: Mode<'a>,
}

/// What a call has learnt about what it wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Computed {
    /// Whether a captured residual holds neither infinities nor NaN. In doubt, at the very end of its type's range, it
    /// is taken to hold some. True where none was captured.
    pub residual_is_finite: bool,
}
