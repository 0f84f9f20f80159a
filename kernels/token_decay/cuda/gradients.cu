// The gradients of a decay a token on Hopper, two passes over a tile with heads of 128 x 128 in bf16 (hopper_tile.cuh):
//
//     early (-DREVERSE=0), with the state S:       dq = P k + from_state do S^T           S = faded S + (k w)^T v
//     late (-DREVERSE=1), with its gradient R:     dk = P q + to_state v R^T              R = faded R + (q w)^T do
//                                                  dv = P'do + to_state k R
//
// P and P' are decayed scores: of do and v, v and do, k and q. Beside them both leave what added_up.py makes the gradient
// of log_decay from (triton/gradient.py says what it is a sum of): of each token A, q times the part of dq that comes from
// the state, and B, v times that part of dv; of each chunk its own pairs M, which are the late pass's two scores times
// each other; and of the tile <S, R> at its start.
//
// Two warpgroups share a tile and its chunks. Each keeps 64 rows of the state, in fp32 and not transposed, and both write
// it rounded to shared memory, as high + low: sums of A and B over a whole tile carry E from chunk to chunk, which one
// 16-bit number would leave wrong by a percent. Early, each makes 64 columns of dq; late, one makes dk and the pairs, the
// other dv and B. Outputs leave through the memory of operands that are read by then: q, or v and k.
//
// A third warpgroup, of which one thread works, fetches chunks and writes outputs: to ask for a chunk takes a thread some
// 300 instructions, for which all others would wait. Two chunks are there or on their way; meanwhile others come into the
// second cache, up to the one that is -DAHEAD=n chunks after the next (0: none).
//
// What is not finite, and the second kernel (-DAGAIN=1): as in tile_outputs.cu. That one leaves nothing for log_decay.

#include "../../constant_decay/cuda/hopper_tile.cuh"
#include "../../constant_decay/cuda/hopper_lost.cuh"
#include "rows.cuh"

constexpr int WIDTH = ROWS, STEPS = WIDTH / 16;
constexpr bool LATE = REVERSE;
constexpr int STAGE = 4 * ROWS_BYTES;
constexpr int COLUMNS_OUT = LATE ? WIDTH : 64;  // of a warpgroup's outputs
constexpr int FETCHER = GROUPS;                 // the warpgroup that fetches
constexpr int REGISTERS = 240, FETCHER_REGISTERS = 24;  // of a thread
enum Operands { Q, K, V, D };
static_assert(ROWS == 128 && COLUMNS == 64 && GROUPS == 2 && !HALF, "of two warpgroups, 64 rows of the state each");
static_assert(GROUPS * REGISTERS + FETCHER_REGISTERS <= (GROUPS + 1) * 168, "what a block of three warpgroups starts with");

#define OUTPUT(x) const __grid_constant__ Map x, Bits *x##_out, Offset x##_batch, Offset x##_head, Offset x##_token

// states: (B, H, tiles, 128, 128), where the pass begins; of these and `starts`, an address of 0 stands for zeros. Early:
// first is dq, second not used; of_tokens (B, H, 2, N), A of each half of the columns. Late: first is dk, second dv;
// of_tokens (B, H, 2, N), B and the pairs; across (B, H, tiles), from `starts`, which are the early pass's states.
extern "C" __global__ void __launch_bounds__((GROUPS + 1) * THREADS, 1)
gradients(OPERAND(q), OPERAND(k), OPERAND(v), OPERAND(d), const float* states, const float* starts, OUTPUT(first),
          OUTPUT(second), float* of_tokens, float* across, TILES, float scale, float state_scale, float added_scale,
          int* again) {
    if (AGAIN && !again[blockIdx.x]) return;
    const Tile tile(TILE);
    const int thread = thread_number(), group = __shfl_sync(0xffffffffu, group_number(), 0);
    // Two places of chunks of q, k, v and do. Behind them the state, high and low, in blocks of 64 x 64: its first 64
    // columns and all its rows, then the others. Then scores that one warpgroup hands the other, and what sums them.
    const Word base = shared_memory(), high = base + 2 * STAGE, low = high + 4 * BLOCK;
    const Word handed = low + 4 * BLOCK, from_on = handed + (LATE ? 2 * BLOCK : 0);
    const Word partial = from_on + (LATE ? BLOCK : 0), slots = partial + (LATE ? WARPS * CHUNK * 4 : 0);
    const Word all_tables = slots + 2 * SLOT, lost_from = all_tables + GROUPS * Tables::BYTES;
    const Word arrivals = lost_from + GROUPS * LostRows::BYTES;
    const Word all_done = arrivals + 2 * 8, all_stored = all_done + 2 * 8;
    Tables tables;
    tables.place(all_tables + group * Tables::BYTES, tile, log_decay TOKENS_);
    tables.set(scale, state_scale, added_scale);
    auto place = [&](int step, int operand) { return base + step % 2 * STAGE + operand * ROWS_BYTES; };
    // Where a warpgroup's outputs leave from, and what is fetched there next.
    auto place_out = [&](int step, int group) {
        return LATE ? place(step, group == 0 ? V : K) : place(step, Q) + group * BLOCK;
    };
    auto arrival = [&](int step) { return arrivals + step % 2 * 8; };
    // Whether all warps are done with a chunk, and whether its outputs are in shared memory.
    auto done = [&](int step) { return all_done + step % 2 * 8; };
    auto stored = [&](int step) { return all_stored + step % 2 * 8; };
    if (threadIdx.x == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        for (int i = 0; i < 2; i++) {
            init_arrival(arrival(i));
            init_arrival(done(i), GROUPS * WARPS), init_arrival(stored(i), GROUPS * WARPS);
        }
    }
    if (LATE && group != FETCHER) triangle(from_on);
    publish();
    __syncthreads();
    if (group == FETCHER) {
        keep_registers<FETCHER_REGISTERS>();
        if (thread > 0) return;
        const int of_q = tile.head / int(q_share), of_k = tile.head / int(k_share);
        const int of_v = tile.head / int(v_share), of_d = tile.head / int(d_share);
        auto at = [&](int step, int operand) -> Place {
            const int head = operand == Q ? of_q : operand == K ? of_k : operand == V ? of_v : of_d;
            return {0, tile.start + tile.first(step), head, tile.batch};
        };
        auto map_of = [&](int operand) -> const Map& {
            return operand == Q ? q : operand == K ? k : operand == V ? v : d;
        };
        auto fetch_operand = [&](int step, int operand) {
            fetch<WIDTH>(place(step, operand), map_of(operand), at(step, operand), arrival(step));
        };
        auto fetch_first = [&](int step) {
            if (step >= tile.chunks) return;
            expect(arrival(step), STAGE + tables.bytes(tile.count(step)));
            tables.fetch(slots + step % 2 * SLOT, tile.first(step), tile.count(step), arrival(step));
            fetch_operand(step, D), fetch_operand(step, LATE ? Q : V);
            if (!LATE) fetch_operand(step, K);
        };
        auto fetch_rest = [&](int step) {  // to where outputs have left from
            if (step >= tile.chunks) return;
            fetch_operand(step, LATE ? V : Q);
            if (LATE) fetch_operand(step, K);
        };
        auto fetch_operands_ahead = [&](int step) {
            if (!AHEAD || step >= tile.chunks) return;
            for (int operand = 0; operand < 4; operand++) fetch_ahead<WIDTH>(map_of(operand), at(step, operand));
        };
        for (int step = 0; step < 2; step++) fetch_first(step), fetch_rest(step);
        for (int step = 2; step < 1 + AHEAD; step++) fetch_operands_ahead(step);
        for (int step = 0; step < tile.chunks; step++) {
            wait_arrival(done(step), step / 2 & 1);
            fetch_first(step + 2);
            wait_arrival(stored(step), step / 2 & 1);
            if (tile.count(step) == CHUNK) {
                const Place to = {0, tile.start + tile.first(step), tile.head, tile.batch};
                write<WIDTH>(first, to, place_out(step, 0));
                if (LATE) write<WIDTH>(second, to, place_out(step, 1));
                wait_writes();
            }
            fetch_rest(step + 2);
            fetch_operands_ahead(step + 1 + AHEAD);
        }
        return;
    }

    get_registers<REGISTERS>();
    const int lane = thread % 32, warp = thread / 32, row = 16 * warp + lane / 4, column = 2 * (lane % 4);
    const int out_column = LATE ? 0 : 64 * group;
    const Offset place_of_state = (Offset(tile.program) * WIDTH + 64 * group + row) * WIDTH + column;
    const Offset head_row = Offset(tile.batch) * heads + tile.head;
    of_tokens += 2 * head_row * tokens + tile.start;
    float state[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++)
        state[i] = states ? states[place_of_state + i / 2 % 2 * 8 * WIDTH + i / 4 * 8 + i % 2] : 0.0f;

    // Early, a warpgroup's outputs and state are its own: it waits for the other nowhere but for chunks.
    auto meet_all = [&] {
        if (LATE) wait_here<1>();
        else meet();
    };
    const LostRows lost(lost_from, group);
    if (AGAIN) lost.start(state, group);
    auto say = [&](Word arrival) {
        __syncwarp();
        if (lane == 0) arrive(arrival);
    };
    // A chunk of fewer tokens; a whole one leaves by the thread that fetches.
    auto write_chunk = [&](int step) {
        if (step < 0 || tile.count(step) == CHUNK) return;
        const Word from = place_out(step, group);
        const bool of_first = group == 0 || !LATE;
        Bits* out = of_first ? first_out : second_out;
        const Offset token_stride = of_first ? first_token : second_token;
        out += tile.batch * (of_first ? first_batch : second_batch) + tile.head * (of_first ? first_head : second_head);
        for (int i = thread; i < COLUMNS_OUT / 2 * tile.count(step); i += THREADS) {
            const int token = i / (COLUMNS_OUT / 2), pair = i % (COLUMNS_OUT / 2);
            const Word x = load_word(from + pair / 32 * BLOCK + token * 128 + ((pair / 4 ^ token) & 7) * 16 + pair % 4 * 4);
            Bits* to = out + (tile.start + tile.first(step) + token) * token_stride + out_column + 2 * pair;
            to[0] = Bits(x), to[1] = Bits(x >> 16);
        }
        say(stored(step));
    };
    // The pairs of a chunk, of which each warp has those of its rows.
    auto write_pairs = [&](int step) {
        if (AGAIN || !LATE || step < 0 || group == 1 || thread >= tile.count(step)) return;
        float sum = 0.0f;
        for (int i = 0; i < WARPS; i++) sum += load(partial + (i * CHUNK + thread) * 4);
        of_tokens[tokens + tile.first(step) + thread] = sum;
    };
    // A token's sum of what a warpgroup has of its outputs times an operand of the same columns.
    auto write_sums = [&](int step, const float (&x)[COLUMNS_OUT / 2], Word operand, float* to) {
        float sums[2] = {0.0f, 0.0f};
        times_rows(x, operand + place_by_rows(), sums);
        if (lane % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (row + 8 * i < tile.count(step)) to[tile.first(step) + row + 8 * i] = sums[i];
        }
    };

    auto walk = [&](auto which) {
        constexpr int GROUP = decltype(which)::value;
        constexpr bool PAIRS_ = LATE && GROUP == 0 && !AGAIN, HANDS = LATE && GROUP == 1 && !AGAIN;
        // Scores are of `a` and `b`, outputs from the state of `a`, from tokens `c`; the state gets `left` times `added`.
        constexpr int A = !LATE ? D : GROUP == 0 ? V : K, B = !LATE ? V : GROUP == 0 ? D : Q;
        constexpr int C = !LATE ? K : GROUP == 0 ? Q : D, LEFT = LATE ? Q : K, ADDED = LATE ? D : V;
        constexpr bool BY_COLUMNS = LATE && GROUP == 1;  // the state, or it transposed
        float o[COLUMNS_OUT / 2], earlier[32], faded;
        // Outputs of a chunk, and its pairs, leave during the next one's first products.
        auto store_chunk = [&](int step) {
            if (step < 0) return;
            if (AGAIN) lost.mark(o, step, row, LATE ? GROUP : 0, out_column);
            store_rows(o, place_out(step, GROUP) + place_by_rows());
        };
        auto store_pairs = [&](int step) {
            if (PAIRS_ && step >= 0) sum_earlier_rows(earlier, row, partial + warp * CHUNK * 4);
        };
        wait_arrival(arrival(0), 0);
        tables.read(slots, tile.count(0), faded);
        for (int step = 0; step < tile.chunks; step++) {
            const int count = tile.count(step);
            if (AGAIN) {
                for (int zero = 0; zero < 2; zero++) {
                    lost.find(place(step, LEFT), place(step, ADDED), GROUP, step, count, zero);
                    wait_here<1>();
                }
                publish();
            }
            if (count < CHUNK) {
                zero_rows<WIDTH>(place(step, 2 * GROUP), count), zero_rows<WIDTH>(place(step, 2 * GROUP + 1), count);
                publish();
            }
            if (AGAIN || count < CHUNK) wait_here<1>();
            wait_products<0>();  // for ptxas, which does not see that none is under way
            float scores[32];
            Word a[STEPS][4];  // early, for both products read it
            if (!LATE) {
                const Word from = place(step, A) + place_by_rows();
#pragma unroll
                for (int i = 0; i < STEPS; i++) load_matrices((from + i / 4 * BLOCK) ^ i % 4 * 32, a[i]);
                here(a);
            }
            begin_products();
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                const Long b = by_rows(place(step, B)) + along_rows(i);
                if (LATE) product(scores, by_rows(place(step, A)) + along_rows(i), b, i);
                else product(scores, a[i], b, i);
            }
            end_products();
            meet_all();  // all are done with the chunk before
            store_chunk(step - 1);
            store_state(state, high + GROUP * BLOCK, low + GROUP * BLOCK);
            publish();
            if (step > 0 && tile.count(step - 1) == CHUNK) say(stored(step - 1));
            meet_all();  // the state is there
            write_chunk(step - 1);
            begin_products();
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                if (LATE) from_state<BY_COLUMNS>(o, place(step, A), high, GROUP, i, i);
                else from_state(o, a[i], high, GROUP, i, i);
            }
            if (!LATE || GROUP == 1) {
#pragma unroll
                for (int i = 0; i < STEPS; i++) {
                    if (LATE) from_state<BY_COLUMNS>(o, place(step, A), low, GROUP, i, 1);
                    else from_state(o, a[i], low, GROUP, i, 1);
                }
            }
            end_products();

            if (PAIRS_) here(earlier), store_pairs(step - 1);
            Word x[4][4];
            load_left(place(step, LEFT) + GROUP * BLOCK + place_transposed(), x);
            Weighted weighted;
            weighted.set(x, tables.pairs);
            fade(state, faded);
            advance(state, weighted, place(step, ADDED));

            wait_products<2>();
            here(scores);
            if (HANDS) {
                store_thread(handed, scores);
                say_here<0>();
            }
            Word weights[4][4];
            tables.each(warp, [&](int i, const float(&decay)[8]) {
#pragma unroll
                for (int j = 0; j < 8; j++) scores[8 * i + j] *= decay[j];
#pragma unroll
                for (int j = 0; j < 4; j++) weights[i][j] = pack(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
            });
            Word pairs_high[4][4], pairs_low[4][4];
            if (PAIRS_) {
                wait_here<0>();
                write_pairs(step - 1);
                times_thread(handed, scores);
                halve(scores, pairs_high, pairs_low);
            }
            wait_products<1>();
            here(o);
            if (!LATE) here(a);
            fade_rows(o, tables.from_state);
            if (!AGAIN && !LATE) write_sums(step, o, place(step, Q) + GROUP * BLOCK, of_tokens + GROUP * tokens);
            if (HANDS) write_sums(step, o, place(step, V), of_tokens);
            here(o), here(weights);
            begin_products();
#pragma unroll
            for (int i = 0; i < 4; i++)
                add_product(o, weights[i], by_columns(place(step, C) + (LATE ? 0 : GROUP * BLOCK)) + along_columns(i));
            end_products();
            wait_products<1>();
            here(state), here(weighted);
            if (PAIRS_) {
                here(pairs_high), here(pairs_low);
                begin_products();
#pragma unroll
                for (int i = 0; i < 4; i++) product(earlier, pairs_high[i], by_rows(from_on) + along_rows(i), i);
#pragma unroll
                for (int i = 0; i < 4; i++) product(earlier, pairs_low[i], by_rows(from_on) + along_rows(i), 1);
                end_products();
            }
            if (step + 1 < tile.chunks) {
                wait_arrival(arrival(step + 1), (step + 1) / 2 & 1);
                if (!PAIRS_) meet();  // all have read this chunk's tables
                tables.read(slots + (step + 1) % 2 * SLOT, tile.count(step + 1), faded);
            }
            wait_products<0>();
            here(o), here(weights);
            if (PAIRS_) here(earlier), here(pairs_high), here(pairs_low);
            say(done(step));
        }
        meet_all();
        store_chunk(tile.chunks - 1), store_pairs(tile.chunks - 1);
        publish();
        if (tile.count(tile.chunks - 1) == CHUNK) say(stored(tile.chunks - 1));
        meet();
        write_chunk(tile.chunks - 1), write_pairs(tile.chunks - 1);
    };
    if (group == 0) walk(Number<0>());
    else walk(Number<1>());
    if (AGAIN) return;
    float zero = 0.0f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        zero = fmaf(state[i], 0.0f, zero);
        if (LATE && starts)
            sum = fmaf(state[i], starts[place_of_state + i / 2 % 2 * 8 * WIDTH + i / 4 * 8 + i % 2], sum);
    }
    if (zero != 0.0f) again[blockIdx.x] = 1;
    if (LATE) {
#pragma unroll
        for (int apart = 1; apart < 32; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
        if (lane == 0) store(handed + threadIdx.x / 32 * 4, sum);
        wait_here<1>();
        if (threadIdx.x > 0) return;
        sum = 0.0f;
        for (int i = 0; i < GROUPS * WARPS; i++) sum += load(handed + i * 4);
        across[tile.program] = sum;
    }
}
