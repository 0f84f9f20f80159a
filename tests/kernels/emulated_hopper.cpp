// tile_states or tile_outputs for Hopper on a CPU; TEXT is their source without hopper.cuh, KERNEL the name.
#include "emulated_hopper.h"
#include <utility>
#include TEXT

template <class T> T copied(const void* from) {  // which need not be aligned as T is
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
template <class... A, size_t... i> void call(void (*kernel)(A...), void** arguments, std::index_sequence<i...>) {
    kernel(copied<A>(arguments[i])...);
}
template <class... A> void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>{});
}
// arguments: the address of each, as the driver takes them; x, y: blocks; memory: bytes that a block asks for.
extern "C" void run(void** arguments, unsigned x, unsigned y, int threads, int memory) {
    block_bytes = memory - 1024;  // as much may be lost to where blocks begin
    auto block = [=] {
        if (threadIdx.x == 0) std::memset(block_memory[emulator.block()], 0xff, sizeof *block_memory);  // NaN, until written
        __syncthreads();
        call(KERNEL, arguments);
    };
#ifdef CLUSTER
    emulator.run(x, y, threads, block, CLUSTER);
#else
    emulator.run(x, y, threads, block);
#endif
}
