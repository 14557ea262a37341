//! Why a call was refused. Every refusal happens before anything is written.

/// What messages call the mask, whose last two dimensions have other names.
pub(crate) const MASK: &str = "mask";

fn axes(tensor: &str) -> &'static str {
    if tensor == MASK {
        "batch, heads, queries, keys"
    } else {
        "batch, heads, tokens, channels"
    }
}

/// A call that does not make sense. Nothing has been computed or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    #[error(
        "attention: {heads} query heads cannot share {kv_heads} key/value heads; expected kv_heads to divide heads"
    )]
    Heads { heads: usize, kv_heads: usize },
    #[error(
        "attention: a band needs as many queries as keys, found q_tokens {q_tokens} and kv_tokens {kv_tokens}; \
         use Mode::Full for cross attention"
    )]
    CrossBand { q_tokens: usize, kv_tokens: usize },
    #[error("attention: the band has {text} text tokens, the sequence only {tokens}")]
    Text { text: usize, tokens: usize },
    #[error(
        "attention: the sizes of the {tensor} tensor overflow: {dims:?} with strides {strides:?}"
    )]
    Overflow {
        tensor: &'static str,
        dims: [usize; 4],
        strides: [isize; 4],
    },
    #[error(
        "attention: the {tensor} tensor of {dims:?} ({}) with strides {strides:?} \
         reaches elements {first}..={last}, its slice has {len}",
        axes(tensor)
    )]
    OutOfBounds {
        tensor: &'static str,
        dims: [usize; 4],
        strides: [isize; 4],
        first: isize,
        last: isize,
        len: usize,
    },
    #[error(
        "attention: the {tensor} tensor of {dims:?} (batch, heads, tokens, channels) with strides {strides:?} \
         may write an element twice; expected a layout without overlap"
    )]
    Overlap {
        tensor: &'static str,
        dims: [usize; 4],
        strides: [isize; 4],
    },
}
