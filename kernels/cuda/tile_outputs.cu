// leetdist.kernels.pytorch.block.tile_outputs on Hopper: see hopper_tile.cuh.
//
//     P = (a b^T) * decay      o^T = gamma^i (S^T a^T) + c^T P^T      S^T = gamma^64 S^T + (c w)^T b
//
// Rounded, the state is a left operand as it lies in the registers (as FlashAttention's softmax weights are); of what
// is computed only P passes through shared memory, and the outputs on their way out. All decays are the same in every
// chunk, and come from tables in shared memory. -DWIDE=1: outputs in fp32.

#include "hopper_tile.cuh"

constexpr int STEPS = ROWS / 16;  // of a product over the state's rows
constexpr int STAGE = 2 * ROWS_BYTES + COLUMNS_BYTES;
#if WIDE
typedef float Out;
#else
typedef Bits Out;
#endif

// A part of the state as an operand on the left, and what each of a thread's two rows is to be multiplied by: a state
// grows with the sequence and can exceed fp16's range, so fp16 holds each row times a power of two.
__device__ __forceinline__ void hold(const float (&state)[HELD], Word (&held)[STEPS][4], float (&unit)[2]) {
    float power[2] = {1.0f, 1.0f};
    unit[0] = unit[1] = 1.0f;
#if HALF
#pragma unroll
    for (int row = 0; row < 2; row++) {
        float largest = 0.0f;
#pragma unroll
        for (int i = 2 * row; i < HELD; i += 4) largest = max(largest, max(fabsf(state[i]), fabsf(state[i + 1])));
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        // The power of two below it, but so large that its inverse is finite; and the inverse.
        const unsigned below = max(__float_as_uint(largest) & 0x7f800000u, 0x10000000u);
        power[row] = __uint_as_float(0x7f000000u - below) * 16384.0f;
        unit[row] = __uint_as_float(below) * (1.0f / 16384.0f);
    }
#endif
#pragma unroll
    for (int i = 0; i < HELD; i += 2)
        held[i / 8][i / 2 % 4] = pack(state[i] * power[i / 2 % 2], state[i + 1] * power[i / 2 % 2]);
}

// Tables of decays, for all chunks.
struct Tables {
    Word decays, from_state, weights, end;

    __device__ __forceinline__ Tables(Word base) {
        decays = base, from_state = decays + 128 * 4, weights = from_state + 128 * 4, end = weights + WEIGHTS_BYTES;
    }
    __device__ __forceinline__ void set(float g, float scale, float state_scale, float added_scale) const {
        // scale gamma^distance at 63 + distance, where a token sees only those that are not ahead of it.
        const int i = threadIdx.x, distance = REVERSE ? 63 - i : i - 63;
        store(decays + i * 4, distance < 0 ? 0.0f : exp2_(g * float(distance)) * scale);
        // Reversed, chunks of fewer tokens read it from further on.
        store(from_state + i * 4, exp2_(g * float(REVERSE ? max(63 - i, 0) : i + 1)) * state_scale);
        write_weights(weights, g, added_scale, CHUNK);
    }
    // scores, decayed and rounded, to shared memory
    __device__ __forceinline__ void decay(const float (&scores)[32], Word seen) const {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16;
        const Word from = decays + (63 + row + lane / 4 - 2 * (lane % 4)) * 4;
        const Word to = seen + (row + (lane & 15)) * 128 + ((lane >> 4 ^ lane) & 7) * 16;
        float table[9][2];  // by how many times 8 tokens a row lies after a column, from 1 down to -7
#pragma unroll
        for (int i = 0; i < 18; i++) table[i / 2][i % 2] = load(from + (8 - i / 2 * 8 - i % 2) * 4);
#pragma unroll
        for (int step = 0; step < 4; step++) {
            Word x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {  // 8 rows further for odd i, 8 columns for the second two
                const float(&d)[2] = table[1 - i % 2 + 2 * step + i / 2];
                x[i] = pack(scores[8 * step + 2 * i] * d[0], scores[8 * step + 2 * i + 1] * d[1]);
            }
            store_matrices(to ^ step * 32, x);
        }
    }
    // o, transposed, times the decay from the state at the start of a chunk of `count` tokens
    __device__ __forceinline__ void fade(float (&o)[32], const float (&unit)[2], int count) const {
        const Word from = from_state + (2 * (threadIdx.x % 4) + (REVERSE ? CHUNK - count : 0)) * 4;
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
            float f[2];
            if (REVERSE) f[0] = load(from + 2 * i * 4), f[1] = load(from + 2 * i * 4 + 4);  // aligned to one
            else load(from + 2 * i * 4, f[0], f[1]);
#pragma unroll
            for (int j = 0; j < 4; j++) o[i + j] *= f[j % 2] * unit[j / 2];
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, ROWS + COLUMNS == 128 ? 3 : 2)
tile_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const float* states, Offset state_batch, Offset state_head,
             Offset state_tile, Offset state_row, Offset state_column, const __grid_constant__ Map o, Out* out,
             Offset out_batch, Offset out_head, Offset out_token, TILES, float scale, float state_scale,
             float added_scale) {
    const Tile tile(log_decay, table, heads, tiles, tile_size, tokens, splits);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    float state[PARTS][HELD];
    states += tile.batch * state_batch + tile.head * state_head + tile.number * state_tile;
    states += 2 * (lane % 4) * state_row + (tile.column + 16 * warp + lane / 4) * state_column;
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < HELD; i++)
            state[part][i] = states[(8 * (i / 4) + i % 2) * state_row + (64 * part + i / 2 % 2 * 8) * state_column];

    const Word base = shared_memory(), seen = base + 2 * STAGE;
    const Tables tables(seen + BLOCK);
    const Word arrivals = tables.end;
    auto stage = [&](int step) { return base + step % 2 * STAGE; };
    auto fetch_ab = [&](int step) {
        if (step >= tile.chunks || thread > 0) return;
        const Word arrival = arrivals + step % 2 * 8;
        expect(arrival, STAGE);
        fetch<ROWS>(stage(step), a, tile.chunk(step, a_share), arrival);
        fetch<ROWS>(stage(step) + ROWS_BYTES, b, tile.chunk(step, b_share), arrival);
    };
    auto fetch_c = [&](int step) {
        if (step >= tile.chunks || thread > 0) return;
        const Word to = stage(step) + 2 * ROWS_BYTES;
        fetch<COLUMNS>(to, c, tile.chunk(step, c_share, tile.column), arrivals + step % 2 * 8);
    };
    if (thread == 0) init_arrival(arrivals), init_arrival(arrivals + 8);
    publish();
    __syncthreads();
    fetch_ab(0), fetch_c(0);
    const float g = log_decay[tile.head] * LOG2E;
    tables.set(g, scale, state_scale, added_scale);

    out += tile.batch * out_batch + tile.head * out_head + tile.start * out_token + tile.column;
    // Outputs of a chunk, whose place in shared memory was that of its c; fp32 outputs leave from the registers.
    auto write_chunk = [&](int step) {
        const Word from = stage(step) + 2 * ROWS_BYTES;
        if (WIDE || step < 0) return;
        if (tile.count(step) == CHUNK) {
            if (thread == 0) write<COLUMNS>(o, tile.chunk(step, 1, tile.column), from);
            return;
        }
        for (int i = thread; i < COLUMNS / 8 * tile.count(step); i += THREADS) {
            const int token = i / (COLUMNS / 8), vector = i % (COLUMNS / 8);
            Word x[4];
            const Word at = from + vector / 8 * BLOCK + token * 128 + ((vector ^ token) & 7) * 16;
            load(at, x[0], x[1]), load(at + 8, x[2], x[3]);
            for (int j = 0; j < 8; j++)
                out[(tile.first(step) + token) * out_token + 8 * vector + j] = Out(Bits(x[j / 2] >> j % 2 * 16));
        }
    };

    for (int step = 0; step < tile.chunks; step++) {
        const Word a_i = stage(step), b_i = a_i + ROWS_BYTES, c_i = b_i + ROWS_BYTES;
        const int count = tile.count(step);
        wait_arrival(arrivals + step % 2 * 8, step / 2 & 1);
        if (count < CHUNK) {
            zero_rows<ROWS>(b_i, count), zero_rows<COLUMNS>(c_i, count);
            publish();
        }
        __syncthreads();  // all have written the outputs of the chunk before, and read its scores
        wait_products<0>();  // for ptxas, which does not see that none is under way

        fetch_ab(step + 1);
        write_chunk(step - 1);
        float scores[32], o_i[32], unit[2];
        Word held[STEPS][4], x[PARTS][4][4];
        begin_products();
#pragma unroll
        for (int i = 0; i < STEPS; i++) product(scores, by_rows(a_i) + along_rows(i), by_rows(b_i) + along_rows(i), i);
        end_products();
        auto start_from_state = [&](int part) {
            hold(state[part], held, unit);
            here(held);
            begin_products();
#pragma unroll
            for (int i = 0; i < STEPS; i++) product(o_i, held[i], by_rows(a_i) + along_rows(i), i);
            end_products();
        };
        start_from_state(0);
        wait_products<1>();
        here(scores);
        tables.decay(scores, seen);
        publish();
        __syncthreads();  // all have written their scores, and read the outputs of the chunk before
        if (thread == 0) wait_writes();
        fetch_c(step + 1);

        const float fade = exp2_(g * float(count));
        Weighted weighted[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            if (part > 0) start_from_state(part);
            load_left(c_i + part * BLOCK + place_transposed(), x[part]);
            wait_products<0>();
            here(o_i), here(held);
            tables.fade(o_i, unit, count);
            here(o_i), here(x[part]);
            begin_products();
#pragma unroll
            for (int i = 0; i < 4; i++) product(o_i, x[part][i], by_rows(seen) + along_rows(i), 1);
            end_products();
            if (part < PARTS - 1) {
                wait_products<0>();
            } else {  // the state comes last: there are no registers for the operands of both
                weighted[0].set(x[0], tables.weights);
                advance(state[0], fade, weighted[0], b_i);
                wait_products<1>();
            }
            here(o_i), here(x[part]);
#pragma unroll
            for (int i = 0; i < 32; i += 8) {  // 16 tokens
                if (WIDE) {
                    const int column = 64 * part + 16 * warp + lane / 4;
#pragma unroll
                    for (int j = i; j < i + 8; j++) {
                        const int token = j / 4 * 8 + 2 * (lane % 4) + j % 2;
                        if (token < count)
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
            weighted[part].set(x[part], tables.weights);
            advance(state[part], fade, weighted[part], b_i);
        }
        publish();
        wait_products<0>();
#pragma unroll
        for (int part = 0; part < PARTS; part++) here(state[part]), here(weighted[part]);
    }
    __syncthreads();
    write_chunk(tile.chunks - 1);
    if (thread == 0) wait_writes();
}
