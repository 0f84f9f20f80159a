// summed_outputs.cu for more heads that share c: four in a block of two warpgroups, and the sums of two blocks of a
// cluster (-DCLUSTER=2) added up where they are made, so that what is written is what is wanted.
//
//     P = sum_h (a_h b_h^T) * decay_h      o^T = sum_h from_state_h S_h^T a_h^T + c^T P^T      S_h^T = faded_h S_h^T + (c w_h)^T b_h
//
// Each warpgroup holds 64 columns of the states of all four heads, and makes the scores of two, which both read. So a
// warpgroup's outputs are of all heads of the block. Of two blocks, each takes half of a chunk's tokens: it sends the
// other its numbers of the other half, which are two numbers' sum there, and no order. a and b have 64 columns, c 128;
// -DWIDE=1: outputs in fp32, where further blocks are still to be added up. A tile's number, and `again`, count blocks.
// What is not finite is as in tile_outputs.cu.

#include "../../constant_decay/cuda/hopper_tile.cuh"
#include "../../constant_decay/cuda/hopper_lost.cuh"
#include "../../constant_decay/cuda/hopper_held.cuh"

constexpr int OWN = 2, HEADS = OWN * GROUPS;  // heads whose scores a warpgroup makes, and of the block
constexpr int STAGE = HEADS * 2 * ROWS_BYTES + GROUPS * COLUMNS_BYTES;
constexpr int MAIL = COLUMNS * CHUNK / 2 * 4;  // bytes that a warpgroup is sent of a chunk
constexpr int MINE = 32 / CLUSTER;             // numbers of a chunk that a thread adds up
static_assert(PARTS == 1 && GROUPS == 2 && !HALF && ROWS == 64 && COLUMNS == 64 && HEADS == WARPS);
#if WIDE
typedef float Out;
#else
typedef Bits Out;
#endif

extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
grouped_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const float* states, Offset state_batch, Offset state_head,
                Offset state_tile, Offset state_row, Offset state_column, Out* out, Offset out_batch, Offset out_head,
                Offset out_token, TILES, float scale, float state_scale, float added_scale, int* again) {
    const int first_block = blockIdx.x / CLUSTER * CLUSTER;
    if (AGAIN && !again[first_block] && !again[first_block + CLUSTER - 1]) return;
    Tile tile(TILE);
    const int thread = thread_number(), group = __shfl_sync(0xffffffffu, group_number(), 0);
    const int lane = thread % 32, warp = thread / 32, first_head = HEADS * tile.head;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    out += tile.batch * out_batch + tile.head / CLUSTER * out_head + tile.start * out_token + tile.own;
    float state[HEADS][PARTS][HELD];
    states += tile.batch * state_batch + first_head * state_head + tile.number * state_tile;
    states += 2 * (lane % 4) * state_row + (tile.own + 16 * warp + lane / 4) * state_column;
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int i = 0; i < HELD; i++)
            state[h][0][i] = states[h * state_head + (8 * (i / 4) + i % 2) * state_row + i / 2 % 2 * 8 * state_column];

    // Two places of: a and b of each head, and c. Behind them scores, what is sent, log-decays, tables and barriers.
    const Word base = shared_memory(), all_seen = base + 2 * STAGE, all_mail = all_seen + GROUPS * BLOCK;
    const Word slots = all_mail + 2 * GROUPS * MAIL, all_tables = slots + 2 * HEADS * SLOT;
    const Word all_lost = all_tables + HEADS * Tables::BYTES, all_faded = all_lost + GROUPS * Lost::BYTES;
    const Word arrivals = all_faded + HEADS * 4;
    auto mail = [&](int step) { return all_mail + (step % 2 * GROUPS + group) * MAIL; };
    auto arrival_mail = [&](int step) { return arrivals + 16 + (step % 2 * GROUPS + group) * 8; };
    auto slot = [&](int step, int h) { return slots + (step % 2 * HEADS + h) * SLOT; };
    auto place_a = [&](int step, int h) { return base + step % 2 * STAGE + h * ROWS_BYTES; };
    auto place_b = [&](int step, int h) { return place_a(step, HEADS + h); };
    auto place_c = [&](int step) { return place_a(step, 2 * HEADS); };
    tile.head = first_head;
    Tables first_tables;
    first_tables.place(all_tables, tile, log_decay TOKENS_);
    first_tables.set(scale, state_scale, added_scale);
    auto tables = [&](int h) {  // made where it is wanted, for there are no registers to hold all
        Tables moved = first_tables;
        moved.move(h * Tables::BYTES, h * decay_head);
        return moved;
    };
    // Each warp asks for a share (paired_outputs.cu): a head of a with its log-decays, or of b, and the first two a block of c.
    const int own_h = __shfl_sync(0xffffffffu, warp, 0);
    const int head_ab = (first_head + own_h) / int(group ? b_share : a_share), head_c = first_head / int(c_share);
    auto fetch_share = [&](int step) {
        if (step >= tile.chunks || lane != 0) return;
        const Word arrival = arrivals + step % 2 * 8;
        const int count = tile.count(step);
        const bool of_c = group && own_h < GROUPS;
        expect(arrival, ROWS_BYTES + (group ? of_c ? COLUMNS_BYTES : 0 : tables(own_h).bytes(count)));
        fetch<ROWS>(place_a(step, HEADS * group + own_h), group ? b : a, tile.chunk_of(step, head_ab), arrival);
        if (!group) tables(own_h).fetch(slot(step, own_h), tile.first(step), count, arrival);
        if (!of_c) return;
        const Place place = tile.chunk_of(step, head_c, tile.column + own_h * COLUMNS);
        fetch<COLUMNS>(place_c(step) + own_h * COLUMNS_BYTES, c, place, arrival);
    };
    const Lost lost(all_lost + group * Lost::BYTES);
    if (AGAIN) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) lost.start(state[h], h == 0);
    }
    if (threadIdx.x == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        for (int i = 0; i < 2 + 2 * GROUPS; i++) init_arrival(arrivals + i * 8, i < 2 ? GROUPS * WARPS : 1);
    }
    publish();
    if (CLUSTER > 1) meet_cluster();
    else __syncthreads();
    fetch_share(0);
    auto arrived = [&](int step) { wait_arrival(arrivals + step % 2 * 8, step / 2 & 1); };
    auto weigh_head = [&](int step, int own) {  // one of the warpgroup's two heads; v is b, or reversed a
        if (step >= tile.chunks) return;
        const int h = OWN * group + own;
        arrived(step);
        weigh_rows(REVERSE ? place_a(step, h) : place_b(step, h), tables(h).weights(slot(step, h)), tile.count(step));
    };
    for (int own = 0; WEIGHTED && own < OWN; own++) weigh_head(0, own);

    for (int step = 0; step < tile.chunks; step++) {
        const Word c_i = place_c(step) + group * COLUMNS_BYTES;
        const int count = tile.count(step);
        arrived(step);
        if (AGAIN) {
            if (WEIGHTED) __syncthreads();
            for (int zero = 0; zero < 2; zero++) {
                for (int h = 0; h < HEADS; h++) lost.find<ROWS, false>(place_b(step, h), step, count, zero);
                lost.find<COLUMNS, true>(c_i, step, count, zero);
                __syncthreads();
            }
            publish();
        }
        if (count < CHUNK) {  // both warpgroups write the same zeros to b
            for (int h = 0; h < HEADS; h++) zero_rows<ROWS>(place_b(step, h), count);
            zero_rows<COLUMNS>(c_i, count);
            publish();
        }
        __syncthreads();  // all are done with the chunk before
        wait_products<0>();  // for ptxas, which does not see that none is under way
        fetch_share(step + 1);
        if (CLUSTER > 1 && thread == 0) expect(arrival_mail(step), MAIL);

        float o[32], more[32];
        auto start_scores = [&](float (&x)[32], int h) {
            begin_products();
#pragma unroll
            for (int i = 0; i < STEPS; i++)
                product(x, by_rows(place_a(step, h)) + along_rows(i), by_rows(place_b(step, h)) + along_rows(i), i);
            end_products();
        };
        auto weigh = [&](float (&x)[32], int h) {
            tables(h).each(warp, [&](int step, const float (&d)[8]) {
#pragma unroll
                for (int i = 0; i < 8; i++) x[8 * step + i] *= d[i];
            });
        };
        const int first_own = OWN * group;
        auto make_tables = [&](int h) {
            float faded;
            tables(h).read(slot(step, h), count, faded);
            if (thread == 0) store(all_faded + h * 4, faded);
        };
        start_scores(o, first_own);
        make_tables(first_own);
        start_scores(more, first_own + 1);
        make_tables(first_own + 1);
        wait_products<0>();
        here(o), here(more);
        weigh(o, first_own), weigh(more, first_own + 1);
        const Word to = all_seen + group * BLOCK + (warp * 16 + (lane & 15)) * 128 + ((lane >> 4 ^ lane) & 7) * 16;
#pragma unroll
        for (int i = 0; i < 32; i += 8) {
            Word x[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                x[j] = pack(o[i + 2 * j] + more[i + 2 * j], o[i + 2 * j + 1] + more[i + 2 * j + 1]);
            store_matrices(to ^ i / 8 * 32, x);
        }
        publish();
        __syncthreads();  // all have written their scores, and their tables

        Units units;
        Word x[4][4];
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float(&from_state)[32] = h == 0 ? o : more;
            Word held[HELD_STEPS][4];
            units.set(state[h][0]);
            hold(state[h][0], units.power, 0, held);
            here(held);
            begin_products();
#pragma unroll
            for (int i = 0; i < HELD_STEPS; i++)
                product(from_state, held[i], by_rows(place_a(step, h)) + along_rows(i), i);
            end_products();
            if (h == 0) load_left(c_i + place_transposed(), x);
            wait_products<0>();
            here(from_state), here(held);
            tables(h).fade(from_state, units.unit, count);
#pragma unroll
            for (int i = 0; h > 0 && i < 32; i++) o[i] += more[i];
        }
        here(o), here(x);
        begin_products();
#pragma unroll
        for (int i = 0; i < 4; i++) product(o, x[i], by_rows(all_seen) + along_rows(i), 1);
#pragma unroll
        for (int i = 0; i < 4; i++) product(o, x[i], by_rows(all_seen + BLOCK) + along_rows(i), 1);
        end_products();
        wait_products<0>();
        here(o), here(x);
        if (AGAIN) lost.mark(o, step, 0);
        float mine[MINE];
#pragma unroll
        for (int i = 0; i < MINE; i++) mine[i] = CLUSTER > 1 && rank ? o[(i + 16) % 32] : o[i];
        if (CLUSTER > 1) {
#pragma unroll
            for (int i = 0; i < 16; i += 4) {
                auto theirs = [&](int j) { return rank ? o[i + j] : o[i + j + 16]; };
                send(mail(step) + i / 4 * THREADS * 16 + thread * 16, arrival_mail(step), 1 - rank, theirs(0), theirs(1),
                     theirs(2), theirs(3));
            }
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            Weighted weighted;
            weighted.set(x, tables(h).pairs);
            fade(state[h][0], load(all_faded + h * 4));
            advance(state[h][0], weighted, place_b(step, h));
            if (WEIGHTED && h >= HEADS - OWN) weigh_head(step + 1, h - (HEADS - OWN));  // meanwhile
            wait_products<0>();
            here(state[h][0]), here(weighted);
        }
        if (CLUSTER > 1) {
            wait_arrival(arrival_mail(step), step / 2 & 1);
#pragma unroll
            for (int i = 0; i < 16; i += 2) {
                float x, y;
                load(mail(step) + i / 4 * THREADS * 16 + thread * 16 + i % 4 * 4, x, y);
                mine[i % MINE] += x, mine[(i + 1) % MINE] += y;
            }
        }
#if WIDE
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int token = rank * 2 * MINE + i / 4 * 8 + 2 * (lane % 4) + i % 2;
            if (token < count)
                out[(tile.first(step) + token) * out_token + 16 * warp + lane / 4 + i / 2 % 2 * 8] = mine[i];
        }
#else
        // Rounded, through the memory of what this warp was sent, so that whole sectors are written.
        __syncwarp();
        const Word through = mail(step) + warp * 512;
        auto at = [&](int block, int token, int vector) {
            return through + block * THREADS * 16 + token * 32 + ((token >> 2 ^ vector) & 1) * 16;
        };
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
            const int token = rank * 2 * MINE + block * 16 + lane / 2;
            const Word from = at(block, lane / 2, lane % 2);
            Word y[4];
            load(from, y[0], y[1]), load(from + 8, y[2], y[3]);
            if (token < count)
                write_words(out + (tile.first(step) + token) * out_token + 16 * warp + lane % 2 * 8, y);
        }
        __syncwarp();
#endif
        if (!AGAIN && step == tile.chunks - 1) {
            float zero = 0.0f;
#pragma unroll
            for (int h = 0; h < HEADS; h++)
#pragma unroll
                for (int i = 0; i < HELD; i++) zero = fmaf(state[h][0][i], 0.0f, zero);
            if (zero != 0.0f) again[blockIdx.x] = 1;
        }
    }
    if (CLUSTER > 1) meet_cluster();  // nobody leaves whom the other may still send something
}
