// leetdist.kernels.constant_decay.pytorch.block.tile_outputs on Hopper: see hopper_tile.cuh.
//
//     P = (a b^T) * decay      o^T = gamma^i (S^T a^T) + c^T P^T      S^T = gamma^64 S^T + (c w)^T b
//
// Rounded, the state is a left operand as it lies in the registers (as FlashAttention's softmax weights are); of what
// is computed only P passes through shared memory, and the outputs on their way out. All decays are the same in every
// chunk, and come from tables in shared memory. -DWIDE=1: outputs in fp32. -DWIDE=2: in fp32, as threads have them, for
// whoever adds them to its own (-DONTO=1): 64 x 64 numbers of a chunk, of a thread four at a time.
// -DHIGH=1: the state and P are two 16-bit numbers, high + low, each.
//
// A score of 0 times a NaN or an infinity of a later token is NaN. Whatever of b, c and the states is not finite is in
// the last state too, so that blocks that find such a thing there say so in `again`. A second kernel (-DAGAIN=1) follows
// the first and walks their tiles again, with 0 in its place and NaN for the outputs that see it; all others get the
// same products in the same order. Its blocks return at once where there is nothing to do. It is another kernel because
// ptxas, given both walks, spills in the first.
//
// An address of 0 stands for states of zeros.
//
// With 256 rows there are registers for half of the rounded state at a time: S^T a^T comes before the scores and behind
// them, so that the second half is rounded during the scores' product, and the scores decay during the second half's.
// Two or three warpgroups that share chunks take turns at the scores, which are the same for all columns. Of three, which
// hold up to 192 rows, each has 168 registers.

#include "hopper_tile.cuh"
#include "hopper_lost.cuh"
#include "hopper_held.cuh"

constexpr int STAGE = 2 * ROWS_BYTES + COLUMNS_BYTES;
// Chunks of a and of b in shared memory, where they are fetched one by one; of c there are two.
constexpr int A_STAGES = GROUPS == 1 ? 1 : 2, B_STAGES = GROUPS == 1 ? 1 : HIGH && STORED_ROWS > 192 ? 2 : 3;
constexpr int A_SLOTS = LAST_FETCHES ? A_STAGES : 2;  // places of a
constexpr bool TURNS = GROUPS > 1;
// Whether who has read a chunk of b last starts the next copy to its place while the state behind it moves on.
constexpr bool LATER = B_STAGES > 2;
constexpr bool FEW_REGISTERS = GROUPS > 2;  // so that operands are made as they are used
constexpr int STARTED = TURNS ? TIMES : LAST_FETCHES ? 2 : 1;  // of the times of S^T a^T, beside the scores
static_assert((!FEW_REGISTERS || LAST_FETCHES) && (!HIGH || COLUMNS == 64));
// Places of scores. With turns, as many as of chunks of b: who has the next in b's place knows that all are done with it.
constexpr int SEEN = TURNS ? B_STAGES : GROUPS;
constexpr int SCORES = (1 + HIGH) * BLOCK;
#ifndef ONTO
#define ONTO 0
#endif
#if ONTO
#define ONTO_ , const float *onto
#else
#define ONTO_
#endif
#if WIDE
typedef float Out;
#else
typedef Bits Out;
#endif

extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, AGAIN || GROUPS > 1 ? 1 : ROWS + COLUMNS <= 128 ? 3 : 2)
tile_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const float* states, Offset state_batch, Offset state_head,
             Offset state_tile, Offset state_row, Offset state_column, const __grid_constant__ Map o, Out* out,
             Offset out_batch, Offset out_head, Offset out_token, TILES, float scale, float state_scale,
             float added_scale, int* again ONTO_ PIECES_ FIRST_CHUNK(a) FIRST_CHUNK(b) FIRST_CHUNK(c)) {
    if (AGAIN && !again[blockIdx.x]) return;
    const Tile tile(TILE);
    const int thread = thread_number(), group = group_number(), lane = thread % 32, warp = thread / 32;
    float state[PARTS][HELD];
    const bool from_zero = !states;
    states += tile.batch * state_batch + tile.head * state_head + tile.number * state_tile;
    states += 2 * (lane % 4) * state_row + (tile.own + 16 * warp + lane / 4) * state_column;
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            // A load for all, so that none waits for another: where there is no column, of the first one.
            const int row = 8 * (i / 4), column = 64 * part + i / 2 % 2 * 8, first = tile.own + 16 * warp;
            const bool there = has_column(first + column);
            const Offset place = (row + i % 2) * state_row + (there ? column : -first - lane / 4) * state_column;
            state[part][i] = !from_zero && has_row(row) ? states[place] : 0.0f;
            if (!there) state[part][i] = 0.0f;
        }

    // Chunks of a, b and c beside each other; or those of a, those of b, and for each warpgroup its columns of c.
    const Word base = shared_memory(), all_b = base + A_STAGES * ROWS_BYTES;
    const Word own_c = all_b + B_STAGES * ROWS_BYTES + group * 2 * COLUMNS_BYTES;
    const Word all_seen = LAST_FETCHES ? all_b + B_STAGES * ROWS_BYTES + GROUPS * 2 * COLUMNS_BYTES : base + 2 * STAGE;
    const Word slots = all_seen + SEEN * SCORES, all_tables = slots + A_SLOTS * SLOT;
    Tables tables;
    tables.place(all_tables + group * (Tables::BYTES + Lost::BYTES), tile, log_decay TOKENS_);
    const Lost lost(all_tables + group * (Tables::BYTES + Lost::BYTES) + Tables::BYTES);
    auto place_a = [&](int step) {
        return base + step % A_SLOTS * (LAST_FETCHES ? ROWS_BYTES : STAGE);
    };
    auto slot = [&](int step) { return slots + step % A_SLOTS * SLOT; };
    auto place_b = [&](int step) {
        return LAST_FETCHES ? all_b + step % B_STAGES * ROWS_BYTES : place_a(step) + ROWS_BYTES;
    };
    auto place_c = [&](int step) {
        return LAST_FETCHES ? own_c + step % 2 * COLUMNS_BYTES : place_a(step) + 2 * ROWS_BYTES;
    };
    // A barrier for each place of a, b, c and scores, or one for the first three, and how many warps have read a and b.
    const Word arrivals = all_tables + GROUPS * (Tables::BYTES + Lost::BYTES);
    const Word arrivals_b = arrivals + A_STAGES * 8, arrivals_c = arrivals_b + B_STAGES * 8;
    const Word arrivals_seen = arrivals_c + GROUPS * 2 * 8;
    const Word read_a = arrivals_seen + SEEN * 8, read_b = read_a + A_STAGES * 4;
    KEEP_PIECES(read_b + B_STAGES * 4);
    auto arrival_a = [&](int step) { return arrivals + step % A_SLOTS * 8; };
    auto arrival_b = [&](int step) { return LAST_FETCHES ? arrivals_b + step % B_STAGES * 8 : arrival_a(step); };
    auto arrival_c = [&](int step) {
        return LAST_FETCHES ? arrivals_c + group * 16 + step % 2 * 8 : arrival_a(step);
    };
    auto arrival_seen = [&](int step) { return arrivals_seen + step % SEEN * 8; };
    auto fetch_a = [&](int step) {
        if (step >= tile.chunks) return;
        expect(arrival_a(step), (LAST_FETCHES ? ROWS_BYTES : STAGE) + tables.bytes(tile.count(step)));
        const Place at = tile.chunk(step, a_share);
        fetch<STORED_ROWS>(place_a(step), FROM_MAP(a, at), IN_PIECE(at, 0), arrival_a(step));
        tables.fetch(slot(step), tile.first(step), tile.count(step), arrival_a(step));
    };
    auto fetch_b = [&](int step) {
        if (step >= tile.chunks) return;
        if (LAST_FETCHES) expect(arrival_b(step), ROWS_BYTES);
        const Place at = tile.chunk(step, b_share);
        fetch<STORED_ROWS>(place_b(step), FROM_MAP(b, at), IN_PIECE(at, 1), arrival_b(step));
    };
    auto fetch_c = [&](int step) {
        if (step >= tile.chunks || thread > 0) return;
        if (LAST_FETCHES) expect(arrival_c(step), COLUMNS_BYTES);
        const Place at = tile.chunk(step, c_share, tile.own);
        fetch<COLUMNS>(place_c(step), FROM_MAP(c, at), IN_PIECE(at, 2), arrival_c(step));
    };
    if (AGAIN) lost.start(state);
    if (threadIdx.x == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        const int barriers = LAST_FETCHES ? A_STAGES + B_STAGES + GROUPS * 2 : 2;
        for (int i = 0; i < barriers; i++) init_arrival(arrivals + i * 8);
        if (LAST_FETCHES)
            for (int i = 0; i < A_STAGES + B_STAGES; i++) store(read_a + i * 4, Word(0));
        if (TURNS)
            for (int i = 0; i < SEEN; i++) init_arrival(arrivals_seen + i * 8, WARPS);
    }
    publish();
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int step = 0; step < (LAST_FETCHES ? A_STAGES : 1); step++) fetch_a(step);
        for (int step = 0; step < (LAST_FETCHES ? B_STAGES : 1); step++) fetch_b(step);
    }
    fetch_c(0);
    tables.start(tile, log_decay TOKENS_);
    tables.set(scale, state_scale, added_scale);

    if (WIDE < 2) out += tile.batch * out_batch + tile.head * out_head + tile.start * out_token + tile.own;
    // Where threads find four of their numbers, 4 THREADS apart; tiles begin behind the chunks of those before.
    [[maybe_unused]] auto in_order = [&](int step, int part) {
        const Offset blocks = (STATE_COLUMNS ? STATE_COLUMNS + 63 : GROUPS * COLUMNS * int(splits)) / 64;
        const Offset chunk = (tile.batch * heads + tile.head) * (tokens / CHUNK + tiles) + tile.number +
                             tile.start / CHUNK + tile.first(step) / CHUNK;
        return (chunk * blocks + tile.own / 64 + part) * (64 * CHUNK) + 4 * thread;
    };
    // Outputs of a chunk, whose place in shared memory was that of its c; fp32 outputs leave from the registers.
    auto write_chunk = [&](int step) {
        const Word from = place_c(step);
        if (WIDE || step < 0) return;
        if (tile.count(step) == CHUNK) {
            if (thread == 0) write<COLUMNS>(o, tile.chunk(step, 1, tile.own), from);
            return;
        }
        for (int i = thread; i < COLUMNS / 8 * tile.count(step); i += THREADS) {
            const int token = i / (COLUMNS / 8), vector = i % (COLUMNS / 8);
            if (!has_column(tile.own + 8 * vector)) continue;
            Word x[4];
            const Word at = from + vector / 8 * BLOCK + token * 128 + ((vector ^ token) & 7) * 16;
            load(at, x[0], x[1]), load(at + 8, x[2], x[3]);
            for (int j = 0; j < 8; j++)
                out[(tile.first(step) + token) * out_token + 8 * vector + j] = Out(Bits(x[j / 2] >> j % 2 * 16));
        }
    };

    const int turn = TURNS ? __shfl_sync(0xffffffffu, group, 0) : 0;  // for ptxas, which does not see it to be uniform
    bool last = false;
    for (int step = 0; step < tile.chunks; step++) {
        const Word a_i = place_a(step), b_i = place_b(step), c_i = place_c(step);
        const Word seen = all_seen + (TURNS ? step % SEEN : group) * SCORES;
        const int count = tile.count(step);
        wait_arrival(arrival_a(step), step / A_SLOTS & 1);
        auto wait_b = [&] {
            if (LAST_FETCHES) wait_arrival(arrival_b(step), step / B_STAGES & 1);
        };
        auto wait_c = [&] {
            if (LAST_FETCHES) wait_arrival(arrival_c(step), step / 2 & 1);
        };
        auto wait_seen = [&] {
            if (TURNS) wait_b(), wait_arrival(arrival_seen(step), step / SEEN & 1);
        };
        if (AGAIN) {
            wait_b(), wait_c();
            lost.find<STORED_ROWS, false>(b_i, step, count, false), lost.find<COLUMNS, true>(c_i, step, count, false);
            __syncthreads();  // both warpgroups have seen all of b
            lost.find<STORED_ROWS, false>(b_i, step, count, true), lost.find<COLUMNS, true>(c_i, step, count, true);
            publish();
        }
        if (count < CHUNK) {  // both warpgroups write the same zeros to b
            wait_b(), wait_c();
            zero_rows<STORED_ROWS>(b_i, count), zero_rows<COLUMNS>(c_i, count);
            publish();
        }
#if ONTO
#pragma unroll
        for (int part = 0; part < PARTS; part++)  // lines of 32 numbers
            if (has_column(tile.own + 64 * part)) prefetch(onto + in_order(step, part) + 28 * thread);
#endif
        meet();  // all have written the outputs of the chunk before, and read its scores
        wait_products<0>();  // for ptxas, which does not see that none is under way

        if (!LAST_FETCHES && thread == 0) fetch_a(step + 1), fetch_b(step + 1);
        write_chunk(step - 1);
        float scores[32], o_i[32];
        Word held[HELD_STEPS][4], x[PARTS][4][4];
        Units units;
        auto start_scores = [&] {
            begin_products();
#pragma unroll
            for (int i = 0; i < STEPS; i++)
                product(scores, by_rows(a_i) + along_rows(i), by_rows(b_i) + along_rows(i), i);
            end_products();
        };
        auto start_from_state = [&](int part, int time) {
            if (time == 0) units.set(state[part]);
            hold(state[part], units.power, time, held);
            here(held);
            begin_products();
#pragma unroll
            for (int i = 0; i < HELD_STEPS; i++)
                product(o_i, held[i], by_rows(a_i) + along_rows(time % SHARES * HELD_STEPS + i), time * HELD_STEPS + i);
            end_products();
        };
        auto start_from_seen = [&](auto& y, int first) {
            here(o_i), here(y);
            begin_products();
#pragma unroll
            for (int i = 0; i < int(sizeof(y) / sizeof(y[0])); i++)
                product(o_i, y[i], by_rows(seen) + along_rows(first + i), 1);
#pragma unroll
            for (int i = 0; HIGH && i < int(sizeof(y) / sizeof(y[0])); i++)
                product(o_i, y[i], by_rows(seen + BLOCK) + along_rows(first + i), 1);
            end_products();
        };
        auto go_on_from_state = [&](int part, int first) {
#pragma unroll
            for (int time = first; time < TIMES; time++) {
                wait_products<0>();
                here(o_i), here(held);
                start_from_state(part, time);
            }
        };
        auto fetch_next_a = [&] {
            if (LAST_FETCHES && is_last(read_a + step % A_STAGES * 4)) fetch_a(step + A_STAGES);
        };
        auto fetch_next_b = [&] {
            if (LATER && last) fetch_b(step - 1 + B_STAGES);
        };
        float faded = tables.faded(count);
        auto fade_state = [&](int part) {
            if (HALF || faded != 1.0f) fade(state[part], faded);  // in fp16 the branch costs decays what it saves
        };
        if (LAST_FETCHES) tables.read(slot(step), count, faded);
        if (TURNS) {
            if (step % GROUPS == turn) {
                wait_b();
                start_scores();
                wait_products<0>();
                here(scores);
                tables.decay(scores, seen);
                publish();
                __syncwarp();
                if (lane == 0) arrive(arrival_seen(step));
            }
            start_from_state(0, 0);
            go_on_from_state(0, 1);
        } else if (LAST_FETCHES) {
            start_from_state(0, 0);
            wait_b();
            start_scores();
            wait_products<1>();
            here(held);
            start_from_state(0, 1);
        } else {
            start_scores();
            tables.read(slot(step), count, faded);
            start_from_state(0, 0);
        }
        if (!TURNS) {
            wait_products<1>();
            here(scores);
            tables.decay(scores, seen);
            publish();
        }
        go_on_from_state(0, STARTED);
        meet();  // all have written their scores, and read the outputs of the chunk before
        if (thread == 0) wait_writes();
        fetch_c(step + 1);
        if (LAST_FETCHES) fade_state(0);  // earlier, there are too few registers

        Weighted weighted[PARTS];
        wait_c(), wait_seen();
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (part > 0) start_from_state(part, 0), go_on_from_state(part, 1);
            const Word from = c_i + part * BLOCK + place_transposed();
            if (!FEW_REGISTERS) load_left(from, x[part]);
            wait_products<0>();
            here(o_i), here(held);
            tables.fade(o_i, units.unit, count);
            if (FEW_REGISTERS) {
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    Word y[2][4];
                    load_transposed(from + i * 16 * 128, y[0]), load_transposed(from + (i + 1) * 16 * 128, y[1]);
                    start_from_seen(y, i);
                    wait_products<0>();
                    here(o_i), here(y);
                }
                load_left(from, x[part]);
            } else {
                start_from_seen(x[part], 0);
            }
            if (FEW_REGISTERS || part < PARTS - 1) {
                wait_products<0>();
            } else {  // the state comes last: there are no registers for the operands of both
                weighted[0].set(x[0], tables.pairs);
                if (!LAST_FETCHES) fade_state(0);
                advance(state[0], weighted[0], b_i);
                fetch_next_a();
                fetch_next_b();
                wait_products<1>();
            }
            here(o_i), here(x[part]);
            if (AGAIN) lost.mark(o_i, step, part);
            const int column = 64 * part + 16 * warp + lane / 4;
#if ONTO
            if (has_column(tile.own + 64 * part)) {
                const float* from = onto + in_order(step, part);
#pragma unroll
                for (int j = 0; j < 32; j += 4) {
                    float x[4];
                    load_four(from + j * THREADS, x);
#pragma unroll
                    for (int i = 0; i < 4; i++) o_i[j + i] += x[i];
                }
            }
#endif
#if WIDE > 1
            if (has_column(tile.own + 64 * part)) {
                float* to = out + in_order(step, part);
#pragma unroll
                for (int j = 0; j < 32; j += 4) store_four(to + j * THREADS, o_i[j], o_i[j + 1], o_i[j + 2], o_i[j + 3]);
            }
#endif
#pragma unroll
            for (int i = WIDE > 1 ? 32 : 0; i < 32; i += 8) {  // 16 tokens
                if (WIDE) {
#pragma unroll
                    for (int j = i; j < i + 8; j++) {
                        const int token = j / 4 * 8 + 2 * (lane % 4) + j % 2;
                        if (token < count && has_column(tile.own + column - lane / 4 + j / 2 % 2 * 8))
                            out[(tile.first(step) + token) * out_token + column + j / 2 % 2 * 8] = Out(o_i[j]);
                    }
                } else {  // a warp writes where it alone has read
                    Word y[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) y[j] = pack(o_i[i + 2 * j], o_i[i + 2 * j + 1]);
                    store_transposed(c_i + part * BLOCK + place_transposed() + i / 8 * 16 * 128, y);
                }
            }
        }
#pragma unroll
        for (int part = 1; part < PARTS; part++) {
            weighted[part].set(x[part], tables.pairs);
            fade_state(part);
            advance(state[part], weighted[part], b_i);
        }
        publish();
        if (FEW_REGISTERS) {
            advance(state[0], x[0], tables.pairs, b_i, [&](int part) { part ? fetch_next_b() : fetch_next_a(); });
        } else {
            wait_products<0>();
#pragma unroll
            for (int part = 0; part < PARTS; part++) here(state[part]), here(weighted[part]);
        }
        if (!AGAIN && step == tile.chunks - 1) {  // here rather than behind the loop, where ptxas would spill in it
            float zero = 0.0f;
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < HELD; i++) zero = fmaf(state[part][i], 0.0f, zero);
            if (zero != 0.0f) again[blockIdx.x] = 1;
        }
        if (LAST_FETCHES) last = is_last(read_b + step % B_STAGES * 4);
        if (!LATER && last) fetch_b(step + B_STAGES);
    }
    meet();
    write_chunk(tile.chunks - 1);
    if (thread == 0) wait_writes();
}
