// A few tokens of decoding with the bits of one call: see leetdist.kernels.common.open_tiles.
//
// tile_outputs.cu walks a tile in chunks of 64 tokens. A token's outputs are a row of its products, and no row depends on
// another, so here are the same sums of the new tokens' rows alone, from the state at the open chunk's start (`held`, the
// rounded form of `walked`) and the chunk's tokens (the ring, and those of the call). Where a chunk is full, the walk goes
// on, the tile's own sum (`own`) as tile_states.cu adds it up, and at the tile's end the fold. Bits rest on this: what a
// tensor core makes of 16 products and a sum is the same in wgmma and in mma.sync, whichever operand is on the left.
//
// A block holds COLUMNS of one head's state, each warp 16 of them: column 2 i is row i of a product, 2 i + 1 row 8 + i, so
// that loads are of 8 bytes. Nothing of a row is written before it is known to be kept, and nothing that another block
// may still read: the last block of a row to be done writes its age, and what comes behind a chunk's end.
//
// Compile with -DROWS=64|128|256 -DCOLUMNS=32|64 -DSPLITS (blocks that share the columns of a state) -DHALF=0|1
// -DGROUPS=1 -DREVERSE=0, and -DTOKEN=1 for a decay a token.

#pragma nv_diag_suppress 177  // of the headers' constants, some are for walks of whole tiles

#include "hopper_tile.cuh"
#include "hopper_held.cuh"
#include "hopper_warp.cuh"
#include "open_held.cuh"

// What a block computes.
struct Row {
    int head, heads, batch;
    Offset slot;
};

#if TOKEN
#include "../../token_decay/cuda/open_weights.cuh"
#else
#include "open_weights.cuh"
#endif

constexpr int MOST = 8;  // tokens of a call
constexpr int TEAM = COLUMNS / 16, ALL = 32 * TEAM, WIDTH = COLUMNS * SPLITS;
constexpr int RESIDENT = (ROWS > 128 ? 256 : 512) / ALL;  // blocks, by their memory
// Bytes from a token to the next: one row of a product begins 16 bytes of banks behind the one before.
constexpr int ROW_PITCH = ROWS * 2 + 16, COLUMN_PITCH = COLUMNS * 2 + 16, SCORE_PITCH = CHUNK * 2 + 16;

// Added to by NaN where one of x is not finite.
__device__ __forceinline__ void check(const Word (&x)[4], Word& zeros) {
#pragma unroll
    for (int i = 0; i < 4; i++) zeros = times_plus(x[i], 0, zeros);
}
__device__ __forceinline__ Offset number_at(const void* numbers, Offset place, bool wide) {
    return wide ? static_cast<const Offset*>(numbers)[place] : static_cast<const int*>(numbers)[place];
}

// DIM numbers of one head's tokens: those of the call, and those that its slot keeps, NEXT numbers apart.
template <int DIM, int PITCH, int NEXT> struct Tokens {
    static constexpr int VECTORS = DIM / 8, STEP = ALL / VECTORS;
    const Bits* given;
    Bits* kept;
    Offset next;

    // To shared memory: `before` kept ones, `tokens` of the call from its `first` on, and zeros up to a multiple of `by`.
    __device__ __forceinline__ void fetch(Word to, int before, int first, int tokens, int by = 16) const {
        const int row = threadIdx.x / VECTORS, vector = threadIdx.x % VECTORS, rows = before + tokens;
        to += row * PITCH + vector * 16;
        const Bits* from = kept + row * NEXT + vector * 8;
        Word place = to;
#pragma unroll 1
        for (int i = row; i < before; i += STEP, from += STEP * NEXT, place += STEP * PITCH) copy_vector(place, from);
        from = given + (first + row) * next + vector * 8, place = to + before * PITCH;
#pragma unroll 1
        for (int i = row; i < tokens; i += STEP, from += STEP * next, place += STEP * PITCH) copy_vector(place, from);
        place = to + rows * PITCH;
#pragma unroll 1
        for (int i = rows + row; i < (rows + by - 1) / by * by; i += STEP, place += STEP * PITCH)
            store(place, 0.0f, 0.0f), store(place + 8, 0.0f, 0.0f);
    }
    // To the ring: tokens that lie in shared memory as they do there; or from its start on, those of the call.
    __device__ __forceinline__ void keep(Word from, int place, int tokens) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < tokens * VECTORS; i += ALL) {
            const int token = place + i / VECTORS, vector = i % VECTORS;
            copy_vector(kept + token * NEXT + vector * 8, from + token * PITCH + vector * 16);
        }
    }
    __device__ __forceinline__ void keep(int first, int tokens) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < tokens * VECTORS; i += ALL) {
            const int token = i / VECTORS, vector = i % VECTORS * 8;
            copy_vector(kept + token * NEXT + vector, given + (first + token) * next + vector);
        }
    }
    // Zeros in the place of what is not finite, and by which token's: one of a column, or of all.
    __device__ __forceinline__ void clean(Word from, int rows, Word columns, bool all) const {
#pragma unroll 1
        for (int i = threadIdx.x; i < rows * (DIM / 2); i += ALL) {
            const int row = i / (DIM / 2), column = i % (DIM / 2) * 2;
            const Word place = from + row * PITCH + column * 2, x = load_word(place);
            const bool low = not_finite(x, 0), high = not_finite(x, 1);
            if (low) store_least(all ? columns : columns + column * 4, row);
            if (high) store_least(all ? columns : columns + column * 4 + 4, row);
            if (low || high) store(place, x & (low ? 0xffff0000u : ~0u) & (high ? 0xffffu : ~0u));
        }
    }
};

#define GIVEN(x) const Bits *x, Offset x##_batch, Offset x##_head, Offset x##_token, Offset x##_share

extern "C" __global__ void __launch_bounds__(ALL, RESIDENT)
open_steps(GIVEN(q), GIVEN(k), GIVEN(v), Bits* o, float* start, float* walked, float* own, Bits* held, Bits* ring_k,
           Bits* ring_v, Offset* ages, unsigned* arrived, const void* index, Offset next_index, Offset wide_index,
           const void* lengths, Offset next_length, Offset wide_lengths, Offset count, Offset slots, Offset heads,
           Offset tile, DECAYS, float scale) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, left = lane / 4, two = 2 * (lane % 4);
    const int split = blockIdx.x % SPLITS;
    const Word base = shared_memory(), state = base + warp * Held::BYTES, arrival = base + TEAM * Held::BYTES;
    if (thread == 0) init_arrival(arrival), publish(), expect(arrival, TEAM * Held::BYTES);  // before its slot is known
    const int tokens = int(count), first_column = split * COLUMNS;
    Row row = {int(blockIdx.x / SPLITS), int(heads), int(blockIdx.y), 0};
    row.slot = index ? number_at(index, row.batch * next_index, wide_index) : row.batch;
    const Offset length = lengths ? number_at(lengths, row.batch * next_length, wide_lengths) : count;
    o += (row.batch * heads + row.head) * tokens * WIDTH + first_column + 16 * warp + 2 * left;
    if (row.slot < 0 || row.slot >= slots || length < 0 || length > count) {
        for (int t = two; t < min(two + 2, tokens); t++) *reinterpret_cast<Word*>(o + t * WIDTH) = 0x7fff7fffu;  // NaN
        return;
    }
    const int kept = int(length);

    const Offset age = ages[row.slot];
    // The state at the chunk's start, transposed: S^T (16 columns x ROWS) a warp.
    const Offset matrix = row.slot * heads + row.head, block_place = matrix * ROWS * WIDTH + first_column;
    held += (matrix * (WIDTH / 16) + first_column / 16) * (Held::BYTES / 2);
    if (thread == 0) fetch_bytes(base, reinterpret_cast<const char*>(held), TEAM * Held::BYTES, arrival);
    held += warp * (Held::BYTES / 2);
    const int open = int(age % CHUNK), chunk_start = int(age & (tile - 1)) - open, after = open + kept;
    const bool keeps = after >= CHUNK, closes = keeps || open + tokens > CHUNK, last = chunk_start + CHUNK == int(tile);

    const Word all_k = arrival + 16, all_v = all_k + CHUNK * ROW_PITCH;
    const Word all_q = all_v + CHUNK * COLUMN_PITCH, seen = all_q + MOST * ROW_PITCH;
    const Word lost_columns = seen + MOST * SCORE_PITCH, lost_all = lost_columns + COLUMNS * 4;
    OpenWeights weights(lost_all + 16, row, DECAYS_);
    const int k_heads = row.heads / int(k_share), v_heads = row.heads / int(v_share);
    k += row.batch * k_batch, v += row.batch * v_batch;
    ring_k += row.slot * k_heads * CHUNK * ROWS, ring_v += row.slot * v_heads * CHUNK * WIDTH;
    auto k_of = [&](int head) {
        return Tokens<ROWS, ROW_PITCH, ROWS>{k + head * k_head, ring_k + head * CHUNK * ROWS, k_token};
    };
    auto v_of = [&](int head, int column) {
        return Tokens<COLUMNS, COLUMN_PITCH, WIDTH>{v + head * v_head + column, ring_v + head * CHUNK * WIDTH + column, v_token};
    };
    const auto own_k = k_of(row.head / int(k_share));
    const auto own_v = v_of(row.head / int(v_share), first_column);
    const Tokens<ROWS, ROW_PITCH, ROWS> own_q = {q + row.batch * q_batch + row.head / int(q_share) * q_head, nullptr, q_token};
    own_q.fetch(all_q, 0, 0, tokens, MOST);

    // The chunk's i-th token is the call's (i + shift)-th.
    int shift = -open, rows = min(CHUNK, open + tokens);
    auto fetch_chunk = [&] {
        const int before = max(-shift, 0), first = max(shift, 0);
        own_k.fetch(all_k, before, first, rows - before), own_v.fetch(all_v, before, first, rows - before);
        weights.read(rows, shift);
    };
    auto wait_chunk = [&] {
        wait_copies();
        __syncthreads();
    };
    fetch_chunk();
    if (closes)  // what will be wanted then
        for (int i = thread; i < ROWS * (COLUMNS / 32); i += ALL) {
            const Offset line = block_place + i / (COLUMNS / 32) * WIDTH + i % (COLUMNS / 32) * 32;
            prefetch(own + line), prefetch((last ? start : walked) + line);
        }
    const Offset place = block_place + two * WIDTH + 16 * warp + 2 * left;
    start += place, walked += place, own += place;
    // All blocks of the row count when they have read its age, or where the chunk is full, when they have read all of it.
    const bool all_read = kept && !keeps && thread == 0 && arrives_last(arrived + row.slot, unsigned(heads * SPLITS));
    wait_chunk();
    wait_arrival(arrival, 0);
    if (all_read) ages[row.slot] = age + kept;
    if (kept && !keeps) {
        if (split == 0 && row.head % int(k_share) == 0) own_k.keep(all_k, open, kept);
        if (row.head % int(v_share) == 0) own_v.keep(all_v, open, kept);
        if (split == 0) weights.keep_open(open, kept);
    }

    // The chunk that is open, and if the call's tokens fill it, the next one.
#pragma unroll 1
    while (true) {
        auto load_left = [&](int step, Word (&y)[4]) {  // 16 tokens of v, transposed
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const Word from = all_v + (16 * step + 8 * i + two) * COLUMN_PITCH + (16 * warp + 2 * left) * 2;
                const Word low = load_word(from), high = load_word(from + COLUMN_PITCH);
                y[2 * i] = join(low, high, false), y[2 * i + 1] = join(low, high, true);
            }
        };
        int token[2];  // of this thread's outputs, in the chunk
#pragma unroll
        for (int i = 0; i < 2; i++) token[i] = two + i - shift;
        auto inside = [&](int i) { return min(max(token[i], 0), CHUNK - 1); };
        const Word from_q = all_q + lane % 8 * ROW_PITCH + lane / 8 * 16;
        float x[4];
        Word of_v[CHUNK / 16][4];
        bool lost = false;  // whether something is not finite, and zeros are in its place
#pragma unroll 1
        while (true) {
            Word zeros = 0;
            // Scores, 16 tokens of the chunk a warp: decayed and rounded, to shared memory.
#pragma unroll 1
            for (int first = 16 * warp; first < rows; first += 16 * TEAM) {
                float scores[4] = {};
                const Word from = all_k + (first + lane % 16) * ROW_PITCH + lane / 16 * 16;
#pragma unroll
                for (int i = 0; i < STEPS; i += 2) {
                    Word y[4], z[4];
                    load_matrices(from_q + i * 32, z);
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        load_matrices(from + (i + j) * 32, y);
                        check(y, zeros);
                        add_small(scores, y, z[2 * j], z[2 * j + 1]);
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int j = first + left + 8 * i;
                    const Word pair = pack(scores[2 * i] * weights.between(inside(0), j, scale),
                                           scores[2 * i + 1] * weights.between(inside(1), j, scale));
                    store(seen + two * SCORE_PITCH + j * 2, Bits(pair));
                    store(seen + (two + 1) * SCORE_PITCH + j * 2, Bits(pair >> 16));
                }
            }
#pragma unroll
            for (int i = 0; i < CHUNK / 16; i++)
                if (16 * i < rows) load_left(i, of_v[i]), check(of_v[i], zeros);
            // From the state at the chunk's start.
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = 0.0f;
#pragma unroll
            for (int i = 0; i < STEPS; i += 2) {
                Word y[4], z[4];
                load_matrices(from_q + i * 32, z);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    Held::get(state, i + j, y);
                    check(y, zeros);
                    add_small(x, y, z[2 * j], z[2 * j + 1]);
                }
            }
            float unit[2];
            Held::get_units(state, unit);
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] *= weights.from_state(inside(i % 2), scale) * unit[i / 2];
            const bool bad = __syncthreads_or(zeros & 0x7fff7fffu);  // all have written their scores
            if (!bad || lost) break;
            lost = true;  // as in hopper_lost.cuh
            for (int i = thread; i <= COLUMNS; i += ALL) store(lost_columns + i * 4, Word(0x7fffffff));
            __syncthreads();
#pragma unroll 1
            for (int i = 0; i < STEPS; i++) {
                Word y[4];
                Held::get(state, i, y);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    if (not_finite(y[j], 0) || not_finite(y[j], 1))
                        store_least(lost_columns + (16 * warp + 2 * left + j % 2) * 4, 0);
            }
            own_k.clean(all_k, rows, lost_all, true), own_v.clean(all_v, rows, lost_columns, false);
            __syncthreads();
        }
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++) {
            if (16 * i >= rows) break;
            const Word from = seen + left * SCORE_PITCH + (16 * i + two) * 2;
            add_small(x, of_v[i], load_word(from), load_word(from + 16));
        }
        const bool mine[2] = {two < tokens && token[0] >= 0 && token[0] < CHUNK,
                              two + 1 < tokens && token[1] >= 0 && token[1] < CHUNK};
        if (lost)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const Word column = lost_columns + (16 * warp + 2 * left + i / 2) * 4;
                if (token[i % 2] >= min(int(load_word(column)), int(load_word(lost_all)))) x[i] = __int_as_float(0x7fffffff);
            }
#pragma unroll
        for (int j = 0; j < 2; j++)
            if (mine[j]) *reinterpret_cast<Word*>(o + (two + j) * WIDTH) = pack(x[j], x[j + 2]);
        if (!closes || shift > 0) break;

        // The chunk is full: the walk and the tile's own sum go on, or the tile ends.
        if (lost) {
            __syncthreads();
            fetch_chunk(), wait_chunk();
        }
        const float faded = weights.close(shift, chunk_start == 0);
        const bool begins = weights.begins(int(tile), chunk_start, faded);
        __syncthreads();
        Weighted weighted;
#pragma unroll
        for (int i = 0; i < CHUNK / 16; i++) load_left(i, of_v[i]);
        weighted.set(of_v, weights.pairs);
        float next[HALF ? HELD : 1];  // what units are found in; in local memory, so that none wait for registers but here
        auto round = [&](const float* rows, const Units& units, int step) {
            Word x[4];
            hold(rows, units.power, x), Held::put(x, step, state);
            if (keeps) Held::put(x, step, held);
        };
        float sums[2][4], walks[2][4], coming[2][2][4];  // of 16 rows, while the next ones are on their way
        const float* from = last ? start : walked;
        auto load_rows = [&](int step, float (&sum)[2][4], float (&walk)[2][4]) {
#pragma unroll
            for (int block = 0; block < 2; block++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const Offset at = (16 * step + 8 * block + j) * WIDTH;
                    sum[block][j] = sum[block][2 + j] = 0.0f;
                    if (!begins) load_two(own + at, sum[block][j], sum[block][2 + j]);
                    load_two(from + at, walk[block][j], walk[block][2 + j]);
                }
        };
        load_rows(0, coming[0], coming[1]);
#pragma unroll 1
        for (int i = 0; i < STEPS; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                sums[j / 4][j % 4] = coming[0][j / 4][j % 4];
                walks[j / 4][j % 4] = coming[1][j / 4][j % 4];
            }
            if (i + 1 < STEPS) load_rows(i + 1, coming[0], coming[1]);
            Word z[4][4];
#pragma unroll
            for (int step = 0; step < 4; step++)
                load_transposed(all_k + (16 * step + lane % 16) * ROW_PITCH + i * 32 + lane / 16 * 16, z[step]);
            auto fade = [&](float (&x)[2][4]) {
#pragma unroll
                for (int j = 0; j < 8; j++) x[j / 4][j % 4] *= faded;
            };
            auto add = [&](float (&x)[2][4], const Word (&y)[4], int step) {
#pragma unroll
                for (int block = 0; block < 2; block++)
                    add_small(x[block], y, z[step][2 * block], z[step][2 * block + 1]);
            };
            fade(sums);
            if (last) {
#pragma unroll
                for (int step = 0; step < 8; step++)
                    add(sums, step < 4 ? weighted.high[step] : weighted.low[step - 4], step % 4);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    walks[j / 4][j % 4] = fmaf(walks[j / 4][j % 4], weights.kept, sums[j / 4][j % 4]);
                    sums[j / 4][j % 4] = 0.0f;
                }
            } else {
                fade(walks);
#pragma unroll
                for (int step = 0; step < 8; step++) {
                    add(sums, step < 4 ? weighted.high[step] : weighted.low[step - 4], step % 4);
                    add(walks, step < 4 ? weighted.high[step] : weighted.low[step - 4], step % 4);
                }
            }
#pragma unroll
            for (int j = 0; keeps && j < 4; j++) {
                const Offset at = (16 * i + 8 * (j / 2) + j % 2) * WIDTH;
                store_two(own + at, sums[j / 2][j % 2], sums[j / 2][2 + j % 2]);
                store_two(walked + at, walks[j / 2][j % 2], walks[j / 2][2 + j % 2]);
                if (last) store_two(start + at, walks[j / 2][j % 2], walks[j / 2][2 + j % 2]);
            }
#if HALF
#pragma unroll
            for (int j = 0; j < 8; j++) next[8 * i + j] = walks[j / 4][j % 4];
        }
        Units units;
        units.set(next);
#pragma unroll 1
        for (int i = 0; i < STEPS; i++) round(next + 8 * i, units, i);
        Held::put_units(units.unit, state);
        if (keeps) Held::put_units(units.unit, held);
#else
            round(walks[0], Units(), i);
        }
#endif
        if (open + tokens <= CHUNK) break;
        shift += CHUNK, rows = tokens - shift;
        __syncthreads();  // all have read the chunk
        fetch_chunk(), wait_chunk();
    }

    if (!keeps) return;
    bool is_last = false;
    __syncthreads();
    if (thread == 0) {
        __threadfence();
        is_last = arrives_last(arrived + row.slot, unsigned(heads * SPLITS));
    }
    if (!__syncthreads_or(is_last)) return;
    if (is_last) ages[row.slot] = age + kept;
    weights.keep_closed(open, kept, chunk_start == 0, last);
    for (int i = 0; i < k_heads; i++) k_of(i).keep(CHUNK - open, after - CHUNK);
    for (int i = 0; i < v_heads * SPLITS; i++)
        v_of(i / SPLITS, i % SPLITS * COLUMNS).keep(CHUNK - open, after - CHUNK);
}
