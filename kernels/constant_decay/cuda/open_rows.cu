// The open chunk of a stream with what a piece adds to it (open_chunk.py's open_piece), of each of q, k and v; and of k and
// v what the next open chunk keeps, from token `full` on.
//
// A block looks at CHUNK tokens of one head, and copies 16 bytes at a time. Laid out and kept: (batch, heads, CHUNK, size).
// Of q nobody reads the rows of earlier tokens. Compile with -DHALF=0 -DGROUPS=1, and with -DTOKEN=1 for a decay a token:
// then the log-decays of all tokens are laid out, (batch, heads, CHUNK + tokens), and what they sum up to in the tile, up to
// token `full`.

#include "hopper.cuh"
#include "hopper_warp.cuh"

constexpr int VECTOR = 8, ALL = 2 * THREADS;

#define OPERAND(x)                                                                                              \
    const Bits *x, Offset x##_batch, Offset x##_head, Offset x##_token, Offset x##_heads, Offset x##_size, Bits *x##_laid, \
        const Bits *x##_before, Bits *x##_after
#define COPY(x) copy(x, x##_batch, x##_head, x##_token, x##_heads, x##_size, x##_laid, x##_before, x##_after)
#if TOKEN
#define DECAYS , const float *g, Offset g_batch, Offset g_head, Offset g_token, Offset g_heads, float *g_laid, \
                 const float *g_before, float *g_after, const double *total, double *total_after
#else
#define DECAYS
constexpr int g_heads = 0;
#endif

extern "C" __global__ void __launch_bounds__(ALL)
open_rows(OPERAND(q), OPERAND(k), OPERAND(v), Offset tokens, Offset before, Offset full DECAYS) {
    const Offset all = q_heads + k_heads + v_heads + g_heads, batch = blockIdx.x / all;
    Offset head = blockIdx.x % all;
    auto copy = [&](const Bits* x, Offset x_batch, Offset x_head, Offset x_token, Offset heads, Offset size, Bits* laid,
                    const Bits* earlier, Bits* later) {
        const int vectors = int(size) / VECTOR;
        const Offset place = batch * heads + head;
        x += batch * x_batch + head * x_head;
        for (int i = threadIdx.x; i < CHUNK * vectors; i += ALL) {
            const Offset row = blockIdx.y * Offset(CHUNK) + i / vectors, column = i % vectors * VECTOR;
            if (row >= before + tokens || (row < before && !earlier) || (row >= CHUNK && !(later && row >= full))) continue;
            const Bits* from = row < before ? earlier + (place * CHUNK + row) * size : x + (row - before) * x_token;
            if (row < CHUNK) copy_vector(laid + (place * CHUNK + row) * size + column, from + column);
            if (later && row >= full) copy_vector(later + (place * CHUNK + row - full) * size + column, from + column);
        }
    };
    if (head < q_heads) return COPY(q);
    head -= q_heads;
    if (head < k_heads) return COPY(k);
    head -= k_heads;
    if (head < v_heads) return COPY(v);
#if TOKEN
    head -= v_heads;
    const Offset place = batch * g_heads + head;
    g += batch * g_batch + head * g_head;
    auto decay = [&](Offset row) {
        return row < before ? g_before[place * CHUNK + row] : g[(row - before) * g_token];
    };
    const Offset own = blockIdx.y * Offset(CHUNK) + threadIdx.x;
    if (threadIdx.x < CHUNK && own < before + tokens) {
        const float x = g_laid[place * (CHUNK + tokens) + own] = decay(own);
        if (own >= full) g_after[place * CHUNK + own - full] = x;
    }
    if (blockIdx.y) return;
    // As kernels/token_decay/triton/open_chunk.py's `counted`: in units, so that no order matters.
    constexpr double UNITS = 17592186044416.0;  // 2^44
    __shared__ Offset sums[ALL];
    __shared__ int wrong[ALL];
    Offset sum = 0;
    int bad = 0;
    for (Offset row = threadIdx.x; row < full; row += ALL) {
        const float x = decay(row);
        bad |= !(x <= 0.0f);
        sum += Offset(double(x < -128.0f ? -128.0f : x <= 0.0f ? x : 0.0f) * UNITS);
    }
    for (int left = ALL; left; left /= 2) {
        if (threadIdx.x < left) sums[threadIdx.x] = sum, wrong[threadIdx.x] = bad;
        __syncthreads();
        if (threadIdx.x < left / 2) sum += sums[threadIdx.x + left / 2], bad |= wrong[threadIdx.x + left / 2];
        __syncthreads();
    }
    if (threadIdx.x == 0) total_after[place] = bad ? double(__int_as_float(0x7fffffff)) : total[place] + double(sum) / UNITS;
#endif
}
