// What gradients.cu is made of beside hopper_tile.cuh: outputs and a state whose rows are a product's rows, so that what is
// summed over columns is summed within a thread and its three neighbours.

template <int n> struct Number {
    static constexpr int value = n;
};

// Where a thread finds its numbers of 16 columns of a block, as an operand on the left or as outputs; ^ 32 i: of 16 i on.
__device__ __forceinline__ Word place_by_rows() {
    const int lane = threadIdx.x % 32, warp = thread_number() / 32;
    return (warp * 16 + (lane & 15)) * 128 + ((lane >> 4 ^ lane) & 7) * 16;
}
// Rounded, to blocks side by side.
template <int n> __device__ __forceinline__ void store_rows(const float (&x)[n], Word to) {
#pragma unroll
    for (int i = 0; i < n; i += 8) {
        Word y[4];
#pragma unroll
        for (int j = 0; j < 4; j++) y[j] = pack(x[i + 2 * j], x[i + 2 * j + 1]);
        store_matrices((to + i / 32 * BLOCK) ^ i / 8 % 4 * 32, y);
    }
}
// Of two rows, the sums of x times what lies where it would be stored, in all four threads that share them.
template <int n> __device__ __forceinline__ void times_rows(const float (&x)[n], Word from, float (&sums)[2]) {
#pragma unroll
    for (int i = 0; i < n; i += 8) {
        Word y[4];
        load_matrices((from + i / 32 * BLOCK) ^ i / 8 % 4 * 32, y);
#pragma unroll
        for (int j = 0; j < 8; j++) sums[j / 2 % 2] = fmaf(x[i + j], unpack(y[j / 2], j % 2), sums[j / 2 % 2]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 1);
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 2);
    }
}
// Rows times what a table holds for each.
template <int n> __device__ __forceinline__ void fade_rows(float (&x)[n], Word from) {
    from += (thread_number() / 32 * 16 + threadIdx.x % 32 / 4) * 4;
    const float by[2] = {load(from), load(from + 32)};
#pragma unroll
    for (int i = 0; i < n; i++) x[i] *= by[i / 2 % 2];
}
// x as high + low, two 16-bit numbers, operands on the left.
__device__ __forceinline__ void halve(float x, float y, Word& high, Word& low) {
    high = pack(x, y), low = pack(x - unpack(high, 0), y - unpack(high, 1));
}
__device__ __forceinline__ void halve(const float (&x)[32], Word (&high)[4][4], Word (&low)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; i++) halve(x[2 * i], x[2 * i + 1], high[i / 4][i % 4], low[i / 4][i % 4]);
}
// 64 rows of a state of 128 columns, high and low, to every second block: below them the other 64 rows.
__device__ __forceinline__ void store_state(const float (&x)[64], Word high, Word low) {
    const Word to = place_by_rows();
#pragma unroll
    for (int i = 0; i < 64; i += 8) {
        const Word at = (to ^ i / 8 % 4 * 32) + i / 32 * 2 * BLOCK;
        Word y[4], rest[4];
#pragma unroll
        for (int j = 0; j < 4; j++) halve(x[i + 2 * j], x[i + 2 * j + 1], y[j], rest[j]);
        store_matrices(high + at, y), store_matrices(low + at, rest);
    }
}
// A step of x += a state^T, of a group's 64 columns or of all 128; or of x += a state.
template <bool BY_COLUMNS> __device__ __forceinline__ void from_state(float (&x)[64], Word a, Word state, int, int step,
                                                                      int add) {
    product<BY_COLUMNS>(x, by_rows(a) + along_rows(step),
                        BY_COLUMNS ? by_columns(state, 2) + along_columns(step) : by_rows(state) + along_rows(step, 2), add);
}
template <bool> __device__ __forceinline__ void from_state(float (&x)[32], Word a, Word state, int group, int step, int add) {
    product(x, by_rows(a) + along_rows(step), by_rows(state + group * BLOCK) + along_rows(step, 2), add);
}
// The same with a in registers, of 64 columns.
template <int n> __device__ __forceinline__ void from_state(float (&x)[n], const Word (&a)[4], Word state, int group, int step,
                                                            int add) {
    if constexpr (n == 32) product(x, a, by_rows(state + group * BLOCK) + along_rows(step, 2), add);
}
// A thread's numbers, for the thread of the same number in the other warpgroup.
__device__ __forceinline__ void store_thread(Word to, const float (&x)[32]) {
    to += thread_number() * 8;
#pragma unroll
    for (int i = 0; i < 32; i += 2) store(to + i * THREADS * 4, x[i], x[i + 1]);
}
__device__ __forceinline__ void times_thread(Word from, float (&x)[32]) {
    from += thread_number() * 8;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        float y[2];
        load(from + i * THREADS * 4, y[0], y[1]);
        x[i] *= y[0], x[i + 1] *= y[1];
    }
}
// An operand on the right, by rows, that sums each row from a column on: 1 at row t and columns i >= t.
__device__ __forceinline__ void triangle(Word to) {
    const Word one = pack(1.0f, 1.0f);
    for (int i = threadIdx.x; i < 64 * 32; i += GROUPS * THREADS) {
        const int row = i / 32, column = 2 * (i % 32);
        store(to + row * 128 + ((column / 8 ^ row) & 7) * 16 + column % 8 * 2,
              column >= row ? one : column + 1 >= row ? one & 0xffff0000u : Word(0));
    }
}
// Of so many sums this thread keeps one half, with what the thread that keeps the other has of it.
template <int many> __device__ __forceinline__ void halve_sums(float (&sums)[16]) {
    const bool upper = threadIdx.x & 2 * many;
#pragma unroll
    for (int i = 0; i < many; i++) {
        const float other = __shfl_xor_sync(0xffffffffu, upper ? sums[i] : sums[i + many], 2 * many);
        sums[i] = (upper ? sums[i + many] : sums[i]) + other;
    }
}
// Of each column the sum over a warp's rows that are earlier; `row`: the thread's first.
__device__ __forceinline__ void sum_earlier_rows(const float (&x)[32], int row, Word to) {
    const int lane = threadIdx.x % 32;
    float sums[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int column = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
        sums[i] = (row < column ? x[4 * (i / 2) + i % 2] : 0.0f) + (row + 8 < column ? x[4 * (i / 2) + 2 + i % 2] : 0.0f);
    }
    halve_sums<8>(sums), halve_sums<4>(sums), halve_sums<2>(sums);
    store(to + (lane / 4 * 8 + 2 * (lane % 4)) * 4, sums[0], sums[1]);
}

// Lost (hopper_lost.cuh) for outputs by rows, one for each of them: early for dq, late for dk and dv, which both lose what
// both operands and the state lose, as columns or in all.
struct LostRows {
    static constexpr int BYTES = AGAIN ? (ROWS + 4) * 4 : 0;
    Word base;

    __device__ __forceinline__ LostRows(Word base, int) : base(base) {}
    __device__ __forceinline__ Word columns(int output) const { return base + output * BYTES; }
    __device__ __forceinline__ Word all(int output) const { return columns(output) + ROWS * 4; }
    __device__ __forceinline__ void start(float (&state)[HELD], int group) const {
        for (int i = threadIdx.x; i < GROUPS * BYTES / 4; i += GROUPS * THREADS) store(base + i * 4, Word(0x7fffffff));
        wait_here<1>();
        const int row = 64 * group + thread_number() / 32 * 16 + threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (not_finite(state[i])) {
                store_least(columns(0) + (row + i / 2 % 2 * 8) * 4, 0);
                if (REVERSE) store_least(columns(1) + (column + i / 4 * 8 + i % 2) * 4, 0);
                state[i] = 0.0f;
            }
    }
    // left: of the rows of the state; added: of its columns. One of them is this group's to look through.
    __device__ __forceinline__ void find(Word left, Word added, int group, int step, int count, bool zero) const {
        const Word chunk = group == 0 ? left : added;
        for (int i = thread_number(); i < ROWS / 2 * CHUNK; i += THREADS) {
            const int row = i / 32 % CHUNK, column = i / (32 * CHUNK) * 64 + (i % 32 / 4 ^ row % 8) * 8 + i % 4 * 2;
            const Word x = load_word(chunk + i * 4);
            const bool low = not_finite(x, 0), high = not_finite(x, 1);
            if (row >= count || !(low || high)) continue;
            if (zero) {
                store(chunk + i * 4, x & (low ? 0xffff0000u : ~0u) & (high ? 0xffffu : ~0u));
                continue;
            }
            const int at = Lost::walked(step, row);
            store_least(all(1 - group), at);  // early, nobody reads the second
            if (low) store_least(columns(group) + column * 4, at);
            if (high) store_least(columns(group) + column * 4 + 4, at);
        }
    }
    template <int n> __device__ __forceinline__ void mark(float (&x)[n], int step, int row, int output, int first) const {
#pragma unroll
        for (int i = 0; i < n; i++) {
            const int column = first + 2 * (threadIdx.x % 4) + i / 4 * 8 + i % 2;
            const int from = min(int(load_word(columns(output) + column * 4)), int(load_word(all(output))));
            if (Lost::walked(step, row + i / 2 % 2 * 8) >= from) x[i] = __int_as_float(0x7fffffff);
        }
    }
};
