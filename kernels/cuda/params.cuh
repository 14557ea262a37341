// What the host hands to the kernels. The same structs are in kernels/src/cuda/params.rs; both sides are plain
// C layouts of 8-byte and 4-byte fields without padding, and the emulator compares their sizes.
#pragma once

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;

/// A tensor [batch, heads, tokens, channels] in device memory. Strides are in elements.
///
/// The tensor-core kernels want channels next to each other (channel = 1), the other strides divisible by 8 and
/// `data` aligned to 16 bytes, so that every row is a sequence of 16-byte pieces; the simple kernels take any strides.
struct Operand {
    void *data;
    i64 batch, head, token, channel;
};

/// What the elements of a mask are.
enum MaskKind { MASK_BOOLEAN = 0, MASK_F32 = 1, MASK_F16 = 2, MASK_BF16 = 3 };

/// A mask [batch, heads, q_tokens, kv_tokens]. Strides are in elements; 0 repeats.
///
/// Boolean masks (one byte each) hide where they are 0, others are added to scale · q kᵀ; −∞ hides.
struct MaskOperand {
    const void *data;
    i64 batch, head, query, key;
    int kind;
    /// Queries to which everything is hidden give 0, else NaN.
    int guarded;
};

/// One attention call: softmax(scale · q kᵀ + mask) v.
///
/// q [batch, heads, q_tokens, D]; k, v [batch, heads / group, kv_tokens, D]; out, residual [batch, heads, q_tokens, D],
/// D being the kernel's head dimension. All tensors have the kernel's element type; accumulation is float32.
///
/// Launch: grid (ceil(q_tokens / BM) · batch · heads, 1, 1), block (THREADS, 1, 1), shared memory as
/// kernels/src/cuda/variant.rs computes it. The query block is the fastest index, so neighbouring blocks share k and v.
struct AttentionParams {
    Operand q, k, v, out;
    /// Read by window kernels (null data: none), written by capture kernels, unused by full ones.
    Operand residual;
    /// Read by masked kernels only, whose data is never null.
    MaskOperand mask;
    /// Set to 1 if an element of a captured residual is not finite; null: nobody asks. Host memory that the device can
    /// reach.
    u32 *non_finite;
    int heads, group, q_tokens, kv_tokens;
    /// Token i sees j in the band iff |i − j| ≤ half_width or one of them lies in [text_begin, text_end).
    int half_width, text_begin, text_end;
    /// scale · log2 e. Positive, except for the simple kernels.
    float scale_log2;
    /// Head dimensions, for the simple kernels; the others know them.
    int head_dim, v_dim;
};

/// Copies `count` elements from `from` to each of `to` that is not null.
///
/// Launch: any grid of one dimension, block (256, 1, 1), no shared memory.
struct CopyParams {
    const void *from;
    void *to[3];
    u64 count;
    /// Set to 1 if an element is not finite; null: nobody asks.
    u32 *non_finite;
};
