// What is not attention: copies that look for numbers that are not finite.
#include "device.cuh"

template <class T> struct Finite {
    static DEVICE bool word(u32 x) { return pair_is_finite<T>(x); }
    static DEVICE bool one(const void *data, u64 at) { return is_finite(Element<T>::load(data, (i64)at)); }
};
template <> struct Finite<F32> {
    static DEVICE bool word(u32 x) { return is_finite(bits_to_float(x)); }
    static DEVICE bool one(const void *data, u64 at) { return is_finite(((const float *)data)[at]); }
};

struct Piece {
    u32 word[4];
};

template <class T> DEVICE void copy(const CopyParams &p) {
    typedef typename Element<T>::Stored Stored;
    const u64 first = (u64)block_index() * 256 + thread_index(), step = (u64)grid_size() * 256;
    const u64 per_piece = 16 / sizeof(Stored);
    bool aligned = (u64)p.from % 16 == 0;
    for (int i = 0; i < 3; i++) aligned = aligned && (u64)p.to[i] % 16 == 0;
    const u64 pieces = aligned ? p.count / per_piece : 0;
    bool finite = true;
    for (u64 at = first; at < pieces; at += step) {
        const Piece piece = ((const Piece *)p.from)[at];
        UNROLL for (int i = 0; i < 4; i++) finite = finite && Finite<T>::word(piece.word[i]);
        UNROLL for (int i = 0; i < 3; i++) {
            if (p.to[i]) ((Piece *)p.to[i])[at] = piece;
        }
    }
    for (u64 at = pieces * per_piece + first; at < p.count; at += step) {
        finite = finite && Finite<T>::one(p.from, at);
        UNROLL for (int i = 0; i < 3; i++) {
            if (p.to[i]) ((Stored *)p.to[i])[at] = ((const Stored *)p.from)[at];
        }
    }
    if (p.non_finite && !finite) *p.non_finite = 1;
}

KERNEL(dfa_copy_f32, 256, 1, CopyParams) { copy<F32>(p); }
KERNEL(dfa_copy_f16, 256, 1, CopyParams) { copy<F16>(p); }
KERNEL(dfa_copy_bf16, 256, 1, CopyParams) { copy<BF16>(p); }
