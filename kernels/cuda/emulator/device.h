// The instructions of device.cuh on a CPU, so that kernels run in tests without a GPU.
//
// Every thread of a block is a fiber of its own stack. Instructions of a whole warp (ldmatrix, mma, shuffles) collect the
// operands of its 32 fibers; the last one to arrive computes all results, with the fragment layout of the PTX manual for
// m16n8k16. What this cannot see: races between threads, bank conflicts, time.
//
// cp.async is kept honest: the copy happens at the wait, so what is read too early is not there yet.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define DEVICE inline
#define KERNEL(name, threads, blocks_per_sm, Params) extern "C" void name(const Params &p)
#define SHARED_MEMORY(name) unsigned char *name = emulator::shared_memory()
#define UNROLL
#define ROLLED
#define UNROLL_BY_4

struct F32 {};
struct F16 {};
struct BF16 {};

namespace emulator {

/// Operands or results of one lane in a warp-wide instruction.
struct Lane {
    uintptr_t address;
    u32 word[6];
    float c[4];
};

/// What a warp computes when all of its lanes have arrived.
typedef void (*Collective)(const Lane *in, Lane *out);

int thread_index();
int block_index();
int grid_size();
unsigned char *shared_memory();
void sync_block();
/// Hands in `lane` and waits for the warp; `out` is this lane's result. All lanes must call for the same thing.
Lane collect(const Lane &lane, Collective compute);
/// Notes a copy of 16 bytes for this thread's current group.
void copy_async(void *to, const void *from, bool valid);
void copy_commit();
void copy_wait(int groups);

inline float bits_to_float(u32 x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
inline u32 float_to_bits(float f) {
    u32 x;
    memcpy(&x, &f, 4);
    return x;
}

inline float half_to_float(u16 x) {
    const u32 sign = (u32)(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 0x3ff;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) return (sign ? -1.f : 1.f) * std::ldexp((float)fraction, -24);
    return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

/// Rounds to nearest even.
inline u16 float_to_half(float f) {
    const u32 x = float_to_bits(f), sign = x >> 16 & 0x8000, magnitude = x & 0x7fffffff;
    if (magnitude > 0x7f800000) return (u16)0x7fff;
    if (magnitude >= 0x477ff000) return (u16)(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // Subnormal: nearbyint rounds to even, and a carry gives the smallest normal number.
        return (u16)(sign | (u32)std::nearbyint(std::ldexp(bits_to_float(magnitude), 24)));
    }
    const u32 rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (u16)(sign | ((rounded >> 13) - (112 << 10)));
}

inline u16 float_to_bfloat(float f) {
    const u32 x = float_to_bits(f);
    if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (u16)((x + 0x7fff + (x >> 16 & 1)) >> 16);
}

} // namespace emulator

using emulator::bits_to_float;
using emulator::block_index;
using emulator::copy_async;
using emulator::copy_commit;
using emulator::float_to_bits;
using emulator::grid_size;
using emulator::sync_block;
using emulator::thread_index;

template <int N> inline void copy_wait() { emulator::copy_wait(N); }

template <class T> inline float to_float(u16 x);
template <> inline float to_float<F16>(u16 x) { return emulator::half_to_float(x); }
template <> inline float to_float<BF16>(u16 x) { return bits_to_float((u32)x << 16); }
template <class T> inline u16 from_float(float x);
template <> inline u16 from_float<F16>(float x) { return emulator::float_to_half(x); }
template <> inline u16 from_float<BF16>(float x) { return emulator::float_to_bfloat(x); }
template <class T> inline u32 pack(float low, float high) { return from_float<T>(low) | (u32)from_float<T>(high) << 16; }

namespace emulator {

/// Element (row, column) of matrix `k`, whose row addresses lanes 8k … 8k + 7 give. Lane l gets two neighbours.
template <int MATRICES, bool TRANSPOSED> void load_matrix(const Lane *in, Lane *out) {
    for (int lane = 0; lane < 32; lane++) {
        for (int k = 0; k < MATRICES; k++) {
            u16 pair[2];
            for (int e = 0; e < 2; e++) {
                const int along = lane % 4 * 2 + e, across = lane / 4;
                const int row = TRANSPOSED ? along : across, column = TRANSPOSED ? across : along;
                const uintptr_t address = in[k * 8 + row].address;
                if (address % 16 != 0) __builtin_trap();
                pair[e] = ((const u16 *)address)[column];
            }
            out[lane].word[k] = pair[0] | (u32)pair[1] << 16;
        }
    }
}

/// c[16×8] += a[16×16] · b[16×8]; a in words 0 to 3, b in words 4 and 5. Not sanitized, for speed: it touches nothing of a
/// kernel's.
template <class T> __attribute__((no_sanitize("address", "undefined"))) void multiply(const Lane *in, Lane *out) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        for (int e = 0; e < 2; e++) {
            for (int r = 0; r < 4; r++) {
                a[lane / 4 + r % 2 * 8][lane % 4 * 2 + e + r / 2 * 8] = to_float<T>((u16)(in[lane].word[r] >> 16 * e));
            }
            for (int r = 0; r < 2; r++) {
                b[lane % 4 * 2 + e + r * 8][lane / 4] = to_float<T>((u16)(in[lane].word[4 + r] >> 16 * e));
            }
        }
    }
    for (int row = 0; row < 16; row++) {
        float c[8];
        for (int n = 0; n < 8; n++) c[n] = in[row % 8 * 4 + n / 2].c[row / 8 * 2 + n % 2];
        for (int k = 0; k < 16; k++) {
            for (int n = 0; n < 8; n++) c[n] += a[row][k] * b[k][n];
        }
        for (int n = 0; n < 8; n++) out[row % 8 * 4 + n / 2].c[row / 8 * 2 + n % 2] = c[n];
    }
}

template <int LANES> void exchange(const Lane *in, Lane *out) {
    for (int lane = 0; lane < 32; lane++) {
        out[lane].word[0] = in[lane ^ LANES].word[0];
    }
}

inline Collective exchange_by(int lanes) {
    switch (lanes) {
    case 1: return exchange<1>;
    case 2: return exchange<2>;
    case 4: return exchange<4>;
    case 8: return exchange<8>;
    case 16: return exchange<16>;
    }
    __builtin_trap();
}

template <int MATRICES, bool TRANSPOSED> void load_matrix(u32 *r, const void *row) {
    Lane lane;
    lane.address = (uintptr_t)row;
    const Lane out = collect(lane, load_matrix<MATRICES, TRANSPOSED>);
    for (int k = 0; k < MATRICES; k++) r[k] = out.word[k];
}

} // namespace emulator

inline void load_matrix_x4(u32 *r, const void *row) { emulator::load_matrix<4, false>(r, row); }
inline void load_matrix_x4_transposed(u32 *r, const void *row) { emulator::load_matrix<4, true>(r, row); }
inline void load_matrix_x2_transposed(u32 *r, const void *row) { emulator::load_matrix<2, true>(r, row); }

template <class T> inline void mma(float *c, const u32 *a, const u32 *b) {
    emulator::Lane lane;
    for (int i = 0; i < 4; i++) lane.word[i] = a[i], lane.c[i] = c[i];
    for (int i = 0; i < 2; i++) lane.word[4 + i] = b[i];
    const emulator::Lane out = emulator::collect(lane, emulator::multiply<T>);
    for (int i = 0; i < 4; i++) c[i] = out.c[i];
}

inline float shuffle_xor(float x, int lanes) {
    emulator::Lane lane;
    lane.word[0] = float_to_bits(x);
    return bits_to_float(emulator::collect(lane, emulator::exchange_by(lanes)).word[0]);
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float max_of(float a, float b) { return std::fmax(a, b); }
