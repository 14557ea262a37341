// Runs emulated kernels on request: a process of its own, so that a sanitizer's verdict ends only this process.
//
// Requests come on stdin, one after another, until it ends:
//   u32 bytes of the kernel's name, name
//   u32 blocks, u32 threads, u64 bytes of shared memory
//   u32 bytes of the parameters, parameters
//   u32 buffers, and for each:
//     u32 where its pointer lies in the parameters, u32 whether it is wanted back, u64 bytes, contents
// The answer on stdout is the contents of the buffers that are wanted back. All numbers are little-endian.
#include "../params.cuh"
#include "runtime.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <vector>

static void read(void *to, size_t size) {
    if (fread(to, 1, size, stdin) != size) {
        fprintf(stderr, "emulator: a request ends early\n");
        exit(3);
    }
}

template <class T> static T number() {
    T x;
    read(&x, sizeof x);
    return x;
}

struct Buffer {
    uint32_t pointer_at, wanted;
    uint64_t size;
    unsigned char *data;
};

int main() {
    uint32_t name_size;
    while (fread(&name_size, 1, sizeof name_size, stdin) == sizeof name_size) {
        std::string name(name_size, 0);
        read(&name[0], name_size);
        const uint32_t blocks = number<uint32_t>(), threads = number<uint32_t>();
        const uint64_t shared = number<uint64_t>();
        std::vector<unsigned char> params(number<uint32_t>());
        read(params.data(), params.size());
        const size_t expected = name.rfind("dfa_copy", 0) == 0 ? sizeof(CopyParams) : sizeof(AttentionParams);
        if (params.size() != expected) {
            fprintf(stderr, "emulator: %s takes %zu bytes of parameters, got %zu\n", name.c_str(), expected, params.size());
            return 3;
        }
        std::vector<Buffer> buffers(number<uint32_t>());
        for (Buffer &buffer : buffers) {
            buffer.pointer_at = number<uint32_t>();
            buffer.wanted = number<uint32_t>();
            buffer.size = number<uint64_t>();
            // Just this size, so that a sanitizer sees every byte beyond it.
            buffer.data = (unsigned char *)malloc(buffer.size);
            read(buffer.data, buffer.size);
            memcpy(&params[buffer.pointer_at], &buffer.data, sizeof buffer.data);
        }
        emulator::Entry entry = (emulator::Entry)dlsym(RTLD_DEFAULT, name.c_str());
        if (!entry) {
            fprintf(stderr, "emulator: there is no kernel %s\n", name.c_str());
            return 3;
        }
        emulator::launch(blocks, threads, shared, entry, params.data());
        for (Buffer &buffer : buffers) {
            if (buffer.wanted) fwrite(buffer.data, 1, buffer.size, stdout);
            free(buffer.data);
        }
        fflush(stdout);
    }
    return 0;
}
