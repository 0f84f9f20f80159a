// What paired_gradients.cu wants beside hopper_tile.cuh: sums over rows and columns that lie in several threads.

// Of 2 many sums, half stay with this thread, and half go to the one whose lane is 2 many apart.
template <int many> __device__ __forceinline__ void exchange_sums(float (&sums)[16]) {
    const bool upper = threadIdx.x & 2 * many;
#pragma unroll
    for (int i = 0; i < many; i++) {
        const float other = upper ? sums[i] : sums[i + many];
        sums[i] = (upper ? sums[i + many] : sums[i]) + __shfl_xor_sync(0xffffffffu, other, 2 * many);
    }
}
// Of a thread's 16 tokens, whose numbers the eight threads of the same lane % 4 hold in turn (as outputs, transposed), the
// sums over them, for all 64 tokens of a warp.
__device__ __forceinline__ void sum_lanes(float (&sums)[16], Word to) {
    const int lane = threadIdx.x % 32;
    exchange_sums<8>(sums), exchange_sums<4>(sums), exchange_sums<2>(sums);
    store(to + (lane / 4 * 8 + 2 * (lane % 4)) * 4, sums[0], sums[1]);
}
// Of each token the sum over a warp's 16 columns of o, transposed, times x.
__device__ __forceinline__ void sum_columns(const float (&o)[32], const Word (&x)[4][4], Word to) {
    float sums[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int at = i / 2 * 4 + i % 2;  // the second of a thread's columns is two numbers further on
        sums[i] = fmaf(o[at], unpack(x[i / 4][i / 2 % 2 * 2], i % 2), o[at + 2] * unpack(x[i / 4][i / 2 % 2 * 2 + 1], i % 2));
    }
    sum_lanes(sums, to);
}
// Of each column the sum over those of a warp's 16 rows that are not earlier.
__device__ __forceinline__ void sum_rows_from(const float (&x)[32], Word to) {
    const int lane = threadIdx.x % 32, row = thread_number() / 32 * 16 + lane / 4;
    float sums[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int column = i / 2 * 8 + 2 * (lane % 4) + i % 2, at = i / 2 * 4 + i % 2;
        sums[i] = (row >= column ? x[at] : 0.0f) + (row + 8 >= column ? x[at + 2] : 0.0f);
    }
    sum_lanes(sums, to);
}
// An operand on the right, by rows, that sums each row up to a column: 1 at row t and columns j < t.
__device__ __forceinline__ void triangle(Word to) {
    for (int i = threadIdx.x; i < 64 * 32; i += GROUPS * THREADS) {
        const int row = i / 32, column = 2 * (i % 32);
        store(to + row * 128 + ((column / 8 ^ row) & 7) * 16 + column % 8 * 2,
              pack(column < row ? 1.0f : 0.0f, column + 1 < row ? 1.0f : 0.0f));
    }
}
// Of x, from 8 `first` on, high, and low, the rest: 16-bit numbers, operands on the left.
template <int n, int steps>
__device__ __forceinline__ void round_to(Word (&high)[steps][4], const float (&x)[n], int first = 0) {
#pragma unroll
    for (int i = 0; i < 4 * steps; i++) high[i / 4][i % 4] = pack(x[8 * first + 2 * i], x[8 * first + 2 * i + 1]);
}
template <int n, int steps>
__device__ __forceinline__ void round_rest(Word (&low)[steps][4], const float (&x)[n], int first = 0) {
#pragma unroll
    for (int i = 0; i < 4 * steps; i++) {
        const float left = x[8 * first + 2 * i], right = x[8 * first + 2 * i + 1];
        low[i / 4][i % 4] = rest(left, right, pack(left, right));
    }
}
