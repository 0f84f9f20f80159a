// What the gradient of a decay a token is a sum of (triton/gradient.py says how), for heads that share q and k, four in a
// block of two warpgroups, two heads each (paired_outputs.cu):
//
//     early (-DREVERSE=0), with the state S      A_i = do_i (from_state S^T q_i)      the chunk's own pairs
//     late (-DREVERSE=1), with its gradient R    B_j = v_j (to_state R^T k_j)         and dv, as paired_outputs.cu
//
// and, late, <S, R> at the tile's start. A and B are added up over a whole tile (triton/added_up.py), so the state is two 16-bit
// numbers in them, high + low. Pairs are M_ij = (q_i k_j) (do_i v_j) decay_ij; what passes over token t is the sum of those
// with i >= t > j (sum_passing). With 128 rows the early pass is in the kernel of dq (grouped_outputs.cu), and not here.
//
// Each warp asks for a share of the next chunk (paired_outputs.cu): of what its warpgroup reads, and, if the other warpgroup
// is there too, a block of 64 columns of a or b.
//
// Late, a and b are k and q, c is do, d is v; early q, k, v, do. What is not finite is as in tile_outputs.cu for dv; the
// second kernel (-DAGAIN=1) leaves nothing but that and what is made of it. With of_weight, late, v's own gradient leaves in
// dv's place (`finish`), and the weights', and with `skip`, a number a head times v in the outputs, of_skip: v do.

#include "../../constant_decay/cuda/hopper_tile.cuh"
#include "../../constant_decay/cuda/hopper_lost.cuh"
#include "../../constant_decay/cuda/hopper_held.cuh"
#include "flows.cuh"

constexpr bool LATE = REVERSE;
constexpr int HEADS = 2, ALL = HEADS * GROUPS;
constexpr bool FINISHES = LATE && WEIGHTED;
constexpr int STAGE = 2 * ROWS_BYTES + 2 * ALL * COLUMNS_BYTES, BLOCKS = ROWS / 64;
static_assert(PARTS == 1 && GROUPS == 2 && 2 * HEADS == WARPS && !HALF);
static_assert(!LAST_FETCHES && (LATE || !AGAIN));

// of_tokens: (B, H, N), A or B; pairs: the same, early; across: (B, H, tiles), late, from `starts`, the early pass's states;
// lost: (B, H, tiles), whether there is something that is not finite; of_weight, of_skip: (B, H, N), contiguous, or 0; skip:
// (H,) or 0. Of states and starts, an address of 0: zeros.
extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, 1)
paired_gradients(OPERAND(a), OPERAND(b), OPERAND(c), OPERAND(d), const float* states, const float* starts,
                 const __grid_constant__ Map o, Bits* out, Offset out_batch, Offset out_head, Offset out_token,
                 float* of_tokens, Offset of_head, float* pairs, Offset pairs_head, float* across, int* lost,
                 float* of_weight, float* of_skip, const float* skip, TILES, float scale, float state_scale,
                 float added_scale, int* again) {
    if (AGAIN && !again[blockIdx.x]) return;
    Tile tile(TILE);
    const int thread = thread_number(), group = __shfl_sync(0xffffffffu, group_number(), 0);
    const int lane = thread % 32, warp = thread / 32, first_head = ALL * tile.head + HEADS * group;
    const Offset head_row = Offset(tile.batch) * heads * ALL + first_head;
    const Offset place_of_state =
        ((head_row * tiles + tile.number) * ROWS + 2 * (lane % 4)) * COLUMNS + 16 * warp + lane / 4;
    of_tokens += head_row * of_head + tile.start, pairs += head_row * pairs_head + tile.start;
    out += tile.batch * out_batch + first_head * out_head + tile.start * out_token;
    auto place_in_state = [&](int h, int i) {
        return place_of_state + h * tiles * ROWS * COLUMNS + (8 * (i / 4) + i % 2) * COLUMNS + i / 2 % 2 * 8;
    };
    float state[HEADS][PARTS][HELD];
#pragma unroll
    for (int h = 0; h < HEADS; h++)
#pragma unroll
        for (int i = 0; i < HELD; i++) state[h][0][i] = states ? states[place_in_state(h, i)] : 0.0f;

    // Two places of: a, b, and c and d of each head. Behind them scores, sums of each warp, log-decays, tables and barriers.
    const Word base = shared_memory(), seen = base + 2 * STAGE + group * BLOCK;  // late
    const Word all_sums = base + 2 * STAGE + (LATE ? GROUPS : 0) * BLOCK;
    constexpr int SUMS = WARPS * CHUNK * 4, KINDS = AGAIN ? 0 : LATE ? 1 : 2;
    const Word slots = all_sums + ALL * KINDS * SUMS, all_tables = slots + 2 * ALL * SLOT;
    const Word all_lost = all_tables + ALL * Tables::BYTES, arrivals = all_lost + ALL * Lost::BYTES, read = arrivals + 16;
    auto own = [&](int h) { return HEADS * group + h; };
    auto sums_of = [&](int h, int kind) { return all_sums + (own(h) * KINDS + kind) * SUMS; };
    auto slot = [&](int step, int head) { return slots + (step % 2 * ALL + head) * SLOT; };
    auto place_a = [&](int step) { return base + step % 2 * STAGE; };
    auto place_b = [&](int step) { return place_a(step) + ROWS_BYTES; };
    auto place_c = [&](int step, int h) { return place_a(step) + 2 * ROWS_BYTES + own(h) * COLUMNS_BYTES; };
    auto place_d = [&](int step, int h) { return place_c(step, h) + ALL * COLUMNS_BYTES; };
    auto arrival = [&](int step) { return arrivals + step % 2 * 8; };
    tile.head = first_head;
    Tables first_tables;
    first_tables.place(all_tables + HEADS * group * Tables::BYTES, tile, log_decay TOKENS_);
    first_tables.set(scale, state_scale, added_scale);
    auto tables = [&](int h) {  // made where it is wanted, for there are no registers to hold both
        Tables moved = first_tables;
        moved.move(h * Tables::BYTES, h * decay_head);
        return moved;
    };
    auto weights = [&](int step, int h) { return tables(h).weights(slot(step, own(h))); };
    // A warp's share of what is asked for: d of one of its warpgroup's heads or its log-decays; and, by the second of two
    // warps, a block of a or b, whose head is looked up.
    auto head_ab = [&](int share) { return read + 16 + share * 4; };
    auto fetch_d = [&](int step, int h) {
        fetch<COLUMNS>(place_d(step, h), d, tile.chunk_of(step, head_of(first_head + h, d_share)), arrival(step));
    };
    auto fetch_share = [&](int step) {  // but what lies where something leaves from
        const int share = thread_anew() % THREADS / 32, h = share % HEADS;
        if (step >= tile.chunks || thread_anew() % 32) return;
        const int count = tile.count(step);
        expect(arrival(step), share < HEADS ? 2 * COLUMNS_BYTES : tables(h).bytes(count));
        if (share < HEADS && !FINISHES) fetch_d(step, h);
        if (share >= HEADS) tables(h).fetch(slot(step, own(h)), tile.first(step), count, arrival(step));
        if (share >= 2 * BLOCKS || !is_last_of(GROUPS, read + share * 4)) return;
        expect(arrival(step), BLOCK);
        const Place place = tile.chunk_of(step, load_word(head_ab(share)), share % BLOCKS * 64);
        if (share < BLOCKS) fetch<64>(place_a(step) + share * BLOCK, a, place, arrival(step));
        else fetch<64>(place_a(step) + share * BLOCK, b, place, arrival(step));
    };
    auto fetch_rest = [&](int step) {  // c, and d where sums are in its place
        const int h = thread_anew() % THREADS / 32;
        if (step >= tile.chunks || thread_anew() % 32 || h >= HEADS) return;
        fetch<COLUMNS>(place_c(step, h), c, tile.chunk_of(step, head_of(first_head + h, c_share)), arrival(step));
        if (FINISHES) fetch_d(step, h);
    };
    if (AGAIN)
        for (int h = 0; h < HEADS; h++) Lost(all_lost + own(h) * Lost::BYTES).start(state[h]);
    if (lane == 0) store(head_ab(warp), Word(head_of(first_head, warp >= BLOCKS ? b_share : a_share)));
    if (threadIdx.x == 0) {
        if (!AGAIN) again[blockIdx.x] = 0;
        for (int i = 0; i < 2; i++) init_arrival(arrivals + i * 8, GROUPS * WARPS + 2 * BLOCKS);
        for (int i = 0; i < 2 * BLOCKS; i++) store(read + i * 4, Word(0));
    }
    publish();
    __syncthreads();
    fetch_share(0), fetch_rest(0);

    // Outputs of a chunk, whose place in shared memory was that of its c; and what its warps have summed.
    auto write_chunk = [&](int step) {
        if (step < 0) return;
        const int count = tile.count(step);
        const int h = thread / CHUNK, token = thread % CHUNK;
        if (FINISHES && of_weight) {
            float sum, skipped;
            sum_finished(place_d(step, h), token, sum, skipped);
            const Offset at = (head_row + h) * tokens + tile.start + tile.first(step) + token;
            if (token < count) of_weight[at] = sum;
            if (token < count && skip && !AGAIN) of_skip[at] = skipped;
        }
        if (!AGAIN) {
            for (int kind = 0; kind < KINDS; kind++) {
                float sum = 0.0f;
                for (int i = 0; i < WARPS; i++) sum += load(sums_of(h, kind) + (i * CHUNK + token) * 4);
                float* to = kind ? pairs + h * pairs_head : of_tokens + h * of_head;
                if (token < count) to[tile.first(step) + token] = sum;
            }
        }
        for (int h = 0; LATE && h < HEADS; h++) {
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

    for (int step = 0; step < tile.chunks; step++) {
        const Word a_i = place_a(step), b_i = place_b(step);
        const int count = tile.count(step);
        wait_arrival(arrival(step), step / 2 & 1);
        if (AGAIN) {
            for (int zero = 0; zero < 2; zero++) {
                for (int h = 0; h < HEADS; h++) {
                    const Lost lost(all_lost + own(h) * Lost::BYTES);
                    if (!zero || h == HEADS - 1) lost.find<ROWS, false>(b_i, step, count, zero);
                    lost.find<COLUMNS, true>(place_c(step, h), step, count, zero);
                }
                __syncthreads();
            }
            publish();
        }
        if (count < CHUNK) {  // both warpgroups write the same zeros to a and b
            zero_rows<ROWS>(a_i, count), zero_rows<ROWS>(b_i, count);
            for (int h = 0; h < HEADS; h++) {
                zero_rows<COLUMNS>(place_c(step, h), count), zero_rows<COLUMNS>(place_d(step, h), count);
                if (WEIGHTED && LATE) zero_numbers(weights(step, h), count);
            }
            publish();
        }
        meet();  // all have summed and written what they make of the chunk before
        wait_products<0>();  // for ptxas, which does not see that none is under way
        fetch_share(step + 1);
        write_chunk(step - 1);

        float scores[32], o_i[32], faded[HEADS];
        Word later[4][4];
        begin_products();
#pragma unroll
        for (int i = 0; i < STEPS; i++) product(scores, by_rows(a_i) + along_rows(i), by_rows(b_i) + along_rows(i), i);
        end_products();
#pragma unroll
        for (int h = 0; WEIGHTED && !LATE && h < HEADS; h++)  // v is c; late, d, which no product reads
            weigh_rows(place_c(step, h), weights(step, h), count);
#pragma unroll
        for (int h = 0; h < HEADS; h++) tables(h).read(slot(step, own(h)), count, faded[h]);
        wait_products<0>();
        here(scores);
        const Word to = seen + (warp * 16 + (lane & 15)) * 128 + ((lane >> 4 ^ lane) & 7) * 16;
        if (LATE) {
            tables(1).each(warp, [&](int part, const float (&by)[8]) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    later[part][i] =
                        pack(scores[8 * part + 2 * i] * by[2 * i], scores[8 * part + 2 * i + 1] * by[2 * i + 1]);
            });
            tables(0).decay(scores, seen);
            publish();
        }
        meet();  // all have written the first head's scores, and their tables, and read what was summed before
        wait_writes(), fetch_rest(step + 1);

#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const Word c_i = place_c(step, h);
            if (!LATE) {
                begin_products();
#pragma unroll
                for (int i = 0; i < COLUMNS / 16; i++)
                    product(o_i, by_rows(place_d(step, h)) + along_rows(i), by_rows(c_i) + along_rows(i), i);
                end_products();
                wait_products<0>();
                here(o_i);
                tables(h).each(warp, [&](int part, const float (&by)[8]) {
#pragma unroll
                    for (int i = 0; i < 8; i++) o_i[8 * part + i] *= by[i];
                });
                sum_passing(o_i, scores, sums_of(h, 1) + warp * CHUNK * 4);
            }
            // Half of the state high, then low, in parts: each is made while the one before is multiplied.
            constexpr int AT_ONCE = 2, HALF_STATE = STEPS / 2 / AT_ONCE;
            Word left[2][AT_ONCE][4];
            here(o_i);
#pragma unroll
            for (int part = 0; part < 4 * HALF_STATE; part++) {
                const int first = (part / (2 * HALF_STATE) * HALF_STATE + part % HALF_STATE) * AT_ONCE;
                if (part > 1) wait_products<1>();
                if (part / HALF_STATE % 2 == 0) round_to(left[part % 2], state[h][0], first);
                else round_rest(left[part % 2], state[h][0], first);
                here(left[part % 2]);
                begin_products();
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    product(o_i, left[part % 2][i], by_rows(a_i) + along_rows(first + i), part + i);
                end_products();
            }
            fade(state[h][0], faded[h]);
            here(state[h][0]);
            wait_products<0>();
            here(o_i), here(left[0]), here(left[1]);
            Word x[4][4];
            const Units units;
            tables(h).fade(o_i, units.unit, count);
            if (!AGAIN) {
                load_left(place_d(step, h) + place_transposed(), x);
                if (WEIGHTED && LATE) weigh(x, weights(step, h));
                float sums[16];
                const int token = sum_columns(o_i, x, sums);
                store(sums_of(h, 0) + (warp * CHUNK + token) * 4, sums[0], sums[1]);
            }
            load_left(c_i + place_transposed(), x);
            if (LATE) {
                here(o_i), here(x);
                begin_products();
#pragma unroll
                for (int i = 0; i < 4; i++) product(o_i, x[i], by_rows(seen) + along_rows(i), 1);
                end_products();
            }
            Weighted weighted;
            advance(state[h][0], weighted, x, tables(h).pairs, b_i);
            if (LATE) {
                wait_products<2>();
                here(o_i), here(x);
                if (AGAIN) Lost(all_lost + own(h) * Lost::BYTES).mark(o_i, step, 0);
                if (FINISHES && of_weight)
                    finish(o_i, c_i, place_d(step, h), weights(step, h), skip ? skip + first_head + h : skip);
                else
#pragma unroll
                    for (int i = 0; i < 32; i += 8) {  // 16 tokens; a warp writes where it alone has read
                        Word y[4];
#pragma unroll
                        for (int j = 0; j < 4; j++) y[j] = pack(o_i[i + 2 * j], o_i[i + 2 * j + 1]);
                        store_transposed(c_i + place_transposed() + i / 8 * 16 * 128, y);
                    }
                if (h < HEADS - 1) {
                    meet();  // all have read its scores
#pragma unroll
                    for (int i = 0; i < 4; i++) store_matrices(to ^ i * 32, later[i]);
                }
                publish();
            }
            wait_products<0>();
            here(state[h][0]), here(weighted);
            if (LATE && h < HEADS - 1) meet();  // all have written the next head's
        }
    }
    __syncthreads();
    write_chunk(tile.chunks - 1);
    wait_writes();
    if (AGAIN) return;
    if (threadIdx.x < ALL) store(slots + threadIdx.x * 4, Word(0));
    __syncthreads();
    const Word flags = slots, sums = slots + ALL * 4;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        float zero = 0.0f, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            zero = fmaf(state[h][0][i], 0.0f, zero);
            if (LATE && starts) sum = fmaf(state[h][0][i], starts[place_in_state(h, i)], sum);
        }
        if (zero != 0.0f) store(flags + own(h) * 4, Word(1));
#pragma unroll
        for (int apart = 1; LATE && apart < 32; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
        if (lane == 0) store(sums + (own(h) * WARPS + warp) * 4, sum);
    }
    __syncthreads();
    if (threadIdx.x >= ALL) return;
    const Offset place = (head_row + threadIdx.x) * tiles + tile.number;
    const Word flag = load_word(flags + threadIdx.x * 4);
    lost[place] = flag;
    if (flag) again[blockIdx.x] = 1;
    float sum = 0.0f;
    for (int i = 0; i < WARPS; i++) sum += load(sums + (threadIdx.x * WARPS + i) * 4);
    if (LATE) across[place] = sum;
}
