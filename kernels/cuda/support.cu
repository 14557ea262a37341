// What is not attention: copies that look for numbers that are not finite, and the evidence of anonymous runs.
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

/// The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every bit depends on every bit.
DEVICE u64 scramble(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/// One word's share of a digest: its 128-bit product with a secret of its place, folded.
DEVICE u64 share_of(u64 word, u64 index, u64 key) {
    const u64 a = scramble(key + index * 0x9e3779b97f4a7c15ull), b = word ^ scramble(a);
    return multiply_high(a, b) ^ (a * b) ^ scramble(b);
}

DEVICE u64 word_at(const unsigned char *data, u64 bytes, u64 index) {
    if ((u64)data % 8 == 0 && index * 8 + 8 <= bytes) return ((const u64 *)data)[index];
    u64 word = 0;
    for (u64 i = 0; i < 8 && index * 8 + i < bytes; i++) word |= (u64)data[index * 8 + i] << (8 * i);
    return word;
}

DEVICE float sample(const EvidenceParams &p, u64 at) {
    if (p.element == 1) return ((const float *)p.data)[at];
    if (p.element == 2) return Element<F16>::load(p.data, (i64)at);
    if (p.element == 3) return Element<BF16>::load(p.data, (i64)at);
    return (float)((const double *)p.data)[at];
}

KERNEL(dfa_evidence, 256, 1, EvidenceParams) {
    const u64 first = (u64)block_index() * 256 + thread_index(), step = (u64)grid_size() * 256;
    const u64 words = (p.bytes + 7) / 8;
    u64 digest[2] = {0, 0};
    for (u64 at = first; at < words; at += step) {
        const u64 word = word_at((const unsigned char *)p.data, p.bytes, at);
        UNROLL for (int i = 0; i < 2; i++) digest[i] += share_of(word, at, p.key[i]);
    }
    UNROLL for (int i = 0; i < 2; i++) {
        for (int lanes = 16; lanes > 0; lanes /= 2) digest[i] += shuffle_xor(digest[i], lanes);
        if (thread_index() % 32 == 0) atomic_add(p.digest + i, digest[i]);
    }
    for (u64 at = first; at < p.samples; at += step) p.out[at] = sample(p, at * p.stride);
}
