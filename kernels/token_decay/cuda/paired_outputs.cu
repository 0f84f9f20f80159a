// tile_outputs.cu for two heads that share a and b, in one block: their chunks are fetched once, and their scores, which
// differ by decays alone, are computed once.
//
//     P_h = (a b^T) * decay_h      o_h^T = from_state_h S_h^T a^T + c_h^T P_h^T      S_h^T = faded_h S_h^T + (c_h w_h)^T b
//
// In Mamba-2 these are o and the gradient of v: a and b are of a group, and the heads have 64 columns, so that two are as
// large as one of 128. There is place for one head's scores: the second head's wait in registers, rounded, while the
// first head's are read. Products and their order are those of a head by itself, so the bits are too. `again`, and a
// tile's number, count pairs. What is not finite is as in tile_outputs.cu.
//
// Each warp asks for a share of the next chunk, a block of 64 columns of a or b, and c of a head or its log-decays: where
// one thread asked for all, the others stood at the next barrier. Which head of a and b that is, is known from the start.
//
// With -DSKIPPED=1, D times c before its weights is added to o, as Mamba-2 has it, with the bits of a pass over o that
// reads c again: o is rounded first. c's chunk lies where the outputs are written, until then.

#include "../../constant_decay/cuda/hopper_tile.cuh"
#include "../../constant_decay/cuda/hopper_lost.cuh"
#include "../../constant_decay/cuda/hopper_held.cuh"

constexpr int HEADS = 2;
constexpr int STAGE = 2 * ROWS_BYTES + HEADS * COLUMNS_BYTES, BLOCKS = ROWS / 64;
static_assert(2 * HEADS == WARPS);
#if SKIPPED  // D, a number a head, or with strides of columns a number a column
#define SKIP , const float *skip, Offset skip_head, Offset skip_column
#else
#define SKIPPED 0
#define SKIP
#endif

// Two outputs, rounded, and d times theirs of c.
__device__ __forceinline__ Word plus(Word o, Word c, float d) {
    return pack(fmaf(unpack(c, 0), d, unpack(o, 0)), fmaf(unpack(c, 1), d, unpack(o, 1)));
}

extern "C" __global__ void __launch_bounds__(THREADS, AGAIN ? 1 : 2)
paired_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const float* states, Offset state_batch, Offset state_head,
               Offset state_tile, Offset state_row, Offset state_column, const __grid_constant__ Map o, Bits* out,
               Offset out_batch, Offset out_head, Offset out_token, TILES, float scale, float state_scale,
               float added_scale, int* again SKIP) {
    if (AGAIN && !again[blockIdx.x]) return;
    Tile tile(TILE);
    const int thread = thread_number(), lane = thread % 32, warp = thread / 32, first_head = HEADS * tile.head;
    out += tile.batch * out_batch + first_head * out_head + tile.start * out_token;
    float state[HEADS][PARTS][HELD];
    states += tile.batch * state_batch + first_head * state_head + tile.number * state_tile;
    states += 2 * (lane % 4) * state_row + (16 * warp + lane / 4) * state_column;
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int i = 0; i < HELD; i++)
            state[h][0][i] = states[h * state_head + (8 * (i / 4) + i % 2) * state_row + i / 2 % 2 * 8 * state_column];

    // Two places of: a, b, and c of each head. Behind them scores, log-decays, tables and barriers.
    const Word base = shared_memory(), seen = base + 2 * STAGE, slots = seen + BLOCK;
    const Word all_tables = slots + 2 * HEADS * SLOT, all_lost = all_tables + HEADS * Tables::BYTES;
    const Word arrivals = all_lost + HEADS * Lost::BYTES, skips = arrivals + 16 + 4 * WARPS;
    auto slot = [&](int step, int h) { return slots + (step % 2 * HEADS + h) * SLOT; };
    auto place_a = [&](int step) { return base + step % 2 * STAGE; };
    auto place_b = [&](int step) { return place_a(step) + ROWS_BYTES; };
    auto place_c = [&](int step, int h) { return place_a(step) + 2 * ROWS_BYTES + h * COLUMNS_BYTES; };
    tile.head = first_head;
    Tables first_tables;
    first_tables.place(all_tables, tile, log_decay TOKENS_);
    first_tables.set(scale, state_scale, added_scale);
    auto tables = [&](int h) {  // made where it is wanted, for there are no registers to hold both
        Tables own = first_tables;
        own.move(h * Tables::BYTES, h * decay_head);
        return own;
    };
    // A warp's share of what is asked for: a block of a or b, whose head is looked up, and c of a head or its log-decays.
    auto head_ab = [&](int share) { return arrivals + 16 + share * 4; };
    auto fetch_share = [&](int step) {  // but c, whose place outputs leave from
        const int share = thread_anew() / 32, own = share % HEADS;
        if (step >= tile.chunks || thread_anew() % 32) return;
        const Word arrival = arrivals + step % 2 * 8, to = place_a(step) + share * BLOCK;
        const int count = tile.count(step), bytes = share < 2 * BLOCKS ? BLOCK : 0;
        expect(arrival, bytes + (share < HEADS ? COLUMNS_BYTES : tables(own).bytes(count)));
        const Place place = tile.chunk_of(step, load_word(head_ab(share)), share % BLOCKS * 64);
        if (share < BLOCKS) fetch<64>(to, a, place, arrival);
        else if (share < 2 * BLOCKS) fetch<64>(to, b, place, arrival);
        if (share >= HEADS) tables(own).fetch(slot(step, own), tile.first(step), count, arrival);
    };
    auto fetch_c = [&](int step) {
        const int own = thread_anew() / 32;
        if (step >= tile.chunks || thread_anew() % 32 || own >= HEADS) return;
        const Place place = tile.chunk_of(step, head_of(first_head + own, c_share));
        fetch<COLUMNS>(place_c(step, own), c, place, arrivals + step % 2 * 8);
    };
    if (AGAIN)
        for (int h = 0; h < HEADS; h++) Lost(all_lost + h * Lost::BYTES).start(state[h]);
#if SKIPPED
    store(skips + thread * 4, skip[(first_head + thread / COLUMNS) * skip_head + thread % COLUMNS * skip_column]);
#endif
    if (lane == 0) store(head_ab(warp), Word(head_of(first_head, warp >= BLOCKS ? b_share : a_share)));
    if (thread == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        for (int i = 0; i < 2; i++) init_arrival(arrivals + i * 8, WARPS);
    }
    publish();
    __syncthreads();
    fetch_share(0), fetch_c(0);

    // Outputs of a chunk, whose place in shared memory was that of its c.
    auto write_chunk = [&](int step) {
        if (step < 0) return;
        const int count = tile.count(step);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const Word from = place_c(step, h);
            if (count == CHUNK) {
                if (thread == 32 * h) write<COLUMNS>(o, tile.chunk_of(step, first_head + h), from);
                continue;
            }
            for (int i = thread; i < COLUMNS / 8 * count; i += THREADS) {
                const int token = i / (COLUMNS / 8), vector = i % (COLUMNS / 8);
                Word x[4];
                const Word at = from + token * 128 + ((vector ^ token) & 7) * 16;
                load(at, x[0], x[1]), load(at + 8, x[2], x[3]);
                for (int j = 0; j < 8; j++)
                    out[h * out_head + (tile.first(step) + token) * out_token + 8 * vector + j] =
                        Bits(x[j / 2] >> j % 2 * 16);
            }
        }
    };

    auto weights = [&](int step, int h) { return tables(h).weights(slot(step, h)); };

    for (int step = 0; step < tile.chunks; step++) {
        const Word a_i = place_a(step), b_i = place_b(step);
        const int count = tile.count(step);
        wait_arrival(arrivals + step % 2 * 8, step / 2 & 1);
        Word given[HEADS][4][4];  // c before anything happens to it
        if (AGAIN) {
            for (int h = 0; SKIPPED && h < HEADS; h++) load_left(place_c(step, h) + place_transposed(), given[h]);
            if (SKIPPED) __syncwarp();  // all have read it
            for (int h = 0; WEIGHTED && h < HEADS; h++) weigh_rows(place_c(step, h), weights(step, h), count);
            if (WEIGHTED) __syncthreads();
            for (int zero = 0; zero < 2; zero++) {
                for (int h = 0; h < HEADS; h++) {
                    const Lost lost(all_lost + h * Lost::BYTES);
                    if (!zero || h == HEADS - 1) lost.find<ROWS, false>(b_i, step, count, zero);
                    lost.find<COLUMNS, true>(place_c(step, h), step, count, zero);
                }
                __syncthreads();
            }
            publish();
        }
        if (count < CHUNK) {
            zero_rows<ROWS>(b_i, count);
            for (int h = 0; h < HEADS; h++) {
                zero_rows<COLUMNS>(place_c(step, h), count);
                if (WEIGHTED) zero_numbers(weights(step, h), count);
            }
            publish();
        }
        meet();  // all have written the outputs of the chunk before, and read its scores
        wait_products<0>();  // for ptxas, which does not see that none is under way
        fetch_share(step + 1);
        write_chunk(step - 1);

        float scores[32], o_i[32], faded[HEADS];
        Word held[HELD_STEPS][4], later[4][4];
        Units units;
        begin_products();
#pragma unroll
        for (int i = 0; i < STEPS; i++) product(scores, by_rows(a_i) + along_rows(i), by_rows(b_i) + along_rows(i), i);
        end_products();
        auto start_from_state = [&](int h) {
            units.set(state[h][0]);
            hold(state[h][0], units.power, 0, held);
            here(held);
            begin_products();
#pragma unroll
            for (int i = 0; i < STEPS; i++) product(o_i, held[i], by_rows(a_i) + along_rows(i), i);
            end_products();
        };
        const Word to = seen + (warp * 16 + (lane & 15)) * 128 + ((lane >> 4 ^ lane) & 7) * 16;
        const Sums first = tables(0).sums(slot(step, 0), count), second = tables(1).sums(slot(step, 1), count);
        tables(0).make(first, faded[0]), tables(1).make(second, faded[1]);  // whose steps wait for one another, together
        wait_products<0>();
        here(scores);
        tables(0).decay<true>(scores, seen);
        start_from_state(0);
        tables(1).each<true>(warp, [&](int part, const float (&d)[8]) {  // under the product
#pragma unroll
            for (int i = 0; i < 4; i++)
                later[part][i] = pack(scores[8 * part + 2 * i] * d[2 * i], scores[8 * part + 2 * i + 1] * d[2 * i + 1]);
        });
        publish();
        meet();  // all have written the first head's scores, and their tables, and read the outputs of the chunk before
        wait_writes(), fetch_c(step + 1);

#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const Word c_i = place_c(step, h);
            Word x[4][4];
            load_left(c_i + place_transposed(), x);
            if (WEIGHTED && !AGAIN) weigh(x, weights(step, h));
            if (h == 0) wait_products<0>();
            here(o_i), here(held);
            tables(h).fade(o_i, units.unit, count);
            here(o_i), here(x);
            begin_products();
#pragma unroll
            for (int i = 0; i < 4; i++) product(o_i, x[i], by_rows(seen) + along_rows(i), 1);
            end_products();
            Weighted weighted;
            weighted.set(x, tables(h).pairs);
            fade(state[h][0], faded[h]);
            advance(state[h][0], weighted, b_i);
            wait_products<1>();
            here(o_i), here(x);
            if (AGAIN) Lost(all_lost + h * Lost::BYTES).mark(o_i, step, 0);
            float d[2] = {};
            const Word own_skip = skips + (h * COLUMNS + thread_number() / 32 * 16 + threadIdx.x % 32 / 4) * 4;
            if (SKIPPED) d[0] = load(own_skip), d[1] = load(own_skip + 32);
#pragma unroll
            for (int i = 0; i < 32; i += 8) {  // 16 tokens; a warp writes where it alone has read
                const Word place = c_i + place_transposed() + i / 8 * 16 * 128;
                Word y[4];
                if (SKIPPED && !AGAIN) load_transposed(place, given[h][i / 8]);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    y[j] = pack(o_i[i + 2 * j], o_i[i + 2 * j + 1]);
                    if (SKIPPED) y[j] = plus(y[j], given[h][i / 8][j], d[j % 2]);
                }
                store_transposed(place, y);
            }
            if (h < HEADS - 1) {
                meet();  // all have read its scores
#pragma unroll
                for (int i = 0; i < 4; i++) store_matrices(to ^ i * 32, later[i]);
            }
            publish();
            wait_products<0>();
            here(state[h][0]), here(weighted);
            if (h < HEADS - 1) {
                start_from_state(h + 1);
                meet();  // all have written the next head's
                wait_products<0>();
            }
        }
        if (!AGAIN && step == tile.chunks - 1) {
            float zero = 0.0f;
#pragma unroll
            for (int h = 0; h < HEADS; h++)
#pragma unroll
                for (int i = 0; i < HELD; i++) zero = fmaf(state[h][0][i], 0.0f, zero);
            if (zero != 0.0f) again[blockIdx.x] = 1;
        }
    }
    meet();
    write_chunk(tile.chunks - 1);
    wait_writes();
}
