// A piece of a stream behind the tokens of its open chunk, each of q, k and v as one block of memory (open_chunk.py's
// open_piece), and of k and v what the next open chunk keeps, from token `full` on.
//
// A block copies up to CHUNK tokens of one head, 16 bytes at a time. Laid out: (batch, heads, CHUNK + tokens, size); kept:
// (batch, heads, CHUNK, size). Of q nobody reads the rows of earlier tokens. Compile with -DHALF=0 -DGROUPS=1.

#include "hopper.cuh"
#include "hopper_warp.cuh"

constexpr int VECTOR = 8;  // numbers

#define OPERAND(x)                                                                                              \
    const Bits *x, Offset x##_batch, Offset x##_head, Offset x##_token, Offset x##_heads, Offset x##_size, Bits *x##_laid, \
        const Bits *x##_before, Bits *x##_after
#define COPY(x) copy(x, x##_batch, x##_head, x##_token, x##_heads, x##_size, x##_laid, x##_before, x##_after)

extern "C" __global__ void __launch_bounds__(2 * THREADS)
open_rows(OPERAND(q), OPERAND(k), OPERAND(v), Offset tokens, Offset before, Offset full) {
    const Offset all = q_heads + k_heads + v_heads, batch = blockIdx.x / all;
    Offset head = blockIdx.x % all;
    auto copy = [&](const Bits* x, Offset x_batch, Offset x_head, Offset x_token, Offset heads, Offset size, Bits* laid,
                    const Bits* earlier, Bits* later) {
        const int vectors = int(size) / VECTOR;
        const Offset place = batch * heads + head;
        x += batch * x_batch + head * x_head;
        for (int i = threadIdx.x; i < CHUNK * vectors; i += 2 * THREADS) {
            const Offset row = blockIdx.y * Offset(CHUNK) + i / vectors, column = i % vectors * VECTOR;
            if (row >= before + tokens || (row < before && !earlier)) continue;
            const Bits* from = row < before ? earlier + (place * CHUNK + row) * size : x + (row - before) * x_token;
            copy_vector(laid + (place * (CHUNK + tokens) + row) * size + column, from + column);
            if (later && row >= full) copy_vector(later + (place * CHUNK + row - full) * size + column, from + column);
        }
    };
    if (head < q_heads) return COPY(q);
    head -= q_heads;
    if (head < k_heads) return COPY(k);
    head -= k_heads;
    COPY(v);
}
