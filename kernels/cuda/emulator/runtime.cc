#include "runtime.h"

#include "../params.cuh"
#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <memory>

namespace {

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack, its pointer in *save, and goes on with the stack `to`.
extern "C" void emulator_switch(void **save, void *to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

struct Stack {
    void *pointer;
    void start(char *memory, size_t size, void (*body)()) {
        void **top = (void **)((uintptr_t)(memory + size) / 16 * 16);
        *--top = nullptr;
        *--top = (void *)body;
        top -= 6;
        pointer = top;
    }
    void go_to(Stack &next) { emulator_switch(&pointer, next.pointer); }
};
#else
#include <ucontext.h>
struct Stack {
    ucontext_t context;
    void start(char *memory, size_t size, void (*body)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = memory;
        context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, body, 0);
    }
    void go_to(Stack &next) { swapcontext(&context, &next.context); }
};
#endif

struct Copy {
    void *to;
    const void *from;
    bool valid;
};

struct Thread {
    Stack stack;
    bool done;
    /// Groups of copies that have not happened; the last one is not committed yet.
    std::vector<std::vector<Copy>> copies;
};

/// A point that `size` threads reach together.
struct Barrier {
    int waiting = 0;
    unsigned generation = 0;
};

struct Warp {
    Barrier barrier;
    emulator::Collective compute;
    emulator::Lane in[32];
    /// Two, by turns: a lane may read its result while the others hand in the next operands.
    emulator::Lane out[2][32];
};

struct Block {
    int index, grid, threads, current;
    std::vector<Thread> thread;
    std::vector<Warp> warp;
    Barrier barrier;
    unsigned char *shared;
    Stack scheduler;
    emulator::Entry entry;
    const void *params;
    /// Grows whenever anything happens; a round without means that all threads wait for ever.
    u64 progress;
};

Block *block;

const size_t STACK = 256 << 10;

void body() {
    block->entry(block->params);
    block->thread[block->current].done = true;
    block->progress++;
    Thread &self = block->thread[block->current];
    self.stack.go_to(block->scheduler);
    abort();
}

void yield() {
    Thread &self = block->thread[block->current];
    self.stack.go_to(block->scheduler);
}

[[noreturn]] void fail(const char *what) {
    fprintf(stderr, "emulator: block %d, thread %d: %s\n", block->index, block->current, what);
    abort();
}

void wait(Barrier &barrier, unsigned generation) {
    while (barrier.generation == generation) yield();
}

} // namespace

namespace emulator {

int thread_index() { return block->current; }
int block_index() { return block->index; }
int grid_size() { return block->grid; }
unsigned char *shared_memory() { return block->shared; }

void sync_block() {
    Barrier &barrier = block->barrier;
    const unsigned generation = barrier.generation;
    block->progress++;
    if (++barrier.waiting == block->threads) {
        barrier.waiting = 0;
        barrier.generation++;
    } else {
        wait(barrier, generation);
    }
}

Lane collect(const Lane &lane, Collective compute) {
    Warp &warp = block->warp[block->current / 32];
    Barrier &barrier = warp.barrier;
    const int index = block->current % 32;
    const unsigned generation = barrier.generation;
    if (barrier.waiting == 0) warp.compute = compute;
    if (warp.compute != compute) fail("lanes of a warp do not agree on an instruction");
    warp.in[index] = lane;
    block->progress++;
    if (++barrier.waiting == 32) {
        compute(warp.in, warp.out[generation % 2]);
        barrier.waiting = 0;
        barrier.generation++;
    } else {
        wait(barrier, generation);
    }
    return warp.out[generation % 2][index];
}

void copy_async(void *to, const void *from, bool valid) {
    if ((uintptr_t)to % 16 || (valid && (uintptr_t)from % 16)) fail("cp.async of 16 bytes at an address that is not a multiple of 16");
    block->thread[block->current].copies.back().push_back({to, from, valid});
}

void copy_commit() { block->thread[block->current].copies.emplace_back(); }

void copy_wait(int groups) {
    auto &copies = block->thread[block->current].copies;
    while ((int)copies.size() - 1 > groups) {
        for (const Copy &copy : copies.front()) {
            if (copy.valid) {
                memcpy(copy.to, copy.from, 16);
            } else {
                memset(copy.to, 0, 16);
            }
        }
        copies.erase(copies.begin());
    }
}

void launch(int blocks, int threads, size_t shared, Entry entry, const void *params) {
    if (threads % 32) {
        fprintf(stderr, "emulator: %d threads are no whole warps\n", threads);
        abort();
    }
    Block running;
    Block *const outer = block;
    block = &running;
    std::unique_ptr<char[]> stacks(new char[STACK * threads]);
    running.grid = blocks;
    running.threads = threads;
    running.entry = entry;
    running.params = params;
    running.progress = 0;
    for (int index = 0; index < blocks; index++) {
        running.index = index;
        running.thread.assign(threads, {});
        running.warp.assign(threads / 32, {});
        running.barrier = {};
        // A fresh allocation of just this size: a sanitizer sees whatever leaves it. Aligned as on the device.
        void *memory = nullptr;
        if (posix_memalign(&memory, 128, shared)) abort();
        running.shared = (unsigned char *)memory;
        memset(running.shared, 0xcd, shared);
        for (int t = 0; t < threads; t++) {
            running.thread[t].copies.resize(1);
            running.thread[t].stack.start(stacks.get() + STACK * t, STACK, body);
        }
        for (int left = threads; left > 0;) {
            const u64 before = running.progress;
            for (int t = 0; t < threads; t++) {
                if (running.thread[t].done) continue;
                running.current = t;
                running.scheduler.go_to(running.thread[t].stack);
                if (running.thread[t].done) left--;
            }
            if (before == running.progress) fail("every thread waits for another one");
        }
        free(memory);
    }
    block = outer;
}

} // namespace emulator
