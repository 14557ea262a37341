// A CUDA driver (libcuda.so.1) with one device that is the emulator: enough of the driver's interface for the host code of
// this project, so that it is tested without a GPU.
//
// Streams are as lazy as they may be: what is enqueued happens when somebody waits for it, here or on another stream through
// an event. Whoever forgets to order two streams reads memory that was not written, or was freed. Only the default stream
// works at once.
#include "../params.cuh"
#include "runtime.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

enum Result { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, NOT_READY = 600 };

struct Stream {
    std::deque<std::function<void()>> work;
    u64 enqueued = 0, done = 0;
    bool capturing = false;
};

struct Event {
    Stream *stream = nullptr;
    u64 moment = 0;
};

std::recursive_mutex mutex;
typedef std::lock_guard<std::recursive_mutex> Lock;

/// The only context; its address is its handle.
int context;
thread_local std::vector<void *> current;

void run(Stream *stream, u64 moment) {
    while (stream->done < moment && !stream->work.empty()) {
        std::function<void()> item = std::move(stream->work.front());
        stream->work.pop_front();
        stream->done++;
        item();
    }
}

void enqueue(Stream *stream, std::function<void()> item) {
    if (!stream) return item();
    stream->work.push_back(std::move(item));
    stream->enqueued++;
}

size_t parameter_size(const std::string &kernel) {
    if (kernel.rfind("dfa_copy", 0) == 0) return sizeof(CopyParams);
    return sizeof(AttentionParams);
}

struct Function {
    std::string name;
    emulator::Entry entry;
};

std::map<std::string, std::unique_ptr<Function>> functions;

/// What the device says of itself: an A100.
int attribute(int which) {
    switch (which) {
    case 16: return 108;        // multiprocessors
    case 75: return 8;          // compute capability, major
    case 76: return 0;          // minor
    case 97: return 163 << 10;  // shared memory per block, opt-in
    case 115: return 1;         // memory pools
    }
    return 0;
}

} // namespace

#define API extern "C" int

API cuInit(unsigned) { return SUCCESS; }
API cuGetErrorName(int code, const char **text) {
    *text = code == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR";
    return SUCCESS;
}
API cuGetErrorString(int, const char **text) {
    *text = "emulated";
    return SUCCESS;
}
API cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}
API cuDeviceGetName(char *name, int size, int) {
    strncpy(name, "emulator", size);
    return SUCCESS;
}
API cuDriverGetVersion(int *version) {
    *version = 0;
    return SUCCESS;
}
API cuDeviceGetAttribute(int *value, int which, int) {
    *value = attribute(which);
    return SUCCESS;
}
API cuDevicePrimaryCtxRetain(void **handle, int) {
    *handle = &context;
    return SUCCESS;
}
API cuCtxPushCurrent_v2(void *handle) {
    current.push_back(handle);
    return SUCCESS;
}
API cuCtxPopCurrent_v2(void **handle) {
    if (current.empty()) return INVALID_VALUE;
    *handle = current.back();
    current.pop_back();
    return SUCCESS;
}
API cuCtxGetCurrent(void **handle) {
    *handle = current.empty() ? nullptr : current.back();
    return SUCCESS;
}
API cuCtxGetDevice(int *device) {
    *device = 0;
    return current.empty() ? INVALID_VALUE : SUCCESS;
}

API cuStreamCreate(Stream **stream, unsigned) {
    *stream = new Stream;
    return SUCCESS;
}
API cuStreamGetCtx(Stream *, void **handle) {
    *handle = &context;
    return SUCCESS;
}
API cuStreamIsCapturing(Stream *stream, int *status) {
    *status = stream && stream->capturing;
    return SUCCESS;
}
API cuStreamSynchronize(Stream *stream) {
    Lock lock(mutex);
    if (stream) run(stream, stream->enqueued);
    return SUCCESS;
}
API cuStreamWaitEvent(Stream *stream, Event *event, unsigned) {
    Lock lock(mutex);
    const Event moment = *event;
    if (moment.stream) enqueue(stream, [moment] { run(moment.stream, moment.moment); });
    return SUCCESS;
}
/// For tests: as if a graph were being captured on the stream.
API emulator_capture(Stream *stream, int on) {
    stream->capturing = on;
    return SUCCESS;
}

API cuEventCreate(Event **event, unsigned) {
    *event = new Event;
    return SUCCESS;
}
API cuEventRecord(Event *event, Stream *stream) {
    Lock lock(mutex);
    event->stream = stream;
    event->moment = stream ? stream->enqueued : 0;
    return SUCCESS;
}
API cuEventQuery(Event *event) {
    Lock lock(mutex);
    return !event->stream || event->stream->done >= event->moment ? SUCCESS : NOT_READY;
}
API cuEventSynchronize(Event *event) {
    Lock lock(mutex);
    if (event->stream) run(event->stream, event->moment);
    return SUCCESS;
}
API cuEventDestroy_v2(Event *event) {
    delete event;
    return SUCCESS;
}

API cuModuleLoadData(void **module, const void *) {
    *module = &context;
    return SUCCESS;
}
API cuModuleGetFunction(Function **function, void *, const char *name) {
    Lock lock(mutex);
    std::unique_ptr<Function> &known = functions[name];
    if (!known) {
        // The kernels are in this library, which the process has not made global.
        Dl_info self;
        dladdr((void *)&cuInit, &self);
        void *library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
        known.reset(new Function{name, (emulator::Entry)dlsym(library, name)});
    }
    *function = known.get();
    return known->entry ? SUCCESS : NOT_FOUND;
}
API cuFuncSetAttribute(Function *, int, int) { return SUCCESS; }
API cuLaunchKernel(
    Function *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared, Stream *stream, void **params,
    void **
) {
    if (y != 1 || z != 1 || current.empty()) return INVALID_VALUE;
    Lock lock(mutex);
    const unsigned char *bytes = (const unsigned char *)params[0];
    std::vector<unsigned char> copy(bytes, bytes + parameter_size(function->name));
    enqueue(stream, [=] { emulator::launch((int)x, (int)threads, shared, function->entry, copy.data()); });
    return SUCCESS;
}

API cuMemPoolCreate(void **pool, const void *) {
    *pool = &context;
    return SUCCESS;
}
API cuMemPoolSetAttribute(void *, int, void *) { return SUCCESS; }
API cuMemAllocFromPoolAsync(u64 *address, size_t bytes, void *, Stream *) {
    void *memory = nullptr;
    if (posix_memalign(&memory, 256, bytes)) return OUT_OF_MEMORY;
    memset(memory, 0xcd, bytes);
    *address = (u64)(uintptr_t)memory;
    return SUCCESS;
}
API cuMemFreeAsync(u64 address, Stream *stream) {
    Lock lock(mutex);
    enqueue(stream, [address] { free((void *)(uintptr_t)address); });
    return SUCCESS;
}
API cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, Stream *stream) {
    Lock lock(mutex);
    enqueue(stream, [=] { memmove((void *)(uintptr_t)to, (const void *)(uintptr_t)from, bytes); });
    return SUCCESS;
}
API cuMemAllocManaged(u64 *address, size_t bytes, unsigned) { return cuMemAllocFromPoolAsync(address, bytes, nullptr, nullptr); }
API cuMemFree_v2(u64 address) {
    free((void *)(uintptr_t)address);
    return SUCCESS;
}
API cuMemHostAlloc(void **memory, size_t bytes, unsigned) {
    return posix_memalign(memory, 64, bytes) ? OUT_OF_MEMORY : SUCCESS;
}
