// tile_outputs.cu for heads that share a and b, four to a block (-DGROUPS=4): each has a warpgroup, 64 columns and its own
// decays, and a and b are fetched once for all of them.
//
//     P_h = (a b^T) * decay_h      o_h^T = from_state_h S_h^T a^T + c_h^T P_h^T      S_h^T = faded_h S_h^T + (c_h w_h)^T b
//
// In Mamba-2 these are o and the gradient of v: a and b are of a group. Warpgroups do not meet: the last warp that has
// read a chunk of a and b fetches another one to its place. Four warpgroups to a multiprocessor, where tile_outputs.cu has
// two, fill each other's waits; for that each has 128 registers, so that nothing of a chunk is under way beside something
// else. Products and their order are those of a head by itself, so the bits are too. `again`, and a tile's number, count
// fours. What is not finite is as in tile_outputs.cu.

#include "../../constant_decay/cuda/hopper_tile.cuh"
#include "../../constant_decay/cuda/hopper_lost.cuh"
#include "../../constant_decay/cuda/hopper_held.cuh"

static_assert(PARTS == 1 && !LAST_FETCHES);
constexpr int AT_ONCE = 4;  // steps of the state that are rounded at a time
constexpr int STAGE = 2 * ROWS_BYTES + GROUPS * COLUMNS_BYTES;

extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, 1)
shared_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const float* states, Offset state_batch, Offset state_head,
               Offset state_tile, Offset state_row, Offset state_column, const __grid_constant__ Map o, Bits* out,
               Offset out_batch, Offset out_head, Offset out_token, TILES, float scale, float state_scale,
               float added_scale, int* again) {
    if (AGAIN && !again[blockIdx.x]) return;
    Tile tile(TILE);
    const int thread = thread_number(), group = __shfl_sync(0xffffffffu, group_number(), 0);
    const int lane = thread % 32, warp = thread / 32, first_head = GROUPS * tile.head;
    tile.head = first_head + group;
    float state[PARTS][HELD];
    states += tile.batch * state_batch + tile.head * state_head + tile.number * state_tile;
    states += 2 * (lane % 4) * state_row + (16 * warp + lane / 4) * state_column;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        state[0][i] = states[(8 * (i / 4) + i % 2) * state_row + i / 2 % 2 * 8 * state_column];

    // Two places of: a, b, and c of each head. Behind them scores, log-decays, tables and barriers.
    const Word base = shared_memory(), seen = base + 2 * STAGE + group * BLOCK;
    const Word slots = base + 2 * STAGE + GROUPS * BLOCK, all_tables = slots + 2 * GROUPS * SLOT;
    const Word all_lost = all_tables + GROUPS * Tables::BYTES, arrivals = all_lost + GROUPS * Lost::BYTES;
    const Word read = arrivals + 16;
    auto slot = [&](int step, int head) { return slots + (step % 2 * GROUPS + head) * SLOT; };
    auto place_a = [&](int step) { return base + step % 2 * STAGE; };
    auto place_b = [&](int step) { return place_a(step) + ROWS_BYTES; };
    auto place_c = [&](int step) { return place_a(step) + 2 * ROWS_BYTES + group * COLUMNS_BYTES; };
    auto arrival = [&](int step) { return arrivals + step % 2 * 8; };
    Tables tables;
    tables.place(all_tables + group * Tables::BYTES, tile, log_decay TOKENS_);
    tables.set(scale, state_scale, added_scale);
    auto fetch_ab = [&](int step) {
        if (step >= tile.chunks) return;
        auto others = [&](int head) {
            Tables moved = tables;
            moved.move(0, (head - group) * decay_head);
            return moved;
        };
        const int first = tile.first(step), count = tile.count(step);
        int bytes = STAGE;
        for (int head = 0; head < GROUPS; head++) bytes += others(head).bytes(count);
        expect(arrival(step), bytes);
        fetch<ROWS>(place_a(step), a, tile.chunk(step, a_share), arrival(step));
        fetch<ROWS>(place_b(step), b, tile.chunk(step, b_share), arrival(step));
        for (int head = 0; head < GROUPS; head++) others(head).fetch(slot(step, head), first, count, arrival(step));
    };
    auto fetch_c = [&](int step) {
        if (step < tile.chunks) fetch<COLUMNS>(place_c(step), c, tile.chunk(step, c_share), arrival(step));
    };
    const Lost lost(all_lost + group * Lost::BYTES);
    if (AGAIN) lost.start(state);
    if (threadIdx.x == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        for (int i = 0; i < 2; i++) init_arrival(arrivals + i * 8), store(read + i * 4, Word(0));
    }
    publish();
    __syncthreads();
    if (threadIdx.x == 0) fetch_ab(0), fetch_ab(1);
    if (thread == 0) fetch_c(0);

    // Outputs of a chunk, whose place in shared memory was that of its c.
    auto write_chunk = [&](int step) {
        if (step < 0) return;
        const int count = tile.count(step);
        const Word from = place_c(step);
        if (count == CHUNK) {
            if (thread == 0) write<COLUMNS>(o, tile.chunk(step, 1), from);
            return;
        }
        Bits* to = out + tile.batch * out_batch + tile.head * out_head + (tile.start + tile.first(step)) * out_token;
        for (int i = thread; i < COLUMNS / 8 * count; i += THREADS) {
            const int token = i / (COLUMNS / 8), vector = i % (COLUMNS / 8);
            Word x[4];
            const Word at = from + token * 128 + ((vector ^ token) & 7) * 16;
            load(at, x[0], x[1]), load(at + 8, x[2], x[3]);
            for (int j = 0; j < 8; j++) to[token * out_token + 8 * vector + j] = Bits(x[j / 2] >> j % 2 * 16);
        }
    };

    for (int step = 0; step < tile.chunks; step++) {
        const Word a_i = place_a(step), b_i = place_b(step), c_i = place_c(step);
        const int count = tile.count(step);
        wait_arrival(arrival(step), step / 2 & 1);
        if (AGAIN) {
            for (int zero = 0; zero < 2; zero++) {
                lost.find<ROWS, false>(b_i, step, count, zero), lost.find<COLUMNS, true>(c_i, step, count, zero);
                __syncthreads();  // all have seen all of b
            }
            publish();
        }
        if (count < CHUNK) {  // all write the same zeros to b
            zero_rows<ROWS>(b_i, count), zero_rows<COLUMNS>(c_i, count);
            publish();
        }
        meet();  // all have written the outputs of the chunk before, and read its scores
        wait_products<0>();  // for ptxas, which does not see that none is under way
        write_chunk(step - 1);

        float x_i[32], faded;
        begin_products();
#pragma unroll
        for (int i = 0; i < STEPS; i++) product(x_i, by_rows(a_i) + along_rows(i), by_rows(b_i) + along_rows(i), i);
        end_products();
        tables.read(slot(step, group), count, faded);
        wait_products<0>();
        here(x_i);
        tables.decay(x_i, seen);
        publish();
        meet();  // all have written their scores and tables
        if (thread == 0) wait_writes(), fetch_c(step + 1);

        Units units;
        units.set(state[0]);
#pragma unroll
        for (int i = 0; i < STEPS; i += AT_ONCE) {  // there are no registers for all of it
            Word held[AT_ONCE][4];
#pragma unroll
            for (int j = 0; j < 4 * AT_ONCE; j++)
                held[j / 4][j % 4] = pack(state[0][8 * i + 2 * j] * units.power[j % 2],
                                          state[0][8 * i + 2 * j + 1] * units.power[j % 2]);
            here(held);
            begin_products();
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) product(x_i, held[j], by_rows(a_i) + along_rows(i + j), i + j);
            end_products();
            wait_products<0>();
            here(x_i), here(held);
        }
        tables.fade(x_i, units.unit, count);
        Word x[4][4];
        load_left(c_i + place_transposed(), x);
        here(x_i), here(x);
        begin_products();
#pragma unroll
        for (int i = 0; i < 4; i++) product(x_i, x[i], by_rows(seen) + along_rows(i), 1);
        end_products();
        wait_products<0>();
        here(x_i), here(x);
        if (AGAIN) lost.mark(x_i, step, 0);
#pragma unroll
        for (int i = 0; i < 32; i += 8) {  // 16 tokens; a warp writes where it alone has read
            Word y[4];
#pragma unroll
            for (int j = 0; j < 4; j++) y[j] = pack(x_i[i + 2 * j], x_i[i + 2 * j + 1]);
            store_transposed(c_i + place_transposed() + i / 8 * 16 * 128, y);
        }
        publish();
        Weighted weighted;
        weighted.set(x, tables.pairs);
        fade(state[0], faded);
        advance(state[0], weighted, b_i);
        wait_products<0>();
        here(state[0]), here(weighted);
        if (!AGAIN && step == tile.chunks - 1) {
            float zero = 0.0f;
#pragma unroll
            for (int i = 0; i < HELD; i++) zero = fmaf(state[0][i], 0.0f, zero);
            if (zero != 0.0f) again[blockIdx.x] = 1;
        }
        if (is_last(read + step % 2 * 4)) fetch_ab(step + 2);
    }
    meet();
    write_chunk(tile.chunks - 1);
    if (thread == 0) wait_writes();
}
