// Runs a grid of emulated threads on the calling thread, block after block.
#pragma once
#include <cstddef>

namespace emulator {

typedef void (*Entry)(const void *params);

/// Calls `entry` once per thread of every block. Shared memory has `shared` bytes, filled with garbage for each block.
///
/// Prints and aborts if the threads of a block wait for one another for ever, which on a GPU would be undefined.
void launch(int blocks, int threads, size_t shared, Entry entry, const void *params);

} // namespace emulator
