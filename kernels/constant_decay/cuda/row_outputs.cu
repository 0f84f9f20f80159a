// tile_outputs.cu's outputs of whole sequences that begin from zero, in tiles of -DLENGTH=16|32|64 tokens:
//
//     P = (a b^T) * decay      o^T = gamma^i (S^T a^T) + c^T P^T      S^T = gamma^LENGTH S^T + (c w)^T b, summed by itself
//
// A block walks a sequence, and the state, which the fold between tiles carries, stays in its registers. Chunks of 64
// tokens hold one, two or four tiles, of which each sees scores of its own. What a tile adds is summed from zero, with the
// bits of tile_states.cu (whose `scale` is sum_scale), and folded with those of the fold. -DTRANSPOSED=1: with the bits of
// states that are c's and b's, transposed: the weights are b's, whose higher part comes in its place, the lower in a's.
//
// What is not finite is as in tile_outputs.cu: a second kernel (-DAGAIN=1) walks again where `again` says so.

#include "hopper_tile.cuh"
#include "hopper_lost.cuh"
#include "hopper_held.cuh"

constexpr int STAGE = 2 * ROWS_BYTES + COLUMNS_BYTES;
constexpr int SUMMED = LENGTH / 16;                  // steps of a product over a tile's tokens
constexpr int UNROLLED = HALF ? CHUNK / LENGTH : 1;  // tiles of a chunk: so ptxas spills least
static_assert(GROUPS == 1 && !LAST_FETCHES && !WIDE && CHUNK % LENGTH == 0);

extern "C" __global__ void __launch_bounds__(THREADS, AGAIN ? 1 : ROWS + COLUMNS <= 128 ? 3 : 2)
row_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const __grid_constant__ Map o, Bits* out, Offset out_batch,
            Offset out_head, Offset out_token, TILES, float scale, float state_scale, float sum_scale, int* again) {
    if (AGAIN && !again[blockIdx.x]) return;
    const Tile tile(TILE);
    const int thread = thread_number();
    float state[PARTS][HELD] = {};
    const Word base = shared_memory(), seen = base + 2 * STAGE, own = seen + BLOCK;
    const Word arrivals = own + Tables::BYTES + Lost::BYTES;
    const Lost lost(own + Tables::BYTES);
    Tables tables;
    tables.place(own, tile, log_decay TOKENS_);
    auto place = [&](int step) { return base + step % 2 * STAGE; };
    auto arrival = [&](int step) { return arrivals + step % 2 * 8; };
    auto fetch_a_and_b = [&](int step) {
        if (step >= tile.chunks) return;
        expect(arrival(step), STAGE);
        fetch<STORED_ROWS>(place(step), a, tile.chunk(step, a_share), arrival(step));
        fetch<STORED_ROWS>(place(step) + ROWS_BYTES, b, tile.chunk(step, b_share), arrival(step));
    };
    auto fetch_c = [&](int step) {
        if (step >= tile.chunks) return;
        fetch<COLUMNS>(place(step) + 2 * ROWS_BYTES, c, tile.chunk(step, c_share, tile.own), arrival(step));
    };
    if (AGAIN) lost.start(state);
    if (thread == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        init_arrival(arrivals), init_arrival(arrivals + 8);
    }
    publish();
    __syncthreads();
    if (thread == 0) fetch_a_and_b(0), fetch_c(0);
    tables.start(tile, log_decay TOKENS_);
    tables.set(scale, state_scale, 1.0f, LENGTH);

    out += tile.batch * out_batch + tile.head * out_head + tile.start * out_token + tile.own;
    auto write_chunk = [&](int step) {  // from where its c was
        if (step < 0) return;
        const Word from = place(step) + 2 * ROWS_BYTES;
        if (tile.count(step) < CHUNK)
            write_rows<COLUMNS>(out + tile.first(step) * out_token, out_token, from, tile.count(step), tile.own);
        else if (thread == 0)
            write<COLUMNS>(o, tile.chunk(step, 1, tile.own), from);
    };

    for (int step = 0; step < tile.chunks; step++) {
        const Word a_i = place(step), b_i = a_i + ROWS_BYTES, c_i = b_i + ROWS_BYTES;
        const int count = tile.count(step);
        wait_arrival(arrival(step), step / 2 & 1);
        if (AGAIN) {
            for (int zero = 0; zero < 2; zero++) {
                lost.find<STORED_ROWS, false>(b_i, step, count, zero), lost.find<COLUMNS, true>(c_i, step, count, zero);
                meet();
            }
            publish();
        }
        if (count < CHUNK) {
            zero_rows<STORED_ROWS>(b_i, count), zero_rows<COLUMNS>(c_i, count);
            publish();
        }
        meet();  // all have written the outputs of the chunk before, and read its scores
        wait_products<0>();  // for ptxas, which does not see that none is under way
        if (thread == 0) fetch_a_and_b(step + 1);
        write_chunk(step - 1);

        float scores[32], o_i[PARTS][LENGTH / 2];
        Word held[STEPS][4], x[PARTS][SUMMED][4];
        Units units;
        auto start_from_state = [&](int part, int first) {
            units.set(state[part]);
            hold(state[part], units.power, 0, held);
            here(held);
            begin_products();
#pragma unroll
            for (int i = 0; i < STEPS; i++)
                product(o_i[part], held[i], by_rows(a_i + first * 128) + along_rows(i), i);
            end_products();
        };
        begin_products();
#pragma unroll
        for (int i = 0; i < STEPS; i++) product(scores, by_rows(a_i) + along_rows(i), by_rows(b_i) + along_rows(i), i);
        end_products();
        wait_products<0>();
        here(scores);
        tables.decay(scores, seen);
        publish();
        meet();  // all have written their scores, and read the outputs of the chunk before
        if (thread == 0) wait_writes(), fetch_c(step + 1);

#pragma unroll UNROLLED
        for (int number = 0; number < CHUNK / LENGTH; number++) {
            const int first = REVERSE ? CHUNK - LENGTH - number * LENGTH : number * LENGTH;
            const int length = max(min(LENGTH, count - first), 0);  // of the last chunk's, some have no tokens
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                start_from_state(part, first);
                const Word own_c = c_i + part * BLOCK + first * 128 + place_transposed();
#pragma unroll
                for (int i = 0; i < SUMMED; i++) load_transposed(own_c + i * 16 * 128, x[part][i]);
                wait_products<0>();
                here(o_i[part]), here(held);
                tables.fade(o_i[part], units.unit, length);
                here(o_i[part]), here(x[part]);
                begin_products();
#pragma unroll
                for (int i = 0; i < SUMMED; i++)
                    product(o_i[part], x[part][i], by_rows(seen + first * 128) + along_rows(first / 16 + i), 1);
                end_products();
                wait_products<0>();
                here(o_i[part]), here(x[part]);
                if (AGAIN) lost.mark(o_i[part], step, part, first);
#pragma unroll
                for (int i = 0; i < LENGTH / 2; i += 8) {  // 16 tokens; a warp writes where it alone has read
                    Word y[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) y[j] = pack(o_i[part][i + 2 * j], o_i[part][i + 2 * j + 1]);
                    store_transposed(own_c + i / 8 * 16 * 128, y);
                }
            }
            if (TRANSPOSED) {
                meet();  // all have read a, and b
                weigh_chunk<STORED_ROWS, LENGTH>(b_i + first * 128, a_i + first * 128, tables.pairs);
                meet();
            }
            const float folded = tables.folded(length);
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                WeightedOf<SUMMED> weighted;
                if (!TRANSPOSED) weighted.set(x[part], tables.pairs);
                Word(&high)[SUMMED][4] = TRANSPOSED ? x[part] : weighted.high;
                Word(&low)[SUMMED][4] = TRANSPOSED ? x[part] : weighted.low;
                const Word b_high = b_i + first * 128, b_low = TRANSPOSED ? a_i + first * 128 : b_high;
                float sum[HELD] = {};
                here(sum), here(high), here(low);
                begin_products();
#pragma unroll
                for (int i = 0; i < SUMMED; i++) add_product(sum, high[i], by_columns(b_high) + along_columns(i));
#pragma unroll
                for (int i = 0; i < SUMMED; i++) add_product(sum, low[i], by_columns(b_low) + along_columns(i));
                end_products();
                publish();
                wait_products<0>();
                here(sum), here(high), here(low);
#pragma unroll
                for (int i = 0; i < HELD; i++) state[part][i] = fmaf(state[part][i], folded, sum_scale * sum[i]);
            }
        }
        if (!AGAIN && step == tile.chunks - 1) {  // here rather than behind the loop, where ptxas would spill in it
            float zero = 0.0f;
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < HELD; i++) zero = fmaf(state[part][i], 0.0f, zero);
            if (zero != 0.0f) again[blockIdx.x] = 1;
        }
    }
    meet();
    write_chunk(tile.chunks - 1);
    if (thread == 0) wait_writes();
}
