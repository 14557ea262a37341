/* Makes chosen allocations of a process fail. To be preloaded; does nothing until it is armed.
 *
 * Owns malloc, calloc, realloc and the aligned ones of the process, and hands them to glibc's. Takes no memory itself.
 */
#include <errno.h>
#include <execinfo.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static _Atomic uintptr_t low, high; /* callers that count; high = 0: all of them */
static _Atomic size_t least;        /* bytes of the smallest request that counts */
static _Atomic long first, last;    /* requests that fail, the first is 1 */
static atomic_long seen, refused;
static atomic_int armed, deep;

enum { DEPTH = 12 };

static int fails(size_t size, void *caller) {
    if (!atomic_load(&armed) || size < atomic_load(&least)) return 0;
    uintptr_t from = (uintptr_t)caller, end = atomic_load(&high);
    if (end && atomic_load(&deep)) {
        if (atomic_load(&seen) >= atomic_load(&last)) return 0;
        void *frames[DEPTH];
        int count = backtrace(frames, DEPTH), found = 0;
        for (int i = 0; i < count; i++) found |= (uintptr_t)frames[i] >= low && (uintptr_t)frames[i] < end;
        if (!found) return 0;
    } else if (end && (from < atomic_load(&low) || from >= end)) {
        return 0;
    }
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (number < atomic_load(&first) || number > atomic_load(&last)) return 0;
    atomic_fetch_add(&refused, 1);
    return 1;
}

void failing_malloc_arm(uintptr_t from, uintptr_t to, size_t bytes, long nth, long count, int below) {
    void *frame;
    backtrace(&frame, 1); /* it loads a library when it is first called */
    low = from, high = to, least = bytes, first = nth, last = nth + count - 1, seen = 0, refused = 0;
    deep = below;
    armed = 1;
}

/* Requests that counted since it was armed, and how many of them failed. */
long failing_malloc_disarm(long *failed) {
    armed = 0;
    *failed = refused;
    return seen;
}

#define CALLER __builtin_return_address(0)

static void *none(void) {
    errno = ENOMEM;
    return NULL;
}

void *malloc(size_t size) {
    return fails(size, CALLER) ? none() : __libc_malloc(size);
}

void *calloc(size_t count, size_t size) {
    size_t all;
    if (__builtin_mul_overflow(count, size, &all)) return none();
    return fails(all, CALLER) ? none() : __libc_calloc(count, size);
}

void *realloc(void *old, size_t size) {
    return fails(size, CALLER) ? none() : __libc_realloc(old, size);
}

void *aligned_alloc(size_t align, size_t size) {
    return fails(size, CALLER) ? none() : __libc_memalign(align, size);
}

void *memalign(size_t align, size_t size) {
    return fails(size, CALLER) ? none() : __libc_memalign(align, size);
}

int posix_memalign(void **memory, size_t align, size_t size) {
    if (fails(size, CALLER)) return ENOMEM;
    void *got = __libc_memalign(align, size);
    if (!got) return ENOMEM;
    *memory = got;
    return 0;
}
