// tile_outputs.cu's outputs of whole sequences that begin from zero, in tiles of -DLENGTH=16|32|64 tokens, or longer ones:
//
//     P = (a b^T) * decay      o^T = gamma^i (S^T a^T) + c^T P^T      S^T = gamma^LENGTH S^T + (c w)^T b, summed by itself
//
// A block walks a sequence, and the state, which the fold between tiles carries, stays in its registers. Chunks of 64
// tokens hold one, two or four tiles, of which each sees scores of its own. What a tile adds is summed from zero, with the
// bits of tile_states.cu (whose `scale` is sum_scale), and folded with those of the fold. -DTRANSPOSED=1: with the bits of
// states that are c's and b's, transposed: the weights are b's, whose higher part comes in its place, the lower in a's.
//
// -DLONG=1 -DLENGTH=64: tiles of several chunks, of which a block has 64 columns. The state that outputs read goes on from
// chunk to chunk, as in tile_outputs.cu; beside it what the tile adds is summed, of the chunks that tile_states.cu reads.
// The state at the tile's start, to which the fold adds that, waits in `starts`, where each thread reads what it wrote.
// A tile's last chunk is but added, for the fold makes the next state; and in a first tile forward, which begins from
// zero, what the state takes is what the tile adds, in one product, where no chunk is left out.
// With -DTRANSPOSED=1 both are S = (b w)^T c, so that what is weighted is an operand in registers here too, and turned round
// once a tile, through shared memory.
//
// What is not finite is as in tile_outputs.cu: a second kernel (-DAGAIN=1) walks again where `again` says so.

#include "hopper_tile.cuh"
#include "hopper_lost.cuh"
#include "hopper_held.cuh"

constexpr int STAGE = 2 * ROWS_BYTES + COLUMNS_BYTES;
constexpr int SUMMED = LENGTH / 16;                  // steps of a product over a tile's tokens
constexpr int UNROLLED = HALF ? CHUNK / LENGTH : 1;  // tiles of a chunk: so ptxas spills least
#ifndef LONG
#define LONG 0
#endif
constexpr bool TURNED = LONG && TRANSPOSED;
constexpr int SUMS = TURNED ? STORED_ROWS / 64 : 1, EACH = TURNED ? 32 : HELD;  // of what a tile adds
static_assert(GROUPS == 1 && !LAST_FETCHES && !WIDE && CHUNK % LENGTH == 0 && (!LONG || (LENGTH == CHUNK && PARTS == 1)));

// Where a number of S is, turned round: no two of those that a warp writes or reads at once are in the same bank.
__device__ __forceinline__ Word turned(int row, int column) {
    return row * 256 + (column / 8 ^ (row & 3) ^ (row >> 2 & 1)) * 32 + column % 8 * 4;
}

extern "C" __global__ void __launch_bounds__(THREADS, AGAIN ? 1 : ROWS + COLUMNS <= 128 && !LONG ? 3 : 2)
row_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const __grid_constant__ Map o, Bits* out, Offset out_batch,
            Offset out_head, Offset out_token, TILES, float scale, float state_scale, float sum_scale, float added_scale,
            Offset tile_chunks, float* starts, int* again) {
    if (AGAIN && !again[blockIdx.x]) return;
    const Tile tile(TILE);
    const int thread = thread_number();
    float state[PARTS][HELD] = {}, added[SUMS][EACH] = {};
    const Word base = shared_memory(), seen = base + 2 * STAGE, outputs = seen + BLOCK, own = outputs + TURNED * 2 * BLOCK;
    const Word unscaled = own + Tables::BYTES + (1 + LONG) * Lost::BYTES, arrivals = unscaled + LONG * Weights::BYTES;
    const Lost lost(own + Tables::BYTES), kept(own + Tables::BYTES + Lost::BYTES);  // in this tile; in those behind it
    Tables tables;
    Weights weights;  // of what a tile adds
    tables.place(own, tile, log_decay TOKENS_), weights.place(unscaled, tile, log_decay TOKENS_);
    auto place = [&](int step) { return base + step % 2 * STAGE; };
    auto arrival = [&](int step) { return arrivals + step % 2 * 8; };
    // Without a branch where a chunk holds several tiles: there are too few registers.
    auto shared = [&](Offset share) { return LONG ? head_of(tile.head, share) : tile.head / int(share); };
    auto fetch_c = [&](int step) {
        if (step >= tile.chunks) return;
        fetch<COLUMNS>(place(step) + 2 * ROWS_BYTES, c, tile.chunk_of(step, shared(c_share), tile.own), arrival(step));
    };
    auto fetch_a_and_b = [&](int step) {  // and c, whose place is free where outputs are not in it
        if (step >= tile.chunks) return;
        expect(arrival(step), STAGE);
        fetch<STORED_ROWS>(place(step), a, tile.chunk_of(step, shared(a_share)), arrival(step));
        fetch<STORED_ROWS>(place(step) + ROWS_BYTES, b, tile.chunk_of(step, shared(b_share)), arrival(step));
        if (TURNED) fetch_c(step);
    };
    if (AGAIN) lost.start(state);
    if (AGAIN && LONG) kept.start(state);
    if (thread == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        init_arrival(arrivals), init_arrival(arrivals + 8);
    }
    publish();
    __syncthreads();
    if (thread == 0) fetch_a_and_b(0);
    if (thread == 0 && !TURNED) fetch_c(0);
    tables.start(tile, log_decay TOKENS_), weights.start(tile, log_decay TOKENS_);
    tables.set(scale, state_scale, LONG ? added_scale : 1.0f, LENGTH);
    if (LONG) weights.set(1.0f, CHUNK);
    const int tile_tokens = int(tile_chunks) * CHUNK, reached = LONG ? weights.reached(tile_tokens, int(tile_chunks)) : 0;
    starts += Offset(blockIdx.x) * SUMS * EACH * THREADS + 4 * thread;

    out += tile.batch * out_batch + tile.head * out_head + tile.start * out_token + tile.own;
    // Where a chunk's outputs are: where its c was; or, where products read c until the chunk's end, apart.
    auto place_outputs = [&](int step) { return TURNED ? outputs + step % 2 * BLOCK : place(step) + 2 * ROWS_BYTES; };
    auto write_chunk = [&](int step) {
        if (step < 0) return;
        const Word from = place_outputs(step);
        if (tile.count(step) < CHUNK)
            write_rows<COLUMNS>(out + tile.first(step) * out_token, out_token, from, tile.count(step), tile.own);
        else if (thread == 0)
            write<COLUMNS>(o, tile.chunk(step, 1, tile.own), from);
    };

    for (int step = 0; step < tile.chunks; step++) {
        const Word a_i = place(step), b_i = a_i + ROWS_BYTES, c_i = b_i + ROWS_BYTES;
        const int count = tile.count(step);
        // Of the tile: its first token, and its chunks that are left, this one counted. Whether another tile follows, and
        // whether this chunk adds to its state, and comes last; and whether this tile's own sum is all of the state.
        const int tile_first = LONG ? tile.first(step) & -tile_tokens : 0;  // which is a power of two
        const int before = (tile.first(step) - tile_first) / CHUNK;
        const int left = REVERSE ? before + 1 : int(tile_chunks) - before;
        const bool more = LONG && (REVERSE ? tile_first > 0 : tile_first + tile_tokens < tile.length);
        const bool adds = more && left <= reached, ends = more && left == 1;
        const bool from_zero = REVERSE ? tile_first + tile_tokens >= tile.length : tile_first == 0;
        const bool alike = !REVERSE && !TURNED && from_zero && reached == int(tile_chunks);
        wait_arrival(arrival(step), step / 2 & 1);
        if (AGAIN) {
            if (adds) kept.find<STORED_ROWS, false>(b_i, step, count, 0), kept.find<COLUMNS, true>(c_i, step, count, 0);
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
        if (!LONG && thread == 0) fetch_a_and_b(step + 1);
        write_chunk(step - 1);

        float scores[32], o_i[PARTS][LENGTH / 2];
        Word held[STEPS][4], x[PARTS][SUMMED][4];
        Units units;
        WeightedOf<SUMMED> weighted;  // of tiles of several chunks
        auto start = [&](auto& to, Word (&high)[SUMMED][4], Word b_high, Word (&low)[SUMMED][4], Word b_low) {
            here(to), here(high), here(low);
            begin_products();
#pragma unroll
            for (int i = 0; i < SUMMED; i++) add_product(to, high[i], by_columns(b_high) + along_columns(i));
#pragma unroll
            for (int i = 0; i < SUMMED; i++) add_product(to, low[i], by_columns(b_low) + along_columns(i));
            end_products();
        };
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
        auto put = [&](int part, int first) {
            here(o_i[part]), here(x[part]);
            if (AGAIN) lost.mark(o_i[part], step, part, first);
            const Word to = place_outputs(step) + part * BLOCK + first * 128 + place_transposed();
#pragma unroll
            for (int i = 0; i < LENGTH / 2; i += 8) {  // 16 tokens; a warp writes where it alone has read
                Word y[4];
#pragma unroll
                for (int j = 0; j < 4; j++) y[j] = pack(o_i[part][i + 2 * j], o_i[part][i + 2 * j + 1]);
                store_transposed(to + i / 8 * 16 * 128, y);
            }
        };
        auto look = [&](const auto& numbers) {  // for what is not finite
            float zero = 0.0f;
#pragma unroll
            for (int i = 0; i < int(sizeof numbers / sizeof numbers[0]); i++) zero = fmaf(numbers[i], 0.0f, zero);
            if (!AGAIN && zero != 0.0f) again[blockIdx.x] = 1;
        };
        begin_products();
#pragma unroll
        for (int i = 0; i < STEPS; i++) product(scores, by_rows(a_i) + along_rows(i), by_rows(b_i) + along_rows(i), i);
        end_products();
        if (LONG) start_from_state(0, 0);
        if (LONG && thread == 0) fetch_a_and_b(step + 1);  // here, as the products do not wait for it
        wait_products<LONG>();
        here(scores);
        tables.decay(scores, seen);
        publish();
        meet();  // all have written their scores, and read the outputs of the chunk before
        if (thread == 0) wait_writes();
        if (thread == 0 && !TURNED) fetch_c(step + 1);

#pragma unroll UNROLLED
        for (int number = 0; number < CHUNK / LENGTH; number++) {
            const int first = REVERSE ? CHUNK - LENGTH - number * LENGTH : number * LENGTH;
            const int length = max(min(LENGTH, count - first), 0);  // of the last chunk's, some have no tokens
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                if (!LONG) start_from_state(part, first);
                load_left(c_i + part * BLOCK + first * 128 + place_transposed(), x[part]);
                wait_products<0>();
                here(o_i[part]), here(held);
                tables.fade(o_i[part], units.unit, length);
                here(o_i[part]), here(x[part]);
                begin_products();
#pragma unroll
                for (int i = 0; i < SUMMED; i++)
                    product(o_i[part], x[part][i], by_rows(seen + first * 128) + along_rows(first / 16 + i), 1);
                end_products();
                if (LONG) break;
                wait_products<0>();
                put(part, first);
            }
            if (LONG) break;
            if (TRANSPOSED) {
                meet();  // all have read a, and b
                weigh_chunk<STORED_ROWS, LENGTH>(b_i + first * 128, b_i + first * 128, a_i + first * 128, tables.pairs);
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
                start(sum, high, b_high, low, b_low);
                publish();
                wait_products<0>();
                here(sum), here(high), here(low);
#pragma unroll
                for (int i = 0; i < HELD; i++) state[part][i] = fmaf(state[part][i], folded, sum_scale * sum[i]);
            }
        }
        // What the tile adds. alone: no product into the state is under way, which would have made the weights that it has
        // too, forward; and of two sums one comes after the other, for there are too few registers for both's operands.
        // meanwhile: called when all products before are done.
        auto add = [&](bool alone, auto meanwhile) {
            WeightedOf<SUMMED> left[SUMS];
            if (!TURNED && (REVERSE || alone)) weighted.set(x[0], REVERSE ? weights.pairs : tables.pairs);
#pragma unroll
            for (int sum = 0; sum < SUMS; sum++) {
                fade(added[sum], weights.faded(count));
                if (TURNED) {
                    Word y[SUMMED][4];
                    load_left(b_i + sum * BLOCK + place_transposed(), y);
                    left[sum].set(y, weights.pairs);
                    start(added[sum], left[sum].high, c_i, left[sum].low, c_i);
                } else {
                    start(added[sum], weighted.high, b_i, weighted.low, b_i);
                }
                if (TURNED && alone) wait_products<0>();
                else wait_products<1>();
                if (sum == 0) meanwhile();
                else here(added[sum - 1]), here(left[sum - 1]);
            }
            wait_products<0>();
            here(added[SUMS - 1]);
            if (TURNED) here(left[SUMS - 1]);
            else here(weighted);
        };
        // The next tile's state at its start, of `at_start` of this one's and the `sum` of what this one adds.
        auto fold = [&](auto& at_start, auto& sum) {
            constexpr int SUMS_ = sizeof sum / sizeof sum[0], EACH_ = sizeof sum[0] / sizeof sum[0][0];
            const float folded = weights.folded(min(tile_tokens, tile.length - tile_first));
            const int anew = thread_anew(), row = anew / 32 * 16 + anew % 32 / 4, column = anew % 4 * 2;
            const Word to = a_i + turned(row, column), from = a_i + turned(column, row);
            if (TURNED) meet();  // all have read a, and b
#pragma unroll
            for (int number = 0; number < SUMS_; number++)
#pragma unroll
                for (int i = 0; i < EACH_; i += 4) {
                    float x[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        x[j] = fmaf(at_start[number][i + j], folded, sum_scale * sum[number][i + j]);
                        sum[number][i + j] = 0.0f;
                    }
                    store_four(starts + (number * EACH_ + i) * THREADS, x[0], x[1], x[2], x[3]);
                    const Word place = (to ^ i * 8) + 64 * number * 256;
                    if (TURNED) store(place, x[0], x[1]), store(place + 8 * 256, x[2], x[3]);
#pragma unroll
                    for (int j = 0; j < 4 && !TURNED; j++) state[0][i + j] = x[j];
                }
            if (TURNED) {
                meet();
#pragma unroll
                for (int i = 0; i < HELD; i++)
                    state[0][i] = load((from ^ (i % 2 ^ i / 2 % 2) * 32) + (i / 4 * 8 + i % 2) * 256);
                publish();
            }
            if (AGAIN) kept.start(state, false), meet(), lost.take(kept), meet();
        };
        // `look` here rather than behind the loop, for ptxas would then spill in it.
        if (!LONG) {
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                if (step == tile.chunks - 1) look(state[part]);
        } else if (!ends || alike) {
            weighted.set(x[0], tables.pairs);
            fade(state[0], tables.faded(count));
            start(state[0], weighted.high, b_i, weighted.low, b_i);
            wait_products<1>();
            put(0, 0);
            const bool apart = adds && !alike;
            if (!apart || (REVERSE && !TURNED)) wait_products<0>(), here(state[0]), here(weighted);
            if (apart) add(false, [&] {
                if (TURNED) here(state[0]), here(weighted);
            });
            here(state[0]);
            publish();
            if (step == tile.chunks - 1 || ends) look(state[0]);
            float zeros[PARTS][HELD] = {};
            if (ends) fold(zeros, state);
        } else {
            look(state[0]);
            float at_start[SUMS][EACH];  // comes while products are under way
            auto finish = [&] {
                put(0, 0);
#pragma unroll
                for (int sum = 0; sum < SUMS; sum++)
#pragma unroll
                    for (int i = 0; i < EACH; i += 4) {
                        float x[4] = {};
                        if (!from_zero) load_four(starts + (sum * EACH + i) * THREADS, x);
#pragma unroll
                        for (int j = 0; j < 4; j++) at_start[sum][i + j] = x[j];
                    }
            };
            if (TURNED) wait_products<0>(), finish();
            add(true, [&] {
                if (!TURNED) finish();
            });
            publish();
#pragma unroll
            for (int sum = 0; sum < SUMS; sum++) look(added[sum]);
            fold(at_start, added);
        }
    }
    meet();
    write_chunk(tile.chunks - 1);
    if (thread == 0) wait_writes();
}
