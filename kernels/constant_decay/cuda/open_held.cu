// What open_chunk.cu reads of states that are put into slots: rounded, as open_held.cuh lays them out.
//
// A block takes COLUMNS of one head's state, (ROWS, COLUMNS * SPLITS) fp32, contiguous. Compile as open_chunk.cu.

#pragma nv_diag_suppress 177  // as there

#include "hopper_tile.cuh"
#include "hopper_held.cuh"
#include "hopper_warp.cuh"
#include "open_held.cuh"

extern "C" __global__ void __launch_bounds__(2 * COLUMNS) open_held(const float* states, Bits* held) {
    constexpr int WIDTH = COLUMNS * SPLITS;
    const int lane = threadIdx.x % 32, warp = blockIdx.x % SPLITS * (COLUMNS / 16) + threadIdx.x / 32;
    const Offset head = blockIdx.x / SPLITS;
    states += head * ROWS * WIDTH + lane % 4 * 2 * WIDTH + 16 * warp + lane / 4 * 2;
    held += (head * (WIDTH / 16) + warp) * (Held::BYTES / 2);
    float state[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i += 4)
#pragma unroll
        for (int j = 0; j < 2; j++) load_two(states + (2 * i + j) * WIDTH, state[i + j], state[i + 2 + j]);
    Units units;
    units.set(state);
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
        Word x[4];
        hold(state + 8 * i, units.power, x);
        Held::put(x, i, held);
    }
    Held::put_units(units.unit, held);
}
