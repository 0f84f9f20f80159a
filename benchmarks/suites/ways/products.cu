// The products of a chunk of 64 tokens by themselves, of numbers that are all zero: how many cycles a multiprocessor needs.
//
// -DMODE=0: today's walk, 128 columns a warpgroup: 2,048 by the count. 1: a walk with two running sums (the outputs' state,
// and the tile's own): 3,072. 2: 32 columns, of a cluster of four: 704. Two blocks a multiprocessor, or one.

#include "../../../leetdist/kernels/constant_decay/cuda/hopper.cuh"

// One step of x (64 x 32) += a b: a by rows, or by columns, in shared memory, or in registers; b by columns.
template <int TURNED> __device__ __forceinline__ void narrow(float (&x)[16], Long a, Long b) {
    asm volatile(PRODUCT("32") " {" NAMES16 "}, %16, %17, 1, 1, 1, %18, 1;" : LIST16(x, 0) : "l"(a), "l"(b), "n"(TURNED));
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) products(float* out, Offset chunks, Offset* cycles) {
    const Word base = shared_memory(), a = base, b = base + 2 * BLOCK, c = base + 4 * BLOCK;
    for (int i = threadIdx.x; i < 5 * BLOCK / 4; i += THREADS) store(base + i * 4, Word(0));
    publish();
    __syncthreads();
    float total = 0.0f;
    Word left[4][4];
#pragma unroll
    for (int j = 0; j < 16; j++) left[j / 4][j % 4] = load_word(base + j * 4);
    const Offset begin = clock64();
#if MODE < 2
    float scores[32] = {}, state[2][64] = {};  // the outputs' registers are the scores': one more set, and ptxas serializes
    for (Offset i = 0; i < chunks; i++) {
        here(left), here(scores), here(state[0]), here(state[1]);
        begin_products();
#pragma unroll
        for (int step = 0; step < 8; step++) product(scores, by_rows(a) + along_rows(step), by_rows(b) + along_rows(step), 1);
        end_products();
#pragma unroll
        for (int part = 0; part < 2; part++) {
#pragma unroll
            for (int step = 0; step < 8; step++) product(scores, left[step % 4], by_rows(a) + along_rows(step), 1);
#pragma unroll
            for (int step = 0; step < 4; step++) product(scores, left[step], by_rows(c) + along_rows(step), 1);
            end_products();
#pragma unroll
            for (int step = 0; step < 8 * (1 + MODE); step++)  // the second sum's registers would be another warpgroup's
                add_product(state[part], left[step % 4], by_columns(b) + along_columns(step % 4));
            end_products();
        }
        wait_products<0>();
        here(left), here(scores), here(state[0]), here(state[1]);
    }
    for (int i = 0; i < 64; i++) total += state[0][i] + state[1][i] + scores[i / 2];
#else
    float scores[32] = {}, o[16] = {}, state[2][16] = {};
    for (Offset i = 0; i < chunks; i++) {
        here(left), here(scores), here(o), here(state[0]), here(state[1]);
        begin_products();
#pragma unroll
        for (int step = 0; step < 8; step++) product(scores, by_rows(a) + along_rows(step), by_rows(b) + along_rows(step), 1);
        end_products();
#pragma unroll
        for (int step = 0; step < 8; step++) narrow<0>(o, by_rows(a) + along_rows(step), by_columns(c) + along_columns(step % 4));
#pragma unroll
        for (int step = 0; step < 4; step++)  // scores, rounded, as they lie in registers
            asm volatile(PRODUCT("32") " {" NAMES16 "}, {%16, %17, %18, %19}, %20, 1, 1, 1, 1;"
                         : LIST16(o, 0) : "r"(left[step][0]), "r"(left[step][1]), "r"(left[step][2]), "r"(left[step][3]),
                           "l"(by_columns(c) + along_columns(step)));
        end_products();
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int step = 0; step < 8; step++)
                narrow<1>(state[half], by_columns(b + half * BLOCK) + along_columns(step % 4),
                          by_columns(c) + along_columns(step % 4));
        end_products();
        wait_products<0>();
        here(left), here(scores), here(o), here(state[0]), here(state[1]);
    }
    for (int i = 0; i < 16; i++) total += state[0][i] + state[1][i] + scores[i] + scores[i + 16] + o[i];
#endif
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock64() - begin;
    out[blockIdx.x * THREADS + threadIdx.x] = total;
}
