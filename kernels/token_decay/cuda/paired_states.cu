// tile_states.cu for two heads that share b, in one block: b is fetched once. Each head has 64 columns, and its own
// decays; products and their order are those of a head by itself, so the bits are too. A tile's number counts pairs.

#include "../../constant_decay/cuda/hopper_tile.cuh"

static_assert(PARTS == 1 && !LAST_FETCHES);
constexpr int HEADS = 2, STAGES = 3;
constexpr int STAGE = ROWS_BYTES + HEADS * COLUMNS_BYTES;

extern "C" __global__ void __launch_bounds__(THREADS, 2)
paired_states(OPERAND(b), OPERAND(c), float* out, TILES, Offset unread, float scale) {
    Tile tile(TILE);
    if (tile.number == unread) return;
    const int first_head = HEADS * tile.head, thread = thread_number();
    Weights weights[HEADS];
    int skip[HEADS], most = 0;  // steps of the walk that a head leaves out
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        tile.head = first_head + h;
        weights[h].start(tile, log_decay TOKENS_);
        weights[h].leave_out(tile);
        skip[h] = tile.chunks, most = max(most, tile.chunks);
    }
    tile.chunks = most;
    const Word base = shared_memory(), slots = base + STAGES * STAGE, all_weights = slots + STAGES * HEADS * SLOT;
    const Word arrivals = all_weights + HEADS * Weights::BYTES;
    auto slot = [&](int step, int h) { return slots + (step % STAGES * HEADS + h) * SLOT; };
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        skip[h] = most - skip[h];
        tile.head = first_head + h;
        weights[h].place(all_weights + h * Weights::BYTES, tile, log_decay TOKENS_);
    }
    auto fetch_chunk = [&](int step) {
        if (step >= tile.chunks) return;
        const Word to = base + step % STAGES * STAGE, arrival = arrivals + step % STAGES * 8;
        const int first = tile.first(step), count = tile.count(step);
        expect(arrival, STAGE + weights[0].bytes(count) + weights[1].bytes(count));
        fetch<ROWS>(to, b, tile.chunk(step, b_share), arrival);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            tile.head = first_head + h;
            fetch<COLUMNS>(to + ROWS_BYTES + h * COLUMNS_BYTES, c, tile.chunk(step, c_share), arrival);
            weights[h].fetch(slot(step, h), first, count, arrival);
        }
    };
    if (thread == 0)
        for (int stage = 0; stage < STAGES; stage++) init_arrival(arrivals + stage * 8);
    publish();
    __syncthreads();
    if (thread == 0)
        for (int step = 0; step < STAGES - 1; step++) fetch_chunk(step);

    float state[HEADS][HELD];
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int i = 0; i < HELD; i++) state[h][i] = 0.0f;
    for (int step = 0; step < tile.chunks; step++) {
        const Word b_i = base + step % STAGES * STAGE, c_i = b_i + ROWS_BYTES;
        const int count = tile.count(step);
        wait_arrival(arrivals + step % STAGES * 8, step / STAGES & 1);
        meet();  // all have read the chunk before
        if (thread == 0) fetch_chunk(step + STAGES - 1);
        if (count < CHUNK) {
            zero_rows<ROWS>(b_i, count);
            for (int h = 0; h < HEADS; h++) zero_rows<COLUMNS>(c_i + h * COLUMNS_BYTES, count);
            publish();
            meet();
        }
        wait_products<0>();  // for ptxas, which does not see that none is under way
        Weighted weighted[HEADS];
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float faded;
            weights[h].read(slot(step, h), count, faded);
            if (step == skip[h])  // what is older decays to nothing, or was no number
#pragma unroll
                for (int i = 0; i < HELD; i++) state[h][i] = 0.0f;
            Word x[4][4];
            load_left(c_i + h * COLUMNS_BYTES + place_transposed(), x);
            weighted[h].set(x, weights[h].pairs);
            fade(state[h], faded);
            advance(state[h], weighted[h], b_i);
        }
        wait_products<0>();
#pragma unroll
        for (int h = 0; h < HEADS; h++) here(state[h]), here(weighted[h]);
    }

    const int lane = thread % 32, warp = thread / 32;
    const Offset pair = tile.program / int(tiles);
    out += ((HEADS * pair) * tiles + tile.number) * ROWS * COLUMNS + 2 * (lane % 4) * COLUMNS + 16 * warp + lane / 4;
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int i = 0; i < HELD; i++)
            out[h * tiles * ROWS * COLUMNS + (8 * (i / 4) + i % 2) * COLUMNS + i / 2 % 2 * 8] = scale * state[h][i];
}
