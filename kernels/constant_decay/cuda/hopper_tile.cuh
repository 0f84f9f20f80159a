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
// times for 256 columns. So the two warpgroups of a multiprocessor can be one block (GROUPS=2; with up to 192 rows three,
// GROUPS=3), with columns of their own and the same a and b. They do not meet either: a chunk is fetched as early as
// there is place for it, by whichever warp is the last to have read what lies there.
//
// A state may have fewer rows than ROWS, and fewer columns than its blocks have together: in multiples of 8. Of what is
// not there the copy engine makes zeros in shared memory, and it writes none of it. Products sum over ROWS, and the
// blocks of 64 x 64 numbers in which chunks lie may have more.
//
// Compile with -DROWS=32|64|...|256 -DCOLUMNS=64|128 (of a warpgroup; 64 with more than 128 rows) -DREVERSE=0|1, where
// the state is smaller -DSTATE_ROWS and -DSTATE_COLUMNS (of all blocks), where another launch has the columns before it
// -DFIRST, for operands in pieces -DPIECES=1|2, and what hopper.cuh wants.

#include "hopper.cuh"

constexpr int PARTS = COLUMNS / 64;
constexpr int HELD = ROWS / 2;  // numbers of a part of the state that a thread holds
constexpr int STORED_ROWS = (ROWS + 63) / 64 * 64;
[[maybe_unused]] constexpr int ROWS_BYTES = STORED_ROWS * CHUNK * 2, COLUMNS_BYTES = COLUMNS * CHUNK * 2;
#ifndef HIGH
#define HIGH 0
#endif
// By the last warp that has read a place; or else by the block's first thread, when all have met.
[[maybe_unused]] constexpr bool LAST_FETCHES = ROWS > 128 || HIGH;
constexpr float LOG2E = 1.4426950408889634f;

#ifndef STATE_ROWS
#define STATE_ROWS ROWS
#endif
#ifndef STATE_COLUMNS  // as many as all blocks have
#define STATE_COLUMNS 0
#endif
#ifndef FIRST
#define FIRST 0
#endif
// Whether the state has the eight rows, or columns, from this one on, a multiple of 8.
__device__ __forceinline__ bool has_row(int row) { return STATE_ROWS == ROWS || row < STATE_ROWS; }
__device__ __forceinline__ bool has_column(int column) { return !STATE_COLUMNS || column < STATE_COLUMNS; }

#define OPERAND(x) const __grid_constant__ Map x, Offset x##_share
#define TILES const float *log_decay, const Offset *table, Offset heads, Offset tiles, Offset tile_size, Offset tokens, \
              Offset splits TOKENS
#define TILE log_decay, table, heads, tiles, tile_size, tokens, splits TOKENS_
#if WEIGHTED  // and what each token's v is still to be multiplied by, which lies as log_decay does
#define WEIGHT , const float *weight
#define WEIGHT_ , weight
#define WEIGHT_OR_NONE weight
#else
#define WEIGHTED 0
#define WEIGHT
#define WEIGHT_
#define WEIGHT_OR_NONE static_cast<const float*>(nullptr)
#endif
#if TOKEN  // log_decay (B, H, N), of which so many heads share an operand
#define TOKENS , Offset decay_batch, Offset decay_head, Offset together WEIGHT
#define TOKENS_ , decay_batch, decay_head, together WEIGHT_
#else
#define TOKEN 0
#define TOKENS
#define TOKENS_
#endif

// Of an operand that so many heads share. A division is a hundred cycles, for which others may wait.
__device__ __forceinline__ int head_of(int head, Offset share) { return share == 1 ? head : head / int(share); }

// The tile of a block, and the chunks of it that are walked. `column`: the block's first; `own`: the warpgroup's.
struct Tile {
    int program, column, own, number, head, batch, start, length, all, chunks;

    __device__ __forceinline__ Tile(TILES) : Tile(blockIdx.x, TILE) {}
    __device__ __forceinline__ Tile(unsigned block, TILES) {  // program: its number, head by head
        program = block / unsigned(splits), column = FIRST;
        column += block % unsigned(splits) * (GROUPS * COLUMNS);
        own = column + group_number() * COLUMNS;
#if TOKEN  // heads that share an operand come one after the other, tile by tile: the second cache serves all but one
        const unsigned set = program / unsigned(together) / unsigned(tiles), sets = unsigned(heads) / unsigned(together);
        number = program / unsigned(together) % unsigned(tiles);
        head = set % sets * unsigned(together) + program % unsigned(together);
        batch = set / sets;
        program = (batch * int(heads) + head) * int(tiles) + number;
#else
        number = program % unsigned(tiles);
        head = program / unsigned(tiles) % unsigned(heads);
        batch = program / unsigned(tiles) / unsigned(heads);
#endif
        start = int(table ? table[2 * number] : number * tile_size);
        length = int(table ? table[2 * number + 1] : min(tokens - start, tile_size));
        all = chunks = (length + CHUNK - 1) / CHUNK;
    }
    // First token of a chunk, counted from the tile's; from the farthest chunk to the one beside the state.
    __device__ __forceinline__ int first(int step) const {
        return (REVERSE ? chunks - 1 - step : all - chunks + step) * CHUNK;
    }
    __device__ __forceinline__ int count(int step) const { return min(CHUNK, length - first(step)); }
    __device__ __forceinline__ Place chunk(int step, Offset share, int column = 0) const {
        // Of a decay a token, kernels that have no branch to spare.
        return chunk_of(step, LAST_FETCHES || !TOKEN ? head_of(head, share) : head / int(share), column);
    }
    __device__ __forceinline__ Place chunk_of(int step, int own_head, int column = 0) const {
        return {column, start + first(step), own_head, batch};
    }
};

#ifndef PIECES
#define PIECES 0
#endif
// Where an operand's chunk is fetched from: FROM_MAP(x, at), and there IN_PIECE(at, operand). KEEP_PIECES(end): behind all
// else in shared memory, what is to be known of a tile's chunks.
#if PIECES == 1  // q, k and v in many pieces (pieces.cu): of each chunk its token in one, and where each of the three is
#define PIECES_ , const int *pieces
#define FIRST_CHUNK(x)
#define FROM_MAP(x, at) x
__device__ __forceinline__ Word kept_pieces(Word end, const Tile& tile, const int* pieces, Offset tokens) {
    end = (end + 15) & ~15u;
    pieces += 4 * (tile.batch * ((tokens + CHUNK - 1) / CHUNK) + tile.start / CHUNK);
    for (int i = threadIdx.x; i < 4 * tile.all; i += GROUPS * THREADS) store(end + 4 * i, Word(pieces[i]));
    return end;
}
__device__ __forceinline__ Place in_piece(Place at, Word chunk, int operand) {
    return {at.column, int(load_word(chunk)), at.head, int(load_word(chunk + 4 + 4 * operand))};
}
#define KEEP_PIECES(end) const Word own_pieces = kept_pieces(end, tile, pieces, tokens)
#define IN_PIECE(at, operand) in_piece(at, own_pieces + (at.token - tile.start) / CHUNK * 16, operand)
#elif PIECES == 2  // in two: the first chunk, `before` tokens of which are another's, and all behind it
#define PIECES_ , Offset before
#define KEEP_PIECES(end)
#define FIRST_CHUNK(x) , const __grid_constant__ Map x##_first
#define FROM_MAP(x, at) (at.token ? x : x##_first)
#define IN_PIECE(at, operand) Place{at.column, at.token ? at.token - int(before) : 0, at.head, at.batch}
#else
#define PIECES_
#define KEEP_PIECES(end)
#define FIRST_CHUNK(x)
#define FROM_MAP(x, at) x
#define IN_PIECE(at, operand) at
#endif

// What rounding two numbers to x has left of them, rounded.
__device__ __forceinline__ Word rest(float low, float high, Word x) {
    return pack(low - unpack(x, 0), high - unpack(x, 1));
}

// The weights of tokens 2 i and 2 i + 1 as 16-bit numbers, high and then low.
__device__ __forceinline__ void store_pair(Word pairs, int i, float x, float y) {
    const Word high = pack(x, y);
    store(pairs + i * 8, high);
    store(pairs + i * 8 + 4, rest(x, y, high));
}

// o, transposed, times what `from` holds for each of a chunk's tokens, from `first` on. PAIRS: two are loaded at once.
template <bool PAIRS, int n>
__device__ __forceinline__ void fade_outputs(float (&o)[n], const float (&unit)[2], Word from, int first) {
    from += (2 * (threadIdx.x % 4) + first) * 4;
#pragma unroll
    for (int i = 0; i < n; i += 4) {
        float f[2];
        if (PAIRS) load(from + 2 * i * 4, f[0], f[1]);
        else f[0] = load(from + 2 * i * 4), f[1] = load(from + 2 * i * 4 + 4);
#pragma unroll
        for (int j = 0; j < 4; j++) o[i + j] *= f[j % 2] * unit[j / 2];
    }
}

#if TOKEN
#include "../../token_decay/cuda/hopper_weights.cuh"
#else
#include "hopper_weights.cuh"
#endif

// Where a thread finds its numbers of a block of 64 tokens x 64 columns, as an operand on the left, transposed: the
// columns are the product's rows. And as outputs, which lie in registers alike.
__device__ __forceinline__ Word place_transposed() {
    const int lane = threadIdx.x % 32, vector = thread_number() / 32 * 2 + (lane >> 3 & 1);
    return ((lane & 7) + (lane >> 4) * 8) * 128 + ((vector ^ lane) & 7) * 16;
}
template <int steps> __device__ __forceinline__ void load_left(Word from, Word (&x)[steps][4]) {
#pragma unroll
    for (int step = 0; step < steps; step++) load_transposed(from + step * 16 * 128, x[step]);
}

// What load_left gives of a chunk times a number for each token, rounded; of tokens that are not there, zero_numbers first
// puts zeros to where the numbers lie.
__device__ __forceinline__ void weigh(Word (&x)[4][4], Word weights) {
    weights += threadIdx.x % 4 * 8;
#pragma unroll
    for (int i = 0; i < 8; i++) {  // 8 tokens, two of them this thread's
        const float first = load(weights + i * 32), second = load(weights + i * 32 + 4);
#pragma unroll
        for (int j = i % 2 * 2; j < i % 2 * 2 + 2; j++)
            x[i / 2][j] = pack(unpack(x[i / 2][j], 0) * first, unpack(x[i / 2][j], 1) * second);
    }
}
__device__ __forceinline__ void zero_numbers(Word weights, int count) {
    const int token = thread_number();
    if (token >= count && token < CHUNK) store(weights + token * 4, 0.0f);
}
// The same of 64 columns in shared memory, of the first `count` tokens, where products read them there. A warp does so
// with what load_left gives it.
__device__ __forceinline__ void weigh_rows(Word chunk, Word weights, int count) {
    const int lane = threadIdx.x % 32, vector = thread_number() / 32 * 2 + lane % 2;
    const int first = lane / 2 % 4 * 2 + lane / 8 % 2 + lane / 16 * 8;  // no two in the same banks
#pragma unroll 2
    for (int row = first; row < count; row += 16) {
        const float by = load(weights + row * 4);
        const Word at = chunk + row * 128 + ((vector ^ row) & 7) * 16;
        Word x[4];
        load(at, x);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = pack(unpack(x[i], 0) * by, unpack(x[i], 1) * by);
        store(at, x);
    }
    publish();
}

// x times w + rest, as two numbers.
__device__ __forceinline__ void weigh(Word x, Word w, Word rest, Word& high, Word& low) {
    const Word product = times(x, w);
    low = times_plus(x, rest, times_plus(x, w, minus(product))), high = product;
}

// `count` tokens of WIDTH columns in shared memory times their weights, as two chunks.
template <int WIDTH, int count>
__device__ __forceinline__ void weigh_chunk(Word chunk, Word high_chunk, Word low_chunk, Word weights) {
#pragma unroll 1
    for (int i = thread_number(); i < WIDTH / 8 * count; i += THREADS) {  // a row's place in a block is all that counts
        const int row = i / 8 % count, at = i / (8 * count) * BLOCK + row * 128 + i % 8 * 16;
        Word w, rest, x[4], low[4];
        load(weights + row / 2 * 8, w, rest);
        w = row % 2 ? w >> 16 | (w & 0xffff0000u) : w << 16 | (w & 0xffffu);
        rest = row % 2 ? rest >> 16 | (rest & 0xffff0000u) : rest << 16 | (rest & 0xffffu);
        load(chunk + at, x);
#pragma unroll
        for (int j = 0; j < 4; j++) weigh(x[j], w, rest, x[j], low[j]);
        store(high_chunk + at, x), store(low_chunk + at, low);
    }
    publish();
}

// Tokens times their weights, as an operand on the left, for so many steps of 16.
template <int steps> struct WeightedOf {
    Word high[steps][4], low[steps][4];

    __device__ __forceinline__ void set(const Word (&x)[steps][4], Word weights, bool of_high = true, bool of_low = true) {
#pragma unroll
        for (int i = 0; i < 2 * steps; i++) {  // 8 tokens, two of them this thread's
            Word w, rest;
            load(weights + (threadIdx.x % 4 + 4 * i) * 8, w, rest);
#pragma unroll
            for (int j = i % 2 * 2; j < i % 2 * 2 + 2; j++) {
                Word product, error;
                weigh(x[i / 2][j], w, rest, product, error);
                if (of_high) high[i / 2][j] = product;
                if (of_low) low[i / 2][j] = error;
            }
        }
    }
};
typedef WeightedOf<4> Weighted;  // a chunk's
template <int steps> __device__ __forceinline__ void here(WeightedOf<steps>& x) { here(x.high), here(x.low); }

// The first `count` rows of a chunk's outputs, to where multiples of 16 bytes are; `own`: the first column.
template <int WIDTH>
__device__ __forceinline__ void write_rows(Bits* to, Offset token_stride, Word from, int count, int own) {
    for (int i = thread_number(); i < WIDTH / 8 * count; i += THREADS) {
        const int token = i / (WIDTH / 8), vector = i % (WIDTH / 8);
        if (!has_column(own + 8 * vector)) continue;
        Word x[4];
        const Word at = from + vector / 8 * BLOCK + token * 128 + ((vector ^ token) & 7) * 16;
        load(at, x[0], x[1]), load(at + 8, x[2], x[3]);
        write_words(to + token * token_stride + 8 * vector, x);
    }
}

template <int n> __device__ __forceinline__ void fade(float (&state)[n], float by) {
#pragma unroll
    for (int i = 0; i < n; i++) state[i] *= by;
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
// The same of x that is still to be weighted, the low part while the high one is under way.
__device__ __forceinline__ void advance(float (&state)[HELD], Weighted& y, const Word (&x)[4][4], Word weights, Word b) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
        y.set(x, weights, part == 0, part == 1);
        Word(&left)[4][4] = part ? y.low : y.high;
        if (part == 0) here(state);
        here(left);
        begin_products();
#pragma unroll
        for (int step = 0; step < 4; step++) add_product(state, left[step], by_columns(b) + along_columns(step));
        end_products();
    }
}
// First the high and then the low part: half as many registers, and done.
// meanwhile: called while each is under way.
template <class F>
__device__ __forceinline__ void advance(float (&state)[HELD], const Word (&x)[4][4], Word weights, Word b, F meanwhile) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
        Weighted weighted;
        weighted.set(x, weights);
        Word(&y)[4][4] = part ? weighted.low : weighted.high;
        here(state), here(y);
        begin_products();
#pragma unroll
        for (int step = 0; step < 4; step++) add_product(state, y[step], by_columns(b) + along_columns(step));
        end_products();
        meanwhile(part);
        wait_products<0>();
        here(state), here(y);
    }
}
