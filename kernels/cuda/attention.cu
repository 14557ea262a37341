// One tensor-core attention kernel, chosen by macros:
//   DFA_NAME    the kernel's name
//   DFA_TYPE    F16 | BF16
//   DFA_DIM     head dimension of q, k and v: a multiple of 8, at most 128
//   DFA_BM      queries per block: 64 | 128
//   DFA_MODE    FULL | CAPTURE | WINDOW
//   DFA_MASKED  false | true
//   DFA_BLOCKS  blocks per multiprocessor that registers must allow
// May be included several times.
#include "attention.cuh"

#define DFA_KERNEL AttentionKernel<DFA_TYPE, DFA_DIM, DFA_BM, DFA_MODE, DFA_MASKED>
KERNEL(DFA_NAME, (Tile<DFA_DIM, DFA_BM>::THREADS), DFA_BLOCKS, AttentionParams) {
    SHARED_MEMORY(shared);
    DFA_KERNEL kernel(p, shared);
    kernel.run();
}
#undef DFA_KERNEL
