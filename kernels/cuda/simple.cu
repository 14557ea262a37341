// One attention kernel on CUDA cores, chosen by macros: DFA_NAME, DFA_TYPE (F32 | F16 | BF16), DFA_DIM (the largest
// head dimension: a multiple of 4) and DFA_MODE. May be included several times.
#include "simple.cuh"

#define DFA_KERNEL SimpleKernel<DFA_TYPE, DFA_DIM, DFA_MODE>
KERNEL(DFA_NAME, 128, 1, AttentionParams) {
    SHARED_MEMORY(shared);
    DFA_KERNEL kernel(p, shared);
    kernel.run();
}
#undef DFA_KERNEL
