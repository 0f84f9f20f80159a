// Pieces of a row, each of q, k and v wherever it is, as kernels with -DPIECES=1 walk them (hopper_tile.cuh): of each chunk
// its token in the piece, and how far the piece is from where the operand's map begins, in the map's units. Chunks that
// lie in several pieces are copied `beside` them, where others of the same strides have `slots` chunks each.
//
// Blocks of x < count copy the chunk that piece x ends in, 16 bytes at a time, if no piece before it does; the last
// ones write `chunks`, (batch, chunks, 4). Compile with -DHALF=0 -DGROUPS=1 -DMOST=n, the pieces that there may be.

#include "hopper.cuh"
#include "hopper_warp.cuh"

constexpr int VECTOR = 8, ALL = 2 * THREADS;

struct Pieces {
    int begins[MOST + 2];  // and where the last one ends
    int at[3][MOST];       // in the map's units
};

#define OPERAND(x)                                                                                             \
    Offset x##_batch, Offset x##_head, Offset x##_token, Offset x##_heads, Offset x##_size, Bits *x##_base, \
        Offset x##_unit, Offset x##_beside, Offset x##_apart
#define COPY(x, n) copy(n, x##_batch, x##_head, x##_token, x##_size, x##_base, x##_unit, x##_beside, x##_apart)
#define UNITS(x, n) units(n, x##_batch, x##_unit, x##_beside, x##_apart)

extern "C" __global__ void __launch_bounds__(ALL)
pieces(const __grid_constant__ Pieces pieces, Offset count, Offset tokens, Offset slots, int* chunks, OPERAND(q),
       OPERAND(k), OPERAND(v)) {
    const Offset all = q_heads + k_heads + v_heads, batch = blockIdx.y / all, last = (tokens + CHUNK - 1) / CHUNK;
    const int piece = blockIdx.x;
    if (piece == count) {
        if (blockIdx.y % all) return;
        for (int chunk = threadIdx.x; chunk < last; chunk += ALL) {
            const Offset begin = chunk * CHUNK, end = min(begin + CHUNK, tokens);
            int low = 0, high = int(count);  // the last piece that begins before
            while (high - low > 1) {
                const int middle = (low + high) / 2;
                if (pieces.begins[middle] <= begin) low = middle;
                else high = middle;
            }
            const bool several = pieces.begins[low + 1] < end;
            const int row = low / int(slots);
            auto units = [&](int operand, Offset x_batch, Offset unit, Offset beside, Offset apart) {
                return int(several ? beside + row * apart : pieces.at[operand][low]) + int(batch * x_batch / unit);
            };
            int* to = chunks + 4 * (batch * last + chunk);
            to[0] = int(several ? (low - row * slots) * CHUNK : begin - pieces.begins[low]);
            to[1] = UNITS(q, 0), to[2] = UNITS(k, 1), to[3] = UNITS(v, 2);
        }
        return;
    }
    const Offset chunk = pieces.begins[piece + 1] / CHUNK * CHUNK, end = min(chunk + CHUNK, tokens);
    if (pieces.begins[piece] > chunk || pieces.begins[piece + 1] == chunk || pieces.begins[piece + 1] >= end) return;
    Offset head = blockIdx.y % all;
    auto copy = [&](int operand, Offset x_batch, Offset x_head, Offset x_token, Offset size, Bits* base,
                    Offset unit, Offset beside, Offset apart) {
        const int vectors = int(size) / VECTOR, all_vectors = int(end - chunk) * vectors;
        base += batch * x_batch + head * x_head;
        Bits* to = base + (beside + piece / int(slots) * apart) * unit + piece % int(slots) * CHUNK * x_token;
        int from = piece;
        for (int i = threadIdx.x; i < all_vectors; i += ALL) {
            const int row = i / vectors, column = i % vectors * VECTOR;
            while (pieces.begins[from + 1] <= chunk + row) from++;
            const Bits* piece_ = base + pieces.at[operand][from] * unit;
            copy_vector(to + row * x_token + column, piece_ + (chunk + row - pieces.begins[from]) * x_token + column);
        }
    };
    if (head < q_heads) return COPY(q, 0);
    head -= q_heads;
    if (head < k_heads) return COPY(k, 1);
    head -= k_heads;
    COPY(v, 2);
}
