// tile_outputs.cu for heads that share a and whose outputs are wanted for their sum alone: dk and dv of grouped heads.
//
// Two heads are a block, of two warpgroups: each walks its own tile as one of tile_outputs.cu does, with a that both read.
// The first hands the second its outputs, 64 columns at a time, which adds its own; it runs ahead by as much as it is not
// kept waiting for the place of what it has handed over, so that each still fills the other's waits. Two blocks can be a
// cluster (-DCLUSTER=2): each takes half of a chunk's tokens, sends the other its numbers of the other half, and writes
// the sums of four heads: (h0 + h1) + (h2 + h3), of which no sum has an order. -DWIDE=1: in fp32, where further heads are
// still to be added up; else rounded.
//
// What comes from the other block is added during the next chunk's first product; until then what is to be added to it
// lies where the second head's chunk of c was, which is in registers by then. Handed over are 64 columns in a place of their
// own, and 64 where the first head's chunk of c was.
//
// Heads count blocks' clusters here, and `again` blocks. What is not finite is as in tile_outputs.cu.

#include "hopper_tile.cuh"
#include "hopper_lost.cuh"
#include "hopper_held.cuh"

constexpr int HEADS = GROUPS * CLUSTER;          // that are added up
constexpr int OWN = ROWS_BYTES + COLUMNS_BYTES;  // of a chunk, of one head
constexpr int NUMBERS = 32 * THREADS * 4;        // bytes of a chunk's outputs, of a part
constexpr int MINE = 32 / CLUSTER;               // numbers of a part that a thread writes
constexpr int MAIL = CLUSTER > 1 ? MINE * THREADS * 4 : 0;
static_assert(GROUPS == 2 && PARTS == 2 && ROWS == 128 && (WIDE || CLUSTER > 1));
#if WIDE
typedef float Out;
#else
typedef Bits Out;
#endif

extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
summed_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const float* states, Offset state_batch, Offset state_head,
               Offset state_tile, Offset state_row, Offset state_column, Out* out, Offset out_batch, Offset out_head,
               Offset out_token, TILES, float scale, float state_scale, float added_scale, int* again) {
    const int first_block = blockIdx.x / CLUSTER * CLUSTER;
    if (AGAIN && !again[first_block] && !again[first_block + CLUSTER - 1]) return;
    Tile tile(TILE);
    const int thread = thread_number(), group = __shfl_sync(0xffffffffu, group_number(), 0);
    const int lane = thread % 32, warp = thread / 32, rank = CLUSTER > 1 ? cluster_rank() : 0;
    const bool first = group == 0;
    out += tile.batch * out_batch + tile.head * out_head + tile.start * out_token;
    tile.head = HEADS * tile.head + GROUPS * rank + group, tile.column = tile.own = 0;
    float state[PARTS][HELD];
    states += tile.batch * state_batch + tile.head * state_head + tile.number * state_tile;
    states += 2 * (lane % 4) * state_row + (16 * warp + lane / 4) * state_column;
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < HELD; i++)
            state[part][i] = states[(8 * (i / 4) + i % 2) * state_row + (64 * part + i / 2 % 2 * 8) * state_column];

    // Two places of a, and of b and c of each head; scores; what is handed over, what is sent, tables and barriers.
    const Word base = shared_memory(), all_own = base + 2 * ROWS_BYTES, all_seen = all_own + 2 * GROUPS * OWN;
    const Word seen = all_seen + group * BLOCK, handed = all_seen + GROUPS * BLOCK, mail = handed + NUMBERS;
    const Word all_tables = mail + PARTS * MAIL, own_tables = all_tables + group * (Tables::BYTES + Lost::BYTES);
    const Word arrivals = all_tables + GROUPS * (Tables::BYTES + Lost::BYTES), arrival_mail = arrivals + 6 * 8;
    const Word free_mail = arrival_mail + 8, released = free_mail + 8;
    auto place_a = [&](int step) { return base + step % 2 * ROWS_BYTES; };
    auto place_b = [&](int step, int group) { return all_own + (step % 2 * GROUPS + group) * OWN; };
    auto place_c = [&](int step, int group) { return place_b(step, group) + ROWS_BYTES; };
    auto arrival_a = [&](int step) { return arrivals + step % 2 * 8; };
    auto arrival_own = [&](int step) { return arrivals + 16 + (step % 2 * GROUPS + group) * 8; };
    auto fetch_a = [&](int step) {
        if (step >= tile.chunks) return;
        expect(arrival_a(step), ROWS_BYTES);
        fetch<ROWS>(place_a(step), a, tile.chunk(step, a_share), arrival_a(step));
    };
    auto fetch_b = [&](int step) {
        if (step >= tile.chunks) return;
        expect(arrival_own(step), OWN);
        fetch<ROWS>(place_b(step, group), b, tile.chunk(step, b_share), arrival_own(step));
    };
    auto fetch_c = [&](int step) {
        if (step < tile.chunks) fetch<COLUMNS>(place_c(step, group), c, tile.chunk(step, c_share), arrival_own(step));
    };
    Tables tables;
    tables.place(own_tables, tile, log_decay TOKENS_);
    const Lost lost(own_tables + Tables::BYTES);
    if (AGAIN) lost.start(state);
    if (threadIdx.x == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        for (int i = 0; i < 7; i++) init_arrival(arrivals + i * 8);
        init_arrival(free_mail, WARPS);
        store(released, Word(0));
    }
    publish();
    if (CLUSTER > 1) meet_cluster();
    else __syncthreads();
    if (threadIdx.x == 0) fetch_a(0);
    if (thread == 0) fetch_b(0), fetch_c(0);
    if (CLUSTER > 1 && thread == 0 && !first) expect(arrival_mail, PARTS * MAIL);
    tables.start(tile, log_decay TOKENS_);
    tables.set(scale, state_scale, added_scale);

    // Where a thread finds two of its numbers of a part, where they are handed over and where they wait: a warp's places
    // are its own.
    auto two_of = [&](Word from, int i) { return from + i / 2 * THREADS * 8 + thread * 8; };
    auto write_sums = [&](const float (&mine)[MINE], int step, int part, Word through) {
        Out* to = out + tile.first(step) * out_token + 64 * part + 16 * warp;
        const int begin = rank * 2 * MINE, count = tile.count(step);
#if WIDE
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int token = begin + i / 4 * 8 + 2 * (lane % 4) + i % 2;
            if (token < count) to[token * out_token + lane / 4 + i / 2 % 2 * 8] = mine[i];
        }
#else
        // Rounded, through memory that is the warp's own, so that whole sectors are written.
        auto at = [&](int block, int token, int vector) {
            return through + (4 * block + token / 8) * THREADS * 8 + warp * 256 + token % 8 * 32 +
                   ((token >> 2 ^ vector) & 1) * 16;
        };
        __syncwarp();
#pragma unroll
        for (int block = 0; block < MINE / 8; block++) {
            Word y[4];
#pragma unroll
            for (int j = 0; j < 4; j++) y[j] = pack(mine[8 * block + 2 * j], mine[8 * block + 2 * j + 1]);
            store_transposed(at(block, (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1), y);
        }
        __syncwarp();
#pragma unroll
        for (int block = 0; block < MINE / 8; block++) {
            const int token = begin + block * 16 + lane / 2;
            const Word from = at(block, lane / 2, lane % 2);
            Word y[4];
            load(from, y[0], y[1]), load(from + 8, y[2], y[3]);
            if (token < count) write_words(to + token * out_token + lane % 2 * 8, y);
        }
#endif
    };
    // Of a chunk, with what the other block has sent.
    auto finish = [&](int step) {
        if (CLUSTER == 1 || first || step < 0) return;
        wait_arrival(arrival_mail, step & 1);
        if (thread == 0 && step + 1 < tile.chunks) expect(arrival_mail, PARTS * MAIL);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const Word kept = place_c(step, group) + part * BLOCK;
            float mine[MINE];
#pragma unroll
            for (int i = 0; i < MINE; i += 2) {
                float x, y;
                load(two_of(kept, i), mine[i], mine[i + 1]);
                load(mail + part * MAIL + i / 4 * THREADS * 16 + thread * 16 + i % 4 * 4, x, y);
                mine[i] += x, mine[i + 1] += y;
            }
            write_sums(mine, step, part, kept);
        }
        __syncwarp();  // all have read what they were sent
        if (lane == 0) arrive(free_mail, 1 - rank);
    };
    auto hand_over = [&](const float (&o)[32], int step, int part) {
        if (part > 0) meet();  // all have read this chunk of c
        else if (step > 0) wait_here<2>();
        const Word to = part > 0 ? place_c(step, group) : handed;
#pragma unroll
        for (int i = 0; i < 32; i += 2) store(two_of(to, i), o[i], o[i + 1]);
        if (part > 0) say_here<1>();
        else say_here<0>();
    };
    auto take_over = [&](float (&o)[32], int step, int part) {
        if (part > 0) wait_here<1>();
        else wait_here<0>();
        const Word from = part > 0 ? place_c(step, 0) : handed;
#pragma unroll
        for (int i = 0; i < 32; i += 2) {
            float x, y;
            load(two_of(from, i), x, y);
            o[i] += x, o[i + 1] += y;
        }
        if (step + 1 < tile.chunks) {
            if (part > 0) say_here<3>();
            else say_here<2>();
        }
        if (CLUSTER == 1) {
            float mine[MINE];
#pragma unroll
            for (int i = 0; i < MINE; i++) mine[i] = o[i];
            write_sums(mine, step, part, handed);
            return;
        }
        if (part == 0 && step > 0) wait_arrival(free_mail, (step - 1) & 1);
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            auto theirs = [&](int j) { return rank ? o[i + j] : o[i + j + 16]; };
            send(mail + part * MAIL + i / 4 * THREADS * 16 + thread * 16, arrival_mail, 1 - rank, theirs(0), theirs(1),
                 theirs(2), theirs(3));
        }
        const Word kept = place_c(step, group) + part * BLOCK;  // which all have read, or nobody would be here
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            auto mine = [&](int j) { return rank ? o[i + j + 16] : o[i + j]; };
            store(two_of(kept, i), mine(0), mine(1));
        }
    };

    for (int step = 0; step < tile.chunks; step++) {
        const Word a_i = place_a(step), b_i = place_b(step, group), c_i = place_c(step, group);
        const int count = tile.count(step);
        wait_arrival(arrival_a(step), step / 2 & 1), wait_arrival(arrival_own(step), step / 2 & 1);
        if (AGAIN) {
            for (int zero = 0; zero < 2; zero++) {
                lost.find<ROWS, false>(b_i, step, count, zero), lost.find<COLUMNS, true>(c_i, step, count, zero);
                meet();
            }
            publish();
        }
        if (count < CHUNK) {
            zero_rows<ROWS>(b_i, count), zero_rows<COLUMNS>(c_i, count);
            publish();
        }
        meet();  // all are done with the chunk before, but for what waits where its c was
        wait_products<0>();  // for ptxas, which does not see that none is under way
        if (thread == 0) {
            if (is_last_of(GROUPS, released)) fetch_a(step + 1);
            fetch_b(step + 1);
        }
        float scores[32], o_i[32];
        Word held[HELD_STEPS][4], x[PARTS][4][4];
        Units units;
        auto start_from_state = [&](int part) {
            units.set(state[part]);
            hold(state[part], units.power, 0, held);
            here(held);
            begin_products();
#pragma unroll
            for (int i = 0; i < HELD_STEPS; i++) product(o_i, held[i], by_rows(a_i) + along_rows(i), i);
            end_products();
        };
        begin_products();
#pragma unroll
        for (int i = 0; i < STEPS; i++) product(scores, by_rows(a_i) + along_rows(i), by_rows(b_i) + along_rows(i), i);
        end_products();
        finish(step - 1);
        const float faded = tables.faded(count);
        start_from_state(0);
        wait_products<1>();
        here(scores);
        tables.decay(scores, seen);
        publish();
        if (first && step > 0) wait_here<3>();  // the other has read what was handed over where c is fetched now
        meet();  // all have written their scores, and what was left of the chunk before
        if (thread == 0) fetch_c(step + 1);

        Weighted weighted[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (part > 0) start_from_state(part);
            load_left(c_i + part * BLOCK + place_transposed(), x[part]);
            wait_products<0>();
            here(o_i), here(held);
            tables.fade(o_i, units.unit, count);
            here(o_i), here(x[part]);
            begin_products();
#pragma unroll
            for (int i = 0; i < 4; i++) product(o_i, x[part][i], by_rows(seen) + along_rows(i), 1);
            end_products();
            if (part < PARTS - 1) {
                wait_products<0>();
            } else {
                weighted[0].set(x[0], tables.pairs);
                fade(state[0], faded);
                advance(state[0], weighted[0], b_i);
                wait_products<1>();
            }
            here(o_i), here(x[part]);
            if (AGAIN) lost.mark(o_i, step, part);
            if (first) hand_over(o_i, step, part);
            else take_over(o_i, step, part);
        }
#pragma unroll
        for (int part = 1; part < PARTS; part++) {
            weighted[part].set(x[part], tables.pairs);
            fade(state[part], faded);
            advance(state[part], weighted[part], b_i);
        }
        publish();
        wait_products<0>();
#pragma unroll
        for (int part = 0; part < PARTS; part++) here(state[part]), here(weighted[part]);
        if (!AGAIN && step == tile.chunks - 1) {  // here rather than behind the loop, where ptxas would spill in it
            float zero = 0.0f;
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < HELD; i++) zero = fmaf(state[part][i], 0.0f, zero);
            if (zero != 0.0f) again[blockIdx.x] = 1;
        }
    }
    finish(tile.chunks - 1);
    if (CLUSTER > 1) meet_cluster();  // nobody leaves whom the other may still send something
}
