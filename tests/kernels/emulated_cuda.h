// Enough of CUDA C++ to run leetdist's kernels on a CPU: a thread of a block is a fiber, and fibers take turns at
// barriers and shuffles. Slow, exact in what it computes, and blind to races within a turn.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define asm(...) ((void)0)  // conversions of 16-bit types: not emulated

using std::max;
using std::min;
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct float4 {
    float x, y, z, w;
};
inline dim3 threadIdx, blockIdx, blockDim;

struct Emulator {
    static constexpr int BLOCKS = 2, LARGEST = 256 * BLOCKS;  // fibers of the blocks that are run together
    ucontext_t beginning;
    jmp_buf scheduler, fibers[LARGEST];  // swapcontext would ask the system for its signals at each turn
    std::vector<char> stacks[LARGEST];
    std::function<void()> kernel;
    bool begun[LARGEST], done[LARGEST];
    int threads = 0, current = 0, cluster = 1, arrived[BLOCKS], warp_arrived[LARGEST / 32];
    unsigned first_block = 0, generation[BLOCKS], warp_generation[LARGEST / 32];
    double exchanged[2][LARGEST];
    bool any[BLOCKS][2] = {};  // of the threads at a barrier, by turns

    int block() const { return current / threads; }  // of the cluster
    void resume(int fiber) { threadIdx.x = fiber % threads, blockIdx.x = first_block + fiber / threads; }
    void yield() {
        const int me = current;
        if (!_setjmp(fibers[me])) _longjmp(scheduler, 1);
        resume(me);
    }
    void barrier(int& count, unsigned& turn, int size) {
        const unsigned now = turn;
        if (++count == size) {
            count = 0, ++turn;
        } else {
            while (turn == now) yield();
        }
    }
    double shuffle(double value, int mask) {
        const int me = current, warp = me / 32;
        double* const box = exchanged[warp_generation[warp] % 2];
        box[me] = value;
        barrier(warp_arrived[warp], warp_generation[warp], 32);
        return box[me ^ mask];
    }
    static void enter();
    void go_on() {  // comes back through `scheduler`
        if (begun[current]) _longjmp(fibers[current], 1);
        begun[current] = true;
        stacks[current].resize(1 << 16);
        getcontext(&beginning);
        beginning.uc_stack.ss_sp = stacks[current].data();
        beginning.uc_stack.ss_size = stacks[current].size();
        makecontext(&beginning, enter, 0);
        setcontext(&beginning);
    }
    void run(unsigned blocks_x, unsigned blocks_y, int count, std::function<void()> function, int together = 1) {
        kernel = std::move(function), threads = count, blockDim.x = count, cluster = together;
        for (blockIdx.y = 0; blockIdx.y < blocks_y; ++blockIdx.y)
            for (first_block = 0; first_block < blocks_x; first_block += cluster) {
                for (int i = 0; i < cluster * threads; ++i) done[i] = begun[i] = false;
                for (bool busy = true; busy;) {
                    busy = false;
                    for (current = 0; current < cluster * threads; ++current)
                        if (!done[current]) {
                            busy = true, resume(current);
                            if (!_setjmp(scheduler)) go_on();
                        }
                }
            }
    }
};
inline Emulator emulator;
inline void Emulator::enter() {
    emulator.kernel();
    emulator.done[emulator.current] = true;
    _longjmp(emulator.scheduler, 1);
}

inline void __syncthreads() {
    const int block = emulator.block();
    emulator.barrier(emulator.arrived[block], emulator.generation[block], emulator.threads);
}
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return T(emulator.shuffle(value, mask)); }
inline bool __syncthreads_or(bool x) {
    bool& any = emulator.any[emulator.block()][emulator.generation[emulator.block()] % 2];
    any |= x;
    __syncthreads();
    const bool found = any;
    __syncthreads();
    any = false;
    return found;
}
inline float __uint_as_float(unsigned x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
