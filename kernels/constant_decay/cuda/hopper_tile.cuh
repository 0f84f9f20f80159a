// What tile_states.cu and tile_outputs.cu share: the state, the tile, and tokens weighted by their decay.
//
// One warpgroup walks one tile in chunks of 64 tokens and never meets another: two of them share a multiprocessor, and
// each fills the other's waits. It keeps the state in registers, in fp32, transposed: S^T (COLUMNS x ROWS), in parts of
// 64 rows. A chunk adds (c w)^T b to it; c w, rounded, would cost as much accuracy as the rounded output does, so it is
// two 16-bit numbers, high + low, and two products.
//
// Columns are independent of each other, so where there are few tiles, `splits` blocks share one's columns; the bits
// are the same.
//
// With 256 rows, a part of the state fills the registers of a warpgroup, and chunks of a and b (32 KB) are read four
// times for 256 columns. So the two warpgroups of a multiprocessor can be one block (GROUPS=2), with columns of their
// own and the same a and b. They do not meet either: a chunk is fetched as early as there is place for it, by whichever
// warp is the last to have read what lies there.
//
// Compile with -DROWS=64|128|256 -DCOLUMNS=64|128 (of a warpgroup; 64 with 256 rows) -DREVERSE=0|1, and what hopper.cuh
// wants.

#include "hopper.cuh"

constexpr int PARTS = COLUMNS / 64;
constexpr int HELD = ROWS / 2;  // numbers of a part of the state that a thread holds
constexpr int ROWS_BYTES = ROWS * CHUNK * 2, COLUMNS_BYTES = COLUMNS * CHUNK * 2;
constexpr bool LAST_FETCHES = ROWS > 128;  // or else the block's first thread does, when all have met
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LEAST = -1e4f;

// A log-decay: -inf means the same as LEAST, but gamma^0 would be NaN. NaN stays, which max would drop.
__device__ float bounded(float log_decay) { return log_decay < LEAST ? LEAST : log_decay; }

#define OPERAND(x) const __grid_constant__ Map x, Offset x##_share
#define TILES const float *log_decay, const Offset *table, Offset heads, Offset tiles, Offset tile_size, Offset tokens, \
              Offset splits

// The tile of this block, and the chunks of it that are walked. `column`: the block's first; `own`: the warpgroup's.
struct Tile {
    int program, column, own, number, head, batch, start, length, all, chunks;

    __device__ __forceinline__ Tile(TILES) {
        program = blockIdx.x / unsigned(splits), column = blockIdx.x % unsigned(splits) * (GROUPS * COLUMNS);
        own = column + group_number() * COLUMNS;
        number = program % unsigned(tiles);
        head = program / unsigned(tiles) % unsigned(heads);
        batch = program / unsigned(tiles) / unsigned(heads);
        start = int(table ? table[2 * number] : number * tile_size);
        length = int(table ? table[2 * number + 1] : min(tokens - start, tile_size));
        all = chunks = (length + CHUNK - 1) / CHUNK;
    }
    // Leave out chunks whose tokens are so far from the state that gamma^distance is 0 in fp32 (from e^-104 on).
    __device__ __forceinline__ void within_reach(float log_gamma) {
        const int reach = int(min(104.0f / max(-log_gamma, 1e-9f), float(length)));
        chunks = min(all, (reach + CHUNK - 1) / CHUNK + 1);
    }
    // First token of a chunk, counted from the tile's; from the farthest chunk to the one beside the state.
    __device__ __forceinline__ int first(int step) const {
        return (REVERSE ? chunks - 1 - step : all - chunks + step) * CHUNK;
    }
    __device__ __forceinline__ int count(int step) const { return min(CHUNK, length - first(step)); }
    __device__ __forceinline__ Place chunk(int step, Offset share, int column = 0) const {
        return {column, start + first(step), head / int(share), batch};
    }
};

// (high, low) of `scale` times gamma^(steps from token i to the state at the chunk's end), two tokens at a time.
constexpr int WEIGHTS_BYTES = CHUNK / 2 * 8;
__device__ __forceinline__ void write_weights(Word to, float g, float scale, int count) {
    const int thread = thread_number();
    if (thread >= CHUNK / 2) return;
    const int token = 2 * thread, steps = REVERSE ? token + 1 : count - 1 - token;
    // Rounded here, not fused with the subtraction below in one kernel and not in another.
    const float x = __fmul_rn(exp2_(g * float(max(steps, 0))), scale);
    const float y = __fmul_rn(exp2_(g * float(max(REVERSE ? steps + 1 : steps - 1, 0))), scale);
    const Word high = pack(x, y);
    store(to + thread * 8, high);
    store(to + thread * 8 + 4, pack(x - unpack(high, 0), y - unpack(high, 1)));
}

// Where a thread finds its numbers of a block of 64 tokens x 64 columns, as an operand on the left, transposed: the
// columns are the product's rows. And as outputs, which lie in registers alike.
__device__ __forceinline__ Word place_transposed() {
    const int lane = threadIdx.x % 32, vector = thread_number() / 32 * 2 + (lane >> 3 & 1);
    return ((lane & 7) + (lane >> 4) * 8) * 128 + ((vector ^ lane) & 7) * 16;
}
__device__ __forceinline__ void load_left(Word from, Word (&x)[4][4]) {
#pragma unroll
    for (int step = 0; step < 4; step++) load_transposed(from + step * 16 * 128, x[step]);
}

// A chunk's tokens times their weights, as an operand on the left.
struct Weighted {
    Word high[4][4], low[4][4];

    __device__ __forceinline__ void set(const Word (&x)[4][4], Word weights) {
#pragma unroll
        for (int i = 0; i < 8; i++) {  // 8 tokens, two of them this thread's
            Word w, rest;
            load(weights + (threadIdx.x % 4 + 4 * i) * 8, w, rest);
#pragma unroll
            for (int j = i % 2 * 2; j < i % 2 * 2 + 2; j++) {
                const Word c = x[i / 2][j], product = times(c, w);
                high[i / 2][j] = product;
                low[i / 2][j] = times_plus(c, rest, times_plus(c, w, minus(product)));
            }
        }
    }
};
__device__ __forceinline__ void here(Weighted& x) { here(x.high), here(x.low); }

__device__ __forceinline__ void fade(float (&state)[HELD], float by) {
#pragma unroll
    for (int i = 0; i < HELD; i++) state[i] *= by;
}
// Start state += x b.
__device__ __forceinline__ void advance(float (&state)[HELD], Weighted& x, Word b) {
    here(state), here(x);
    begin_products();
#pragma unroll
    for (int step = 0; step < 4; step++) add_product(state, x.high[step], by_columns(b) + along_columns(step));
#pragma unroll
    for (int step = 0; step < 4; step++) add_product(state, x.low[step], by_columns(b) + along_columns(step));
    end_products();
}
