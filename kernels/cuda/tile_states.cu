// leetdist.kernels.pytorch.block.tile_states on Hopper: see hopper_tile.cuh.

#include "hopper_tile.cuh"

constexpr int STAGES = 3;
constexpr int STAGE = ROWS_BYTES + COLUMNS_BYTES;

extern "C" __global__ void __launch_bounds__(THREADS, 2)
tile_states(OPERAND(b), OPERAND(c), float* out, TILES, float scale) {
    Tile tile(log_decay, table, heads, tiles, tile_size, tokens, splits);
    const float log_gamma = log_decay[tile.head], g = log_gamma * LOG2E;
    tile.within_reach(log_gamma);
    const Word base = shared_memory(), weights = base + STAGES * STAGE, arrivals = weights + WEIGHTS_BYTES;
    auto fetch_chunk = [&](int step) {
        if (step >= tile.chunks || threadIdx.x > 0) return;
        const Word to = base + step % STAGES * STAGE, arrival = arrivals + step % STAGES * 8;
        expect(arrival, STAGE);
        fetch<ROWS>(to, b, tile.chunk(step, b_share), arrival);
        fetch<COLUMNS>(to + ROWS_BYTES, c, tile.chunk(step, c_share, tile.column), arrival);
    };
    if (threadIdx.x == 0)
        for (int stage = 0; stage < STAGES; stage++) init_arrival(arrivals + stage * 8);
    publish();
    __syncthreads();
    for (int step = 0; step < STAGES - 1; step++) fetch_chunk(step);
    write_weights(weights, g, 1.0f, CHUNK);

    float state[PARTS][HELD];
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < HELD; i++) state[part][i] = 0.0f;
    for (int step = 0; step < tile.chunks; step++) {
        const Word b_i = base + step % STAGES * STAGE, c_i = b_i + ROWS_BYTES;
        const int count = tile.count(step);
        wait_arrival(arrivals + step % STAGES * 8, step / STAGES & 1);
        __syncthreads();  // all have read the chunk before
        fetch_chunk(step + STAGES - 1);
        if (count < CHUNK) {
            zero_rows<ROWS>(b_i, count), zero_rows<COLUMNS>(c_i, count);
            write_weights(weights, g, 1.0f, count);
            publish();
            __syncthreads();
        }
        wait_products<0>();  // for ptxas, which does not see that none is under way
        const float fade = exp2_(g * float(count));
        Weighted weighted[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            Word x[4][4];
            load_left(c_i + part * BLOCK + place_transposed(), x);
            weighted[part].set(x, weights);
            advance(state[part], fade, weighted[part], b_i);
        }
        wait_products<0>();
#pragma unroll
        for (int part = 0; part < PARTS; part++) here(state[part]), here(weighted[part]);
    }

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int all = COLUMNS * int(splits);
    out += Offset(tile.program) * ROWS * all + 2 * (lane % 4) * all + tile.column + 16 * warp + lane / 4;
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < HELD; i++)
            out[(8 * (i / 4) + i % 2) * all + 64 * part + i / 2 % 2 * 8] = scale * state[part][i];
}
