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

static _Atomic uintptr_t low, high; /* code whose requests count; high = 0: everybody's */
static atomic_int below;            /* so do those of whom it calls */
static _Atomic size_t least;        /* bytes of the smallest request that counts */
static atomic_long first, last;     /* requests that fail, the first is 1 */
static atomic_long seen, refused;
static atomic_int armed;

/* Frames that are looked at for the code: the host's functions are not deep when they ask for memory. */
enum { DEPTH = 12 };

static int inside(void *address) {
    return (uintptr_t)address >= low && (uintptr_t)address < high;
}

static int counts(void *caller) {
    if (!high || inside(caller)) return 1;
    /* Looking takes a while. After the last that fails nobody needs the number. */
    if (!below || seen >= last) return 0;
    void *frames[DEPTH];
    for (int i = backtrace(frames, DEPTH); i-- > 0;)
        if (inside(frames[i])) return 1;
    return 0;
}

static int fails(size_t size, void *caller) {
    if (!armed || size < least || !counts(caller)) return 0;
    long number = ++seen;
    if (number < first || number > last) return 0;
    refused++;
    return 1;
}

void failing_malloc_arm(uintptr_t from, uintptr_t to, size_t bytes, long nth, long count, int deep) {
    void *frame;
    backtrace(&frame, 1); /* the first time it loads a library */
    low = from;
    high = to;
    below = deep;
    least = bytes;
    first = nth;
    last = nth + count - 1;
    seen = 0;
    refused = 0;
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

void *memalign(size_t align, size_t size) {
    return fails(size, CALLER) ? none() : __libc_memalign(align, size);
}

void *aligned_alloc(size_t align, size_t size) {
    return fails(size, CALLER) ? none() : __libc_memalign(align, size);
}

int posix_memalign(void **memory, size_t align, size_t size) {
    void *got = fails(size, CALLER) ? NULL : __libc_memalign(align, size);
    if (!got) return ENOMEM;
    *memory = got;
    return 0;
}
