// Decaying linear attention token by token, the state in registers: tile_outputs of the methods "fleet" and
// "causal_dot_product". leetdist/kernels/constant_decay/cuda/token_scan.py launches it and says what it computes.
//
// A block owns one tile of one head and BLOCK_COLUMNS columns of the state. A thread holds HELD rows of each of
// COLUMNS columns; LANES neighbouring lanes share the rows, and their partial sums over them meet in a fixed tree of
// shuffles: no atomics, no order that depends on anything but the shape. Operands pass through shared memory, CHUNK
// tokens ahead, in fp32.
//
// Instructions for each (token, row, column): fma(k, v, s), fma(q, s, o), and the decay of s, which is paid once for a
// group of 16 or 8 tokens: inside one the state is kept divided by gamma^t, so v_t comes divided by gamma^t and o_t is
// multiplied by it. t stays below 16, whatever the length, and gamma^-t below e^14: heads that decay faster take groups
// of 8, or of one token, so nothing can overflow that would not anyway. BY_TOKEN: all heads decay at every token.
//
// Compile with -DDK=32|64|128|256 -DIN=0|1|2 -DOUT=0|1|2 (fp32, bf16, fp16) -DBY_TOKEN=0|1 -DVECTOR=1|4 (4: every row
// of the inputs is aligned to, and as long as, whole vectors of 4 elements; so is the state). No headers, so that NVRTC
// needs none.

typedef long long Long;

template <int kind> struct Number;
template <> struct Number<0> {
    using Stored = float;
    static __device__ float load(float x) { return x; }
    static __device__ float store(float x) { return x; }
};
template <> struct Number<1> {
    using Stored = unsigned short;
    static __device__ float load(Stored x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
    static __device__ Stored store(float x) {
        Stored y;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
};
template <> struct Number<2> {
    using Stored = unsigned short;
    static __device__ float load(Stored x) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
        return y;
    }
    static __device__ Stored store(float x) {
        Stored y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
        return y;
    }
};

using In = Number<IN>;
using Out = Number<OUT>;

constexpr int CHUNK = 8;   // tokens staged together
constexpr int GROUP = 16;  // tokens, at most, that decay together
constexpr int WARPS = DK >= 128 ? 4 : 2;
constexpr int THREADS = 32 * WARPS;
constexpr int LANES = DK <= 128 ? 8 : 16;
constexpr int HELD = DK / LANES;
constexpr int COLUMNS = 8;
constexpr int WARP_COLUMNS = 32 / LANES * COLUMNS;
constexpr int BLOCK_COLUMNS = WARPS * WARP_COLUMNS;
constexpr int UNROLL = 4;  // tokens in a loop's body
constexpr unsigned EVERYONE = 0xffffffffu;

// The rows of one operand that a block reads, in the order of its walk: a head of it, one tile's tokens.
struct Rows {
    const In::Stored* data;
    Long token;  // elements from one token of the walk to the next
    int width;   // elements to read of each
};

// VECTOR neighbouring elements, moved by one instruction.
struct alignas(VECTOR * sizeof(In::Stored)) Pack {
    In::Stored x[VECTOR];
};
struct alignas(VECTOR * sizeof(float)) Floats {
    float x[VECTOR];
};

// One chunk of an operand on its way from memory to shared memory, as it lies in memory: a conversion before delivery
// would wait for the load. COUNT packs a thread, either PER_STEP of each token, or of every PER_PASS-th token one.
template <int WIDTH> struct Parcel {
    static constexpr int ACROSS = WIDTH / VECTOR;  // packs of a token
    static constexpr int COUNT = CHUNK * ACROSS / THREADS;
    static constexpr int PER_STEP = ACROSS > THREADS ? ACROSS / THREADS : 1;
    static constexpr int PER_PASS = ACROSS > THREADS ? 1 : THREADS / ACROSS;
    static_assert(COUNT * THREADS == CHUNK * ACROSS, "every thread carries as much");
    Pack packs[COUNT];
    const In::Stored* next;
    Long pass;
    int left;  // tokens from this thread's next one to the end of the tile; none where the columns end before

    __device__ Parcel(const Rows& rows, int tokens) {
        next = rows.data + step(0) * rows.token + column(0);
        pass = PER_PASS * rows.token;
        left = tokens - step(0);
        if (PER_STEP == 1 && column(0) >= rows.width) left = 0;
        fetch(rows.width);
    }

    static __device__ int step(int i) { return (PER_STEP > 1 ? 0 : threadIdx.x / ACROSS) + i / PER_STEP * PER_PASS; }
    static __device__ int column(int i) { return VECTOR * (threadIdx.x % ACROSS + i % PER_STEP * THREADS); }

    __device__ void fetch(int width) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const bool inside = i / PER_STEP * PER_PASS < left && (PER_STEP == 1 || column(i) < width);
            packs[i] = inside ? *reinterpret_cast<const Pack*>(next + i % PER_STEP * THREADS * VECTOR) : Pack{};
            if (i % PER_STEP == PER_STEP - 1) next += pass;
        }
        left -= CHUNK;
    }

    // factors: (CHUNK,), one a token
    __device__ void deliver(float (*to)[WIDTH], const float* factors, float factor) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) put(to, i, factors[step(i)] * factor);
    }
    __device__ void deliver(float (*to)[WIDTH]) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) put(to, i, 1.f);
    }

    __device__ void put(float (*to)[WIDTH], int i, float factor) const {
        Floats floats;
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) floats.x[e] = In::load(packs[i].x[e]) * factor;
        *reinterpret_cast<Floats*>(&to[step(i)][column(i)]) = floats;
    }
};

struct Stage {
    float a[CHUNK][DK];
    float b[CHUNK][DK];
    float c[CHUNK][BLOCK_COLUMNS];
};

// The part of the state that a thread holds. Rows lie in fours, LANES fours apart, so that the lanes' 16-byte
// reads of b and a fill a row of banks. Lanes of the upper half hold their two fours of columns the other way round,
// which saves the first exchange of sum_over_dk its selections.
struct State {
    float s[HELD][COLUMNS];
    int lane, columns[2];

    __device__ State() {
        lane = threadIdx.x % LANES;
        const int first = threadIdx.x / LANES * COLUMNS, upper = lane >= LANES / 2;
        columns[0] = first + 4 * upper;
        columns[1] = first + 4 * (1 - upper);
    }

    template <typename Function> __device__ void each(Function function) {
#pragma unroll
        for (int i = 0; i < HELD; ++i)
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) s[i][j] = function(s[i][j]);
    }

    // x: (rows, columns); by fours of rows or of columns, whichever are neighbours and whole.
    __device__ void load(const float* x, Long row_step, Long column_step, Long rows, Long columns_left, float factor) {
        if (VECTOR == 4 && column_step == 1) {
#pragma unroll
            for (int j = 0; j < COLUMNS; j += 4) {
                const float* next = x + columns[j / 4] + 4 * lane * row_step;
                const int left = columns[j / 4] < columns_left ? rows : 0;
#pragma unroll
                for (int i = 0; i < HELD; ++i, next += i % 4 ? row_step : (4 * LANES - 3) * row_step) {
                    const Floats four = row(i) < left ? *reinterpret_cast<const Floats*>(next) : Floats{};
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) s[i][(j + e) % COLUMNS] = four.x[e] * factor;
                }
            }
        } else if (VECTOR == 4 && row_step == 1) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const int column = columns[j / 4] + j % 4, left = column < columns_left ? rows : 0;
                const float* next = x + column * column_step + 4 * lane;
#pragma unroll
                for (int i = 0; i < HELD; i += 4, next += 4 * LANES) {
                    const Floats four = row(i) < left ? *reinterpret_cast<const Floats*>(next) : Floats{};
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) s[(i + e) % HELD][j] = four.x[e] * factor;
                }
            }
        } else {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const int column = columns[j / 4] + j % 4, left = column < columns_left ? rows : 0;
                const float* next = x + column * column_step + 4 * lane * row_step;
#pragma unroll
                for (int i = 0; i < HELD; ++i, next += i % 4 ? row_step : (4 * LANES - 3) * row_step)
                    s[i][j] = row(i) < left ? *next * factor : 0.f;
            }
        }
    }
    __device__ int row(int held) const { return 4 * (lane + held / 4 * LANES) + held % 4; }

    // s times 1 + step for a slow decay, times step for a fast one. A factor near 1 is rounded by 3e-8, the same way
    // every time, which adds up to 1e-4 over a tile; 1 minus the factor, inside an fma, is not.
    __device__ void decay(bool slow, float step) {
        if (slow) {
            each([=](float x) { return fmaf(x, step, x); });
        } else {
            each([=](float x) { return x * step; });
        }
    }

    __device__ void load_columns(float (&c)[COLUMNS], const float* row) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 four = *reinterpret_cast<const float4*>(row + columns[half]);
            c[4 * half] = four.x, c[4 * half + 1] = four.y, c[4 * half + 2] = four.z, c[4 * half + 3] = four.w;
        }
    }
    __device__ void load_dk(float (&b)[4], const float* row, int four) const {
        const float4 x = *reinterpret_cast<const float4*>(row + 4 * (lane + four * LANES));
        b[0] = x.x, b[1] = x.y, b[2] = x.z, b[3] = x.w;
    }
};

// A select, never a branch: for a ternary the compiler splits the warp around the shuffles.
__device__ float pick(int condition, float yes, float no) {
#ifdef __CUDACC__
    float x;
    asm("{ .reg .pred p; setp.ne.s32 p, %3, 0; selp.f32 %0, %1, %2, p; }" : "=f"(x) : "f"(yes), "f"(no), "r"(condition));
    return x;
#else  // tests/emulated_cuda.h
    return condition ? yes : no;
#endif
}

// Sums COLUMNS partial sums over LANES lanes; lane `l` gets the total of the column that `owned_column` names.
__device__ float sum_over_dk(float (&o)[COLUMNS], int lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j) o[j] += __shfl_xor_sync(EVERYONE, o[j + 4], LANES / 2);
    const int second = lane & (LANES / 4), third = lane & (LANES / 8);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const float kept = pick(second, o[j + 2], o[j]), sent = pick(second, o[j], o[j + 2]);
        o[j] = kept + __shfl_xor_sync(EVERYONE, sent, LANES / 4);
    }
    float total = pick(third, o[1], o[0]) + __shfl_xor_sync(EVERYONE, pick(third, o[0], o[1]), LANES / 8);
    if (LANES == 16) total += __shfl_xor_sync(EVERYONE, total, 1);
    return total;
}

__device__ int owned_column(int lane) {
    return threadIdx.x / LANES * COLUMNS + 4 * ((lane & (LANES / 2)) != 0) + 2 * ((lane & (LANES / 4)) != 0) +
           ((lane & (LANES / 8)) != 0);
}

// A tile's place: which batch entry, head and tokens. table: (tiles, 2) first token and length, or null for a regular grid.
struct Place {
    Long batch, head, tile, start;
    int tokens, column;

    __device__ Place(const Long* table, Long heads, Long tiles, Long size, Long all_tokens) {
        const Long block = blockIdx.x;
        tile = block % tiles, head = block / tiles % heads, batch = block / tiles / heads;
        start = table ? table[2 * tile] : tile * size;
        const Long length = table ? table[2 * tile + 1] : min(all_tokens - start, size);
        tokens = static_cast<int>(length);
        column = blockIdx.y * BLOCK_COLUMNS;
    }
    __device__ Rows rows(
        const In::Stored* x, Long x_batch, Long x_head, Long x_token, Long share, int first, Long width, bool reverse
    ) const {
        const Long offset = reverse ? (start + tokens - 1) * -x_token : start * x_token;
        x += batch * x_batch + head / share * x_head + offset + first;
        return {x, x_token, static_cast<int>(width - first)};
    }
};

// gamma^exponent, rounded once; exponents of either sign, small.
__device__ float power(float log_decay, int exponent) {
    return static_cast<float>(exp(static_cast<double>(log_decay) * exponent));
}

// out_i = scale * sum_{j<=i} gamma^(i-j) (a_i . b_j) c_j + state_scale * w_i a_i . state, with w_i = gamma^(i+1); for
// reverse, j >= i and w_i = gamma^(n-1-i), and the strides *_token are negative: from one token of the walk to the next.
extern "C" __global__ void __launch_bounds__(THREADS, 8 / WARPS) tile_outputs(
    const In::Stored* a, Long a_batch, Long a_head, Long a_token, Long a_share,
    const In::Stored* b, Long b_batch, Long b_head, Long b_token, Long b_share,
    const In::Stored* c, Long c_batch, Long c_head, Long c_token, Long c_share,
    const float* states, Long state_batch, Long state_head, Long state_tile, Long state_row, Long state_column,
    Out::Stored* out, Long out_batch, Long out_head, Long out_token, const float* log_decay, const Long* table,
    Long heads, Long tiles, Long size, Long all_tokens, Long dk, Long columns, Long reverse,
    float scale, float state_scale
) {
    __shared__ __align__(16) Stage stages[2];
    __shared__ float up[GROUP], down[GROUP];
    const Place place(table, heads, tiles, size, all_tokens);
    const float given = log_decay[place.head];
    const float g = given < -1e4f ? -1e4f : given;  // of -inf, which means the same, gamma^0 would be NaN; NaN stays
    // Tokens between two decays of the state: see the head of this file.
    const auto fits = [=](int steps) { return g * (1 - steps) < 14.f; };
    const int steps = BY_TOKEN ? 1 : fits(GROUP) ? GROUP : fits(CHUNK) ? CHUNK : 1;
    if (threadIdx.x < GROUP) {
        const int t = threadIdx.x % steps;
        up[threadIdx.x] = power(g, -t);
        down[threadIdx.x] = power(g, t);
    }
    const bool slow = g * steps > -0.7f;
    const float decay = slow ? static_cast<float>(expm1(static_cast<double>(g) * steps)) : power(g, steps);
    const Rows a_rows = place.rows(a, a_batch, a_head, a_token, a_share, 0, dk, reverse != 0);
    const Rows b_rows = place.rows(b, b_batch, b_head, b_token, b_share, 0, dk, reverse != 0);
    const Rows c_rows = place.rows(c, c_batch, c_head, c_token, c_share, place.column, columns, reverse != 0);
    const int tokens = place.tokens;

    State state;
    states += place.batch * state_batch + place.head * state_head + place.tile * state_tile;
    const float factor = state_scale * (reverse ? 1.f : power(g, 1));
    states += place.column * state_column;
    state.load(states, state_row, state_column, dk, columns - place.column, factor);

    const int column = place.column + owned_column(state.lane);
    const bool writes = column < columns && (LANES == 8 || state.lane % 2 == 0);
    const Long first = reverse ? (place.start + tokens - 1) * -out_token : place.start * out_token;
    out += place.batch * out_batch + place.head * out_head + first + column;

    Parcel<DK> a_next(a_rows, tokens), b_next(b_rows, tokens);
    Parcel<BLOCK_COLUMNS> c_next(c_rows, tokens);
    __syncthreads();
    for (int chunk = 0; chunk * CHUNK < tokens; ++chunk) {
        Stage& stage = stages[chunk % 2];
        a_next.deliver(stage.a);
        b_next.deliver(stage.b);
        const int phase = chunk * CHUNK % GROUP;
        c_next.deliver(stage.c, up + phase, scale);
        __syncthreads();
        a_next.fetch(a_rows.width);
        b_next.fetch(b_rows.width);
        c_next.fetch(c_rows.width);
        const auto token = [&](int t) {
            float o[COLUMNS] = {}, c_t[COLUMNS];
            state.load_columns(c_t, stage.c[t]);
#pragma unroll
            for (int four = 0; four < HELD / 4; ++four) {
                float a_t[4], b_t[4];
                state.load_dk(b_t, stage.b[t], four);
                state.load_dk(a_t, stage.a[t], four);
                float(*const s)[COLUMNS] = &state.s[4 * four];
                // To and fro, the outputs on the way back: of 80 orders, that for which ptxas finds registers with the
                // fewest conflicts between banks. Two such orders took 7.15 ms where the plain one takes 7.38.
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int step = 0; step < COLUMNS; ++step) {
                        const int j = i % 2 ? COLUMNS - 1 - step : step;
                        s[i][j] = fmaf(b_t[i], c_t[j], s[i][j]);
                    }
#pragma unroll
                for (int i = 3; i >= 0; --i)
#pragma unroll
                    for (int step = 0; step < COLUMNS; ++step) {
                        const int j = i % 2 ? step : COLUMNS - 1 - step;
                        o[j] = fmaf(a_t[i], s[i][j], o[j]);
                    }
            }
            const float total = sum_over_dk(o, state.lane) * down[phase + t];
            if (writes && chunk * CHUNK + t < tokens) *out = Out::store(total);
            out += out_token;
        };
        if constexpr (BY_TOKEN) {
#pragma unroll UNROLL
            for (int t = 0; t < CHUNK; ++t) {
                token(t);
                state.decay(slow, decay);
            }
        } else {
            for (int t = 0; t < CHUNK;) {
                const int end = min(t + steps, CHUNK);
#pragma unroll UNROLL
                for (; t < end; ++t) token(t);
                if ((phase + end) % steps == 0) state.decay(slow, decay);
            }
        }
    }
}
