// What paired_gradients.cu and grouped_outputs.cu want beside hopper_tile.cuh: sums over rows and columns that lie in
// several threads, the state as two 16-bit numbers, and what is left of v's own gradient.

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
// Of each token the sum over a warp's 16 columns of o, transposed, times x: of two tokens, the first of which is returned.
__device__ __forceinline__ void add_columns(const float (&o)[32], const Word (&x)[4], int part, float (&sums)[16]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int at = 8 * part + i / 2 * 4 + i % 2;  // the second of a thread's columns is two numbers further on
        sums[4 * part + i] = fmaf(o[at], unpack(x[i / 2 * 2], i % 2), o[at + 2] * unpack(x[i / 2 * 2 + 1], i % 2));
    }
}
__device__ __forceinline__ int sum_columns(const float (&o)[32], const Word (&x)[4][4], float (&sums)[16]) {
#pragma unroll
    for (int part = 0; part < 4; part++) add_columns(o, x[part], part, sums);
    return sum_lanes(sums);
}
__device__ __forceinline__ int sum_columns(const float (&o)[32], Word x, float (&sums)[16]) {  // where load_left finds it
#pragma unroll
    for (int part = 0; part < 4; part++) {
        Word own[4];
        load_transposed(x + part * 16 * 128, own);
        add_columns(o, own, part, sums);
    }
    return sum_lanes(sums);
}
// Of numbers that lie beside each other, two in each of four lanes, what there is before each of a lane's own; and in all.
__device__ __forceinline__ float sum_before(float first, float second, float (&before)[2]) {
    const int lane = threadIdx.x % 32;
    const float own = first + second, beside = __shfl_xor_sync(0xffffffffu, own, 1);
    const float far = __shfl_xor_sync(0xffffffffu, own + beside, 2);
    before[0] = (lane & 1 ? beside : 0.0f) + (lane & 2 ? far : 0.0f);
    before[1] = before[0] + first;
    return own + beside + far;
}
// Of pairs x y of a row i and an earlier column j, those that pass over token t, i >= t > j: for each t the sum over a
// warp's 16 rows, none of it a difference. Columns before these rows are added up over them, and then one after the other;
// what each row has there in all passes on into the warp's own tokens, in two blocks of 8, up to itself.
__device__ __forceinline__ void sum_passing(const float (&x)[32], const float (&y)[32], Word to) {
    const int lane = threadIdx.x % 32, warp = thread_number() / 32, row = lane / 4, column = 2 * (lane % 4);
    float sums[16], rows[2] = {}, own[8] = {};
#pragma unroll
    for (int part = 0; part < 4; part++) {  // behind the warp's own tokens x is 0
        float m[8];
#pragma unroll
        for (int i = 0; i < 8; i++) m[i] = x[8 * part + i] * y[8 * part + i];
        if (part == warp) {
#pragma unroll
            for (int i = 0; i < 8; i++) own[i] = m[i];
        } else {
            rows[0] += m[0] + m[1] + (m[4] + m[5]), rows[1] += m[2] + m[3] + (m[6] + m[7]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) sums[4 * part + i] = m[i / 2 * 4 + i % 2] + m[i / 2 * 4 + i % 2 + 2];
    }
#pragma unroll
    for (int apart = 1; apart < 4; apart *= 2)
#pragma unroll
        for (int i = 0; i < 2; i++) rows[i] += __shfl_xor_sync(0xffffffffu, rows[i], apart);
    float upper[2], lower[2], beside[2];
    sum_before(own[0], own[1], upper);
    const float in_lower = sum_before(own[2], own[3], lower);
    sum_before(own[6], own[7], beside);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool passed = row >= column + i;
        const float first = (passed ? rows[0] + upper[i] : 0.0f) + (rows[1] + lower[i]);
        const float second = passed ? rows[1] + in_lower + beside[i] : 0.0f;
#pragma unroll
        for (int part = 0; part < 4; part++)
            if (part == warp) sums[4 * part + i] = first, sums[4 * part + 2 + i] = second;
    }
    const int token = sum_lanes(sums);
    float before = 0.0f, all = sums[0] + sums[1];
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2) {
        const float others = __shfl_xor_sync(0xffffffffu, all, apart);
        before += lane & apart ? others : 0.0f, all += others;
    }
    const bool earlier = lane < 8 * warp;
    __syncwarp();  // all have read what lies there
    store(to + token * 4, earlier ? before : sums[0], earlier ? before + sums[0] : sums[1]);
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
// o = S^T a^T of half of the state, rounded, and after `between` also of what rounding has left of it: in parts, each of
// which is made while others are multiplied.
template <class F>
__device__ __forceinline__ void product_twice(float (&o)[32], const float (&state)[HELD], Word a, F between) {
    Word left[2][2][4];
#pragma unroll
    for (int part = 0; part < 4; part++) {
        Word(&own)[2][4] = left[part % 2];
        if (part < 2) round_to(own, state, 2 * part);
        if (part == 2) wait_products<1>(), here(own);
        if (part >= 2) round_rest(own, state, 2 * (part - 2));
        if (part == 2) {
            here(own);
            wait_products<0>();
            here(o), here(left[1]);
            between();
            here(o);
        }
        here(own);
        begin_products();
#pragma unroll
        for (int i = 0; i < 2; i++) product(o, own[i], by_rows(a) + along_rows(2 * (part % 2) + i), part + i);
        end_products();
    }
    wait_products<0>();
    here(o), here(left[0]), here(left[1]);
}
// Where a warp's sums of two tokens of each head lie, for each lane: of 32 rows of a chunk of 128 columns the 32 bytes that the
// warp alone has read. And all warps' together, of which there are 8.
__device__ __forceinline__ Word place_of_sums(Word chunk, int number) {
    const int lane = threadIdx.x % 32;
    return chunk + number / WARPS * BLOCK + lane * 128 + (number % WARPS ^ lane / 2 % 4) * 32;
}
template <int heads>
__device__ __forceinline__ void add_up_warps(Word chunk, float* to, Offset of_head, int count) {
    float sums[heads][2] = {};
#pragma unroll
    for (int number = 0; number < GROUPS * WARPS; number++)
#pragma unroll
        for (int h = 0; h < heads; h++) {
            float x, y;
            load(place_of_sums(chunk, number) + h * 8, x, y);
            sums[h][0] += x, sums[h][1] += y;
        }
#pragma unroll
    for (int i = 0; i < 2 * heads; i++) {
        const int token = threadIdx.x % 32 * 2 + i % 2;
        if (token < count) to[i / 2 * of_head + token] = sums[i / 2][i % 2];
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
