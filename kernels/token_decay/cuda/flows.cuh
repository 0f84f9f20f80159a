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
// sums over them: of two tokens each, the first of which is returned, for all 64 of a warp.
__device__ __forceinline__ int sum_lanes(float (&sums)[16]) {
    exchange_sums<8>(sums), exchange_sums<4>(sums), exchange_sums<2>(sums);
    return threadIdx.x % 32 / 4 * 8 + 2 * (threadIdx.x % 4);
}
__device__ __forceinline__ void sum_lanes(float (&sums)[16], Word to) {
    const int token = sum_lanes(sums);
    store(to + token * 4, sums[0], sums[1]);
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
// What v gets by dv, which is the gradient of v times its weights, o here, and by do, of which it gets `skip` times: a warp's
// 16 columns, to where do lies, and of each token two sums over them to where v does: v dv, and v do. dv is rounded first, as
// what others read of it. Nobody else reads what lies there.
__device__ __forceinline__ void finish(const float (&o)[32], Word d_o, Word v, Word weights, const float* skip) {
    const int lane = threadIdx.x % 32, warp = thread_number() / 32;
    const Word at = place_transposed();
    const float by_do = skip ? *skip : 0.0f;
    float of_weight[16], of_skip[16];
#pragma unroll
    for (int i = 0; i < 4; i++) {  // 16 tokens
        Word x[4], y[4];
        load_transposed(v + at + i * 16 * 128, x);
        load_transposed(d_o + at + i * 16 * 128, y);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const Word rounded = pack(o[8 * i + 2 * j], o[8 * i + 2 * j + 1]);
            float w[2], dx[2];
            w[0] = load(weights + (16 * i + j / 2 * 8 + 2 * (lane % 4)) * 4);
            w[1] = load(weights + (16 * i + j / 2 * 8 + 2 * (lane % 4)) * 4 + 4);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const float own = unpack(x[j], k), dv = unpack(rounded, k), grown = unpack(y[j], k);
                float &sum = of_weight[4 * i + j / 2 * 2 + k], &skipped = of_skip[4 * i + j / 2 * 2 + k];
                sum = j % 2 ? fmaf(dv, own, sum) : dv * own;
                skipped = j % 2 ? fmaf(grown, own, skipped) : grown * own;
                dx[k] = fmaf(dv, w[k], __fmul_rn(grown, by_do));
            }
            y[j] = pack(dx[0], dx[1]);
        }
        store_transposed(d_o + at + i * 16 * 128, y);
    }
    const int token = sum_lanes(of_weight);
    if (skip) sum_lanes(of_skip);
#pragma unroll
    for (int i = 0; i < 2; i++)
        store(v + (token + i) * 128 + ((2 * warp ^ token + i) & 7) * 16, of_weight[i], of_skip[i]);
}
// Of a chunk's token what `finish` has left, over all warps.
__device__ __forceinline__ void sum_finished(Word v, int token, float& of_weight, float& of_skip) {
    of_weight = of_skip = 0.0f;
    for (int i = 0; i < WARPS; i++) {
        float x, y;
        load(v + token * 128 + ((2 * i ^ token) & 7) * 16, x, y);
        of_weight += x, of_skip += y;
    }
}
