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
//
// With -DFLOWS=1 (a, b and c are do, v and k), also what log_decay's gradient is a sum of (paired_gradients.cu), in fp32:
//
//     A_i = q_i (from_state S^T do_i)      of_t = sum_(i >= t > j) (q_i k_j) P_ij
//
// A of each head, with what rounding has left of the state, for it is added up over a whole tile. q lies where scores do
// otherwise, and scores where the other block will send its numbers of the next chunk, but not before it has this one's. A
// warp leaves its sums where it alone has read q for all heads; the last to do so adds up A, and asks for the next chunk's.

#include "../../constant_decay/cuda/hopper_tile.cuh"
#include "../../constant_decay/cuda/hopper_lost.cuh"
#include "../../constant_decay/cuda/hopper_held.cuh"
#include "flows.cuh"

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
#if FLOWS  // A and pairs: (B, H, N); lost: (B, H, tiles), whether the state at the tile's end is not finite
#define FLOW , OPERAND(q), float *of_tokens, Offset of_head, float *pairs, Offset pairs_head, int *lost_heads
#else
#define FLOWS 0
#define FLOW
#endif
static_assert(!FLOWS || (!REVERSE && !AGAIN));

extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
grouped_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const float* states, Offset state_batch, Offset state_head,
                Offset state_tile, Offset state_row, Offset state_column, Out* out, Offset out_batch, Offset out_head,
                Offset out_token, TILES, float scale, float state_scale, float added_scale, int* again FLOW) {
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

    // Two places of: a and b of each head, and c. Behind them scores, or q, what is sent, log-decays, tables and barriers.
    const Word base = shared_memory(), all_q = base + 2 * STAGE, all_mail = all_q + GROUPS * BLOCK;
    const Word slots = all_mail + 2 * GROUPS * MAIL, all_tables = slots + 2 * HEADS * SLOT;
    const Word all_lost = all_tables + HEADS * Tables::BYTES, all_faded = all_lost + GROUPS * Lost::BYTES;
    const Word arrivals = all_faded + HEADS * 4;
    auto mail = [&](int step) { return all_mail + (step % 2 * GROUPS + group) * MAIL; };
    auto all_seen = [&](int step) { return FLOWS ? all_mail + (step + 1) % 2 * GROUPS * MAIL : all_q; };
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
#if FLOWS
    const Offset head_row = Offset(tile.batch) * heads * HEADS + first_head;
    of_tokens += head_row * of_head + tile.start, pairs += head_row * pairs_head + tile.start;
    lost_heads += head_row * tiles + tile.number;
    const Word arrival_q = arrivals + (2 + 2 * GROUPS) * 8, read = arrival_q + 8;
    auto fetch_q = [&](int step) {
        if (step >= tile.chunks) return;
        expect(arrival_q, GROUPS * BLOCK);
        fetch<GROUPS * 64>(all_q, q, tile.chunk_of(step, head_of(first_head, q_share)), arrival_q);
    };
    // A warp's sums of a head's pairs, where its table of columns was.
    auto sums_of_pairs = [&](int h, int of_warp) {
        return all_tables + h * Tables::BYTES + Tables::SHARED + of_warp * Tables::OWN;
    };
#endif
    const Lost lost(all_lost + group * Lost::BYTES);
    if (AGAIN) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) lost.start(state[h], h == 0);
    }
    if (threadIdx.x == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        for (int i = 0; i < 2 + 2 * GROUPS; i++) init_arrival(arrivals + i * 8, i < 2 ? GROUPS * WARPS : 1);
#if FLOWS
        init_arrival(arrival_q), store(read, Word(0));
        for (int h = 0; h < HEADS; h++) lost_heads[h * tiles] = 0;
#endif
    }
    publish();
    if (CLUSTER > 1) meet_cluster();
    else __syncthreads();
    fetch_share(0);
#if FLOWS
    if (threadIdx.x == 0) fetch_q(0);
#endif
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
#if FLOWS
        wait_arrival(arrival_q, step & 1);
#endif
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
            for (int h = 0; h < HEADS; h++) {
                zero_rows<ROWS>(place_b(step, h), count);
                if (FLOWS) zero_rows<ROWS>(place_a(step, h), count);
            }
            zero_rows<COLUMNS>(c_i, count);
            if (FLOWS) zero_rows<COLUMNS>(all_q + group * BLOCK, count);
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
        const int first_own = OWN * group, second_own = first_own + 1;
        auto make_tables = [&](int h) {
            float faded;
            tables(h).read(slot(step, h), count, faded);
            if (thread == 0) store(all_faded + h * 4, faded);
        };
        start_scores(o, first_own);
        make_tables(first_own);
#if FLOWS
        float of_q[32];
        begin_products();
#pragma unroll
        for (int i = 0; i < GROUPS * 4; i++)
            product(of_q, by_rows(all_q) + along_rows(i), by_rows(place_c(step)) + along_rows(i), i);
        end_products();
        make_tables(second_own);
        wait_products<0>();
        here(o), here(of_q);
#else
        start_scores(more, second_own);
        make_tables(second_own);
        wait_products<0>();
        here(o), here(more);
#endif
        tables(first_own).each(warp, [&](int part, const float (&d)[8]) {
#pragma unroll
            for (int i = 0; i < 8; i++) o[8 * part + i] = __fmul_rn(o[8 * part + i], d[i]);
        });
#if FLOWS
        sum_passing(o, of_q, sums_of_pairs(first_own, warp));
        here(o), here(of_q);
        start_scores(more, second_own);
        wait_products<0>();
        here(more);
#endif
        Word scores[4][4];
        tables(second_own).each(warp, [&](int part, const float (&d)[8]) {
            float sum[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float &first = o[8 * part + i], &second = more[8 * part + i];
                sum[i] = part == 3 ? fmaf(second, d[i], first) : __fadd_rn(first, __fmul_rn(second, d[i]));
                second = __fmul_rn(second, d[i]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) scores[part][i] = pack(sum[2 * i], sum[2 * i + 1]);
        });
        const Word to = all_seen(step) + group * BLOCK + (warp * 16 + (lane & 15)) * 128 + ((lane >> 4 ^ lane) & 7) * 16;
#pragma unroll
        for (int i = 0; i < 4; i++) store_matrices(to ^ i * 32, scores[i]);
        Word x[4][4];
#if FLOWS
        sum_passing(more, of_q, sums_of_pairs(second_own, warp));
#endif
        publish();
        __syncthreads();  // all have written their scores, and their tables, and read q
#if FLOWS
        const int number = thread_anew() % THREADS, h_of_pairs = first_own + number / CHUNK, token = number % CHUNK;
        float sum = 0.0f;
        for (int i = 0; i < WARPS; i++) sum += load(sums_of_pairs(h_of_pairs, i) + token * 4);
        if (token < count) pairs[h_of_pairs * pairs_head + tile.first(step) + token] = sum;
#endif
        // What a head has from the state, times its decays; the first's when the second's is there. Roundings are told, so
        // that outputs have the same bits whatever is made beside them.
        auto add_up = [&](int h) {
            const Word own = tables(h).from_state + 2 * (lane % 4) * 4, first = tables(0).from_state + 2 * (lane % 4) * 4;
#pragma unroll
            for (int i = 0; h > 0 && i < 32; i += 4) {
                float f[2], g[2] = {};
                load(own + 2 * i * 4, f[0], f[1]);
                if (h == 1) load(first + 2 * i * 4, g[0], g[1]);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float faded = __fmul_rn(more[i + j], f[j % 2]);
                    o[i + j] = h == 1 ? fmaf(o[i + j], g[j % 2], faded) : __fadd_rn(o[i + j], faded);
                }
            }
        };
#if FLOWS
        float found[HEADS][2];  // of A, of two tokens
#endif
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
#if FLOWS
            product_twice(more, state[h][0], place_a(step, h), [&] {
                add_up(h);
#pragma unroll
                for (int i = 0; h == 0 && i < 32; i++) o[i] = more[i];
            });
            float sums[16];
            sum_columns(more, all_q + group * BLOCK + place_transposed(), sums);  // q anew, or it is kept unpacked
            load(tables(h).from_state + lane * 8, found[h][0], found[h][1]);
            found[h][0] *= sums[0], found[h][1] *= sums[1];
#else
            float(&from_state)[32] = h == 0 ? o : more;
            Word held[HELD_STEPS][4];
            hold(state[h][0], Units().power, 0, held);
            here(held);
            begin_products();
#pragma unroll
            for (int i = 0; i < HELD_STEPS; i++)
                product(from_state, held[i], by_rows(place_a(step, h)) + along_rows(i), i);
            end_products();
            if (h == 0) load_left(c_i + place_transposed(), x);
            wait_products<0>();
            here(from_state), here(held);
            add_up(h);
#endif
        }
#if FLOWS
        load_left(c_i + place_transposed(), x);
        __syncwarp();  // all have read q
#pragma unroll
        for (int h = 0; h < HEADS; h++) store(place_of_sums(all_q, WARPS * group + warp) + h * 8, found[h][0], found[h][1]);
#endif
        here(o), here(x);
        begin_products();
#pragma unroll
        for (int i = 0; i < 4; i++) product(o, x[i], by_rows(all_seen(step)) + along_rows(i), 1);
#pragma unroll
        for (int i = 0; i < 4; i++) product(o, x[i], by_rows(all_seen(step) + BLOCK) + along_rows(i), 1);
        end_products();
        wait_products<0>();
        here(o), here(x);
#if FLOWS
        publish();
        __syncwarp();
        if (__shfl_sync(0xffffffffu, lane == 0 && is_last_of(GROUPS * WARPS, read), 0)) {
            __syncwarp();  // what the first lane has seen, all have
            add_up_warps<HEADS>(all_q, of_tokens + tile.first(step), of_head, count);
            __syncwarp();
            if (lane == 0) publish(), fetch_q(step + 1);
        }
#endif
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
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float zero = 0.0f;
#pragma unroll
                for (int i = 0; i < HELD; i++) zero = fmaf(state[h][0][i], 0.0f, zero);
                if (zero == 0.0f) continue;
                again[blockIdx.x] = 1;
#if FLOWS
                lost_heads[h * tiles] = 1;
#endif
            }
        }
    }
    if (CLUSTER > 1) meet_cluster();  // nobody leaves whom the other may still send something
}
