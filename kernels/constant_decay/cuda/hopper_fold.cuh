// What tile_outputs.cu wants of hopper_tile.cuh to walk a whole sequence, in tiles of -DFOLD=16|32|64 tokens, a chunk each.
//
// Its state is what the fold between tiles carries. What a tile adds is summed by itself, from zero, with the bits of
// tile_states.cu (whose `scale` is sum_scale), and folded with those of the fold. -DTRANSPOSED=1: with the bits of states
// that are c's and b's, transposed: the weights are b's.

#ifndef TRANSPOSED
#define TRANSPOSED 0
#endif
#if FOLD
#define FOLD_ , float sum_scale
static_assert(GROUPS == 1 && !LAST_FETCHES && STRIDE <= CHUNK && STRIDE % 16 == 0);

// A chunk of WIDTH columns in shared memory times its tokens' weights: the higher part in its place.
template <int WIDTH> __device__ __forceinline__ void weigh_chunk(Word chunk, Word low_chunk, Word weights) {
#pragma unroll 1
    for (int i = thread_number(); i < WIDTH / 8 * STRIDE; i += THREADS) {  // a row's place in a block is all that counts
        const int row = i / 8 % STRIDE, at = i / (8 * STRIDE) * BLOCK + row * 128 + i % 8 * 16;
        Word w, rest, x[4], low[4];
        load(weights + row / 2 * 8, w, rest);
        w = row % 2 ? w >> 16 | (w & 0xffff0000u) : w << 16 | (w & 0xffffu);
        rest = row % 2 ? rest >> 16 | (rest & 0xffff0000u) : rest << 16 | (rest & 0xffffu);
        load(chunk + at, x);
#pragma unroll
        for (int j = 0; j < 4; j++) weigh(x[j], w, rest, x[j], low[j]);
        store(chunk + at, x), store(low_chunk + at, low);
    }
    publish();
}

// Start state += x b, where b has been weighted, and x not.
__device__ __forceinline__ void advance(float (&state)[HELD], Word (&x)[4][4], Word b, Word b_low) {
    here(state), here(x);
    begin_products();
#pragma unroll
    for (int step = 0; step < SUMMED; step++) add_product(state, x[step], by_columns(b) + along_columns(step));
#pragma unroll
    for (int step = 0; step < SUMMED; step++) add_product(state, x[step], by_columns(b_low) + along_columns(step));
    end_products();
}

// From the state at a tile's start to that at its end, with the tile's c in x, and its a and b, whose places may be taken.
__device__ __forceinline__ void fold_tile(float (&state)[PARTS][HELD], Weighted (&weighted)[PARTS],
                                          Word (&x)[PARTS][4][4], Word a, Word b, Word weights, float folded,
                                          float sum_scale) {
    if (TRANSPOSED) {
        meet();  // all have read a and b
        weigh_chunk<STORED_ROWS>(b, a, weights);
        meet();
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        float own[HELD] = {};
        if (TRANSPOSED) {
            advance(own, x[part], b, a);
        } else {
            weighted[part].set(x[part], weights);
            advance(own, weighted[part], b);
        }
        publish();
        wait_products<0>();
        here(own), here(x[part]);
        if (!TRANSPOSED) here(weighted[part]);
#pragma unroll
        for (int i = 0; i < HELD; i++) state[part][i] = fmaf(state[part][i], folded, sum_scale * own[i]);
    }
}
#else
#define FOLD_
#endif
