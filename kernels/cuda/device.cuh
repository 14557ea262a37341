// The device's instructions behind a few functions: inline PTX when compiled for a GPU (nvcc or NVRTC, no headers), the
// emulator when compiled as plain C++. Fragments are laid out as the PTX manual says for m16n8k16.
#pragma once
#include "params.cuh"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

#define DEVICE __device__ __forceinline__
#define KERNEL(name, threads, blocks_per_sm, Params)                                                                   \
    extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm) name(const Params p)
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define UNROLL_BY_4 _Pragma("unroll 4")

struct F32 {};
struct F16 {};
struct BF16 {};

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int grid_size() { return gridDim.x; }
DEVICE void sync_block() { __syncthreads(); }
DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

/// Copies 16 bytes from global to shared memory in the background, or 16 zero bytes where `valid` is false.
DEVICE void copy_async(void *to, const void *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `N` of this thread's groups of copies are under way.
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

/// Four 8×8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrix_x4(u32 *r, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrix_x4_transposed(u32 *r, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
/// Two matrices; the addresses of lanes 16 to 31 are not used.
DEVICE void load_matrix_x2_transposed(u32 *r, const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

template <class T> DEVICE void mma(float *c, const u32 *a, const u32 *b);
#define DEFINE_MMA(T, name)                                                                                            \
    template <> DEVICE void mma<T>(float *c, const u32 *a, const u32 *b) {                                             \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "      \
                     "{%8,%9}, {%0,%1,%2,%3};"                                                                         \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                              \
    }
DEFINE_MMA(F16, "f16")
DEFINE_MMA(BF16, "bf16")
#undef DEFINE_MMA

/// Two floats, rounded to nearest even, in one register; `low` has the lower address.
template <class T> DEVICE u32 pack(float low, float high);
template <> DEVICE u32 pack<BF16>(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <> DEVICE u32 pack<F16>(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

template <class T> DEVICE float to_float(u16 x);
template <> DEVICE float to_float<BF16>(u16 x) { return __uint_as_float((u32)x << 16); }
template <> DEVICE float to_float<F16>(u16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
    return r;
}

DEVICE float bits_to_float(u32 x) { return __uint_as_float(x); }
DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }
DEVICE float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

#else
#include "emulator/device.h"
#endif

// ---- the same for every target

DEVICE float negative_infinity() { return bits_to_float(0xff800000u); }
DEVICE float not_a_number() { return bits_to_float(0x7fc00000u); }
DEVICE bool is_finite(float x) { return (float_to_bits(x) & 0x7f800000u) != 0x7f800000u; }
template <class T> DEVICE float low(u32 pair) { return to_float<T>((u16)pair); }
template <class T> DEVICE float high(u32 pair) { return to_float<T>((u16)(pair >> 16)); }

/// Whether both 16-bit numbers of a pair are finite.
template <class T> DEVICE bool pair_is_finite(u32 pair);
template <> DEVICE bool pair_is_finite<F16>(u32 pair) {
    return (pair & 0x7c00u) != 0x7c00u && (pair & 0x7c000000u) != 0x7c000000u;
}
template <> DEVICE bool pair_is_finite<BF16>(u32 pair) {
    return (pair & 0x7f80u) != 0x7f80u && (pair & 0x7f800000u) != 0x7f800000u;
}

/// How elements lie in memory, one at a time.
template <class T> struct Element {
    typedef u16 Stored;
    static DEVICE float load(const void *data, i64 at) { return to_float<T>(((const u16 *)data)[at]); }
    static DEVICE float store(void *data, i64 at, float x) {
        u16 rounded = (u16)pack<T>(x, 0.f);
        ((u16 *)data)[at] = rounded;
        return to_float<T>(rounded);
    }
};
template <> struct Element<F32> {
    typedef float Stored;
    static DEVICE float load(const void *data, i64 at) { return ((const float *)data)[at]; }
    static DEVICE float store(void *data, i64 at, float x) { return ((float *)data)[at] = x; }
};

/// What a mask adds to a score in powers of two: −∞ hides.
DEVICE float mask_value(const MaskOperand &mask, i64 at) {
    const float LOG2_E = 1.44269504088896340736f;
    if (mask.kind == MASK_BOOLEAN) return ((const unsigned char *)mask.data)[at] ? 0.f : negative_infinity();
    if (mask.kind == MASK_F32) return Element<F32>::load(mask.data, at) * LOG2_E;
    if (mask.kind == MASK_F16) return Element<F16>::load(mask.data, at) * LOG2_E;
    return Element<BF16>::load(mask.data, at) * LOG2_E;
}
