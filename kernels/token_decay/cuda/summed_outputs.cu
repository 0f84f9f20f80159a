// tile_outputs.cu for two heads that share c, added up: what they say is wanted only as a sum over heads.
//
//     P = sum_h (a_h b_h^T) * decay_h      o^T = sum_h from_state_h S_h^T a_h^T + c^T P^T      S_h^T = faded_h S_h^T + (c w_h)^T b_h
//
// So the scores of both go through one product with c, and half as many fp32 outputs go to memory, where they would be
// the most of what is written. In Mamba-2 these are the gradients of B and C, which the heads of a group share: a and b
// have 64 columns, and the states of two heads are as large as one of 128 x 128. Outputs are in fp32; `out`, and a tile's
// number, count pairs of heads. What is not finite is as in tile_outputs.cu.

#include "../../constant_decay/cuda/hopper_tile.cuh"
#include "../../constant_decay/cuda/hopper_lost.cuh"
#include "../../constant_decay/cuda/hopper_held.cuh"

constexpr int HEADS = 2;
constexpr int STAGE = HEADS * 2 * ROWS_BYTES + COLUMNS_BYTES;

extern "C" __global__ void __launch_bounds__(THREADS, AGAIN ? 1 : 2)
summed_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const float* states, Offset state_batch, Offset state_head,
               Offset state_tile, Offset state_row, Offset state_column, float* out, Offset out_batch, Offset out_head,
               Offset out_token, TILES, float scale, float state_scale, float added_scale, int* again) {
    if (AGAIN && !again[blockIdx.x]) return;
    Tile tile(TILE);
    out += tile.batch * out_batch + tile.head * out_head + tile.start * out_token + tile.own;
    const int thread = thread_number(), lane = thread % 32, warp = thread / 32, first_head = HEADS * tile.head;
    float state[HEADS][PARTS][HELD];
    states += tile.batch * state_batch + first_head * state_head + tile.number * state_tile;
    states += 2 * (lane % 4) * state_row + (tile.own + 16 * warp + lane / 4) * state_column;
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int i = 0; i < HELD; i++)
                state[h][part][i] = states[h * state_head + (8 * (i / 4) + i % 2) * state_row +
                                           (64 * part + i / 2 % 2 * 8) * state_column];

    // Two places of: a and b of each head, and c. Behind them scores, log-decays, tables and barriers.
    const Word base = shared_memory(), seen = base + 2 * STAGE, slots = seen + BLOCK;
    const Word all_tables = slots + 2 * HEADS * SLOT, lost_columns = all_tables + HEADS * Tables::BYTES;
    const Word arrivals = lost_columns + Lost::BYTES;
    auto slot = [&](int step, int h) { return slots + (step % 2 * HEADS + h) * SLOT; };
    auto place_a = [&](int step, int h) { return base + step % 2 * STAGE + h * ROWS_BYTES; };
    auto place_b = [&](int step, int h) { return place_a(step, HEADS + h); };
    auto place_c = [&](int step) { return place_a(step, 2 * HEADS); };
    Tables tables[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        tile.head = first_head + h;
        tables[h].place(all_tables + h * Tables::BYTES, tile, log_decay TOKENS_);
        tables[h].set(scale, state_scale, added_scale);
    }
    auto fetch_chunk = [&](int step) {
        if (step >= tile.chunks) return;
        const Word arrival = arrivals + step % 2 * 8;
        const int first = tile.first(step), count = tile.count(step);
        int bytes = STAGE;
#pragma unroll
        for (int h = 0; h < HEADS; h++) bytes += tables[h].bytes(count);
        expect(arrival, bytes);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            tile.head = first_head + h;
            fetch<ROWS>(place_a(step, h), a, tile.chunk(step, a_share), arrival);
            fetch<ROWS>(place_b(step, h), b, tile.chunk(step, b_share), arrival);
            tables[h].fetch(slot(step, h), first, count, arrival);
        }
        fetch<COLUMNS>(place_c(step), c, tile.chunk(step, c_share, tile.own), arrival);
    };
    const Lost lost(lost_columns);
    if (AGAIN) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) lost.start(state[h], h == 0);
    }
    if (thread == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        for (int i = 0; i < 2; i++) init_arrival(arrivals + i * 8);
    }
    publish();
    __syncthreads();
    if (thread == 0) fetch_chunk(0);

    for (int step = 0; step < tile.chunks; step++) {
        const Word c_i = place_c(step);
        const int count = tile.count(step);
        wait_arrival(arrivals + step % 2 * 8, step / 2 & 1);
        if (WEIGHTED) {  // v is b; reversed, a
#pragma unroll
            for (int h = 0; h < HEADS; h++)
                weigh_rows(REVERSE ? place_a(step, h) : place_b(step, h), tables[h].weights(slot(step, h)), count);
            if (AGAIN) __syncthreads();
        }
        if (AGAIN) {
            for (int zero = 0; zero < 2; zero++) {
                for (int h = 0; h < HEADS; h++) lost.find<ROWS, false>(place_b(step, h), step, count, zero);
                lost.find<COLUMNS, true>(c_i, step, count, zero);
                __syncthreads();
            }
            publish();
        }
        if (count < CHUNK) {
            for (int h = 0; h < HEADS; h++) zero_rows<ROWS>(place_b(step, h), count);
            zero_rows<COLUMNS>(c_i, count);
            publish();
        }
        meet();  // all have read the chunk before, and its scores
        wait_products<0>();  // for ptxas, which does not see that none is under way
        if (thread == 0) fetch_chunk(step + 1);

        float o[32], more[32], faded[HEADS];
        auto start_scores = [&](float (&x)[32], int h) {
            begin_products();
#pragma unroll
            for (int i = 0; i < STEPS; i++)
                product(x, by_rows(place_a(step, h)) + along_rows(i), by_rows(place_b(step, h)) + along_rows(i), i);
            end_products();
        };
        auto weigh = [&](float (&x)[32], int h) {
            tables[h].each(warp, [&](int step, const float (&d)[8]) {
#pragma unroll
                for (int i = 0; i < 8; i++) x[8 * step + i] *= d[i];
            });
        };
        start_scores(o, 0);
        tables[0].read(slot(step, 0), count, faded[0]);
        start_scores(more, 1);
        tables[1].read(slot(step, 1), count, faded[1]);
        wait_products<0>();
        here(o), here(more);
        weigh(o, 0), weigh(more, 1);
        const Word to = seen + (warp * 16 + (lane & 15)) * 128 + ((lane >> 4 ^ lane) & 7) * 16;
#pragma unroll
        for (int i = 0; i < 32; i += 8) {
            Word x[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                x[j] = pack(o[i + 2 * j] + more[i + 2 * j], o[i + 2 * j + 1] + more[i + 2 * j + 1]);
            store_matrices(to ^ i / 8 * 32, x);
        }
        publish();
        meet();  // all have written their scores, and their tables

#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            auto from_state = [&](float (&x)[32], int h) {
                Word held[HELD_STEPS][4];
                Units units;
                units.set(state[h][part]);
                hold(state[h][part], units.power, 0, held);
                here(held);
                begin_products();
#pragma unroll
                for (int i = 0; i < HELD_STEPS; i++) product(x, held[i], by_rows(place_a(step, h)) + along_rows(i), i);
                end_products();
                wait_products<0>();
                here(x), here(held);
                tables[h].fade(x, units.unit, count);
            };
            from_state(o, 0), from_state(more, 1);
#pragma unroll
            for (int i = 0; i < 32; i++) o[i] += more[i];
            Word x[4][4];
            load_left(c_i + part * BLOCK + place_transposed(), x);
            here(o), here(x);
            begin_products();
#pragma unroll
            for (int i = 0; i < 4; i++) product(o, x[i], by_rows(seen) + along_rows(i), 1);
            end_products();
            wait_products<0>();
            here(o), here(x);
            if (AGAIN) lost.mark(o, step, part);
            const int column = 64 * part + 16 * warp + lane / 4;
#pragma unroll
            for (int i = 0; i < 32; i++) {
                const int token = i / 4 * 8 + 2 * (lane % 4) + i % 2;
                if (token < count) out[(tile.first(step) + token) * out_token + column + i / 2 % 2 * 8] = o[i];
            }
            Weighted weighted[HEADS];
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                weighted[h].set(x, tables[h].pairs);
                fade(state[h][part], faded[h]);
                advance(state[h][part], weighted[h], place_b(step, h));
            }
            wait_products<0>();
#pragma unroll
            for (int h = 0; h < HEADS; h++) here(state[h][part]), here(weighted[h]);
        }
        if (!AGAIN && step == tile.chunks - 1) {
            float zero = 0.0f;
#pragma unroll
            for (int h = 0; h < HEADS; h++)
#pragma unroll
                for (int part = 0; part < PARTS; part++)
#pragma unroll
                    for (int i = 0; i < HELD; i++) zero = fmaf(state[h][part][i], 0.0f, zero);
            if (zero != 0.0f) again[blockIdx.x] = 1;
        }
    }
}
