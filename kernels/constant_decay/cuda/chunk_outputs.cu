// tile_outputs.cu's outputs of tiles that are one chunk, or less of one, and begin from a state of zero:
//
//     P = (a b^T) * decay      o^T = c^T P^T
//
// with the bits that tile_outputs.cu has, whose other products are of zeros there. Nothing is kept from tile to tile, so a
// block walks many, one after the other, and fetches the next one's chunk meanwhile: packed documents of a few tokens are
// as many tiles. It has all columns of a head: there is no state to hold. Sums over a tile's tokens take as many steps of
// 16 as it has.
//
// What is not finite in b or c shows in the outputs: a masked score of 0 times it is NaN. Then the block makes this tile's
// outputs again, as tile_outputs.cu's second kernel does (hopper_lost.cuh; compile with -DAGAIN=1, for that).

#include "hopper_tile.cuh"
#include "hopper_lost.cuh"

constexpr int STAGE = 2 * ROWS_BYTES + COLUMNS_BYTES, STEPS = ROWS / 16;
constexpr int BLOCKS = ROWS + COLUMNS <= 128 ? 3 : ROWS + COLUMNS <= 256 ? 2 : 1;  // of a multiprocessor
static_assert(GROUPS == 1 && AGAIN, "one warpgroup, which walks a tile again itself");
#if WIDE
typedef float Out;
#else
typedef Bits Out;
#endif

// Zero the rows of a chunk from `count` to the end of 16.
template <int WIDTH> __device__ __forceinline__ void zero_last(Word chunk, int count) {
    const Word zeros[4] = {};
    for (int i = thread_number(); i < (-count & 15) * 8; i += THREADS)
#pragma unroll
        for (int block = 0; block < WIDTH / 64; block++) store(chunk + block * BLOCK + count * 128 + i * 16, zeros);
}

// programs: tiles of all heads; of which each block has as many consecutive ones.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
chunk_outputs(OPERAND(a), OPERAND(b), OPERAND(c), const __grid_constant__ Map o, Out* out, Offset out_batch,
              Offset out_head, Offset out_token, TILES, float scale, Offset programs, Offset blocks) {
    const int thread = thread_number(), lane = thread % 32, warp = thread / 32;
    const int begin = int(programs * blockIdx.x / blocks), end = int(programs * (blockIdx.x + 1) / blocks);
    const Word base = shared_memory(), seen = base + 2 * STAGE, slots = seen + BLOCK, own = slots + 2 * SLOT;
    const Word all_lost = own + Tables::BYTES, arrivals = all_lost + Lost::BYTES, found = arrivals + 16;
    const Lost lost(all_lost);
    auto tile_of = [&](int program) { return Tile(unsigned(min(program, end - 1)), TILE); };
    auto fetch_tile = [&](const Tile& tile, int program) {
        if (program >= end) return;
        const Word to = base + program % 2 * STAGE, arrival = arrivals + program % 2 * 8;
        Tables tables;
        tables.start(tile, log_decay TOKENS_);
        expect(arrival, STAGE + tables.bytes(tile.length));
        fetch<STORED_ROWS>(to, a, tile.chunk(0, a_share), arrival);
        fetch<STORED_ROWS>(to + ROWS_BYTES, b, tile.chunk(0, b_share), arrival);
        fetch<COLUMNS>(to + 2 * ROWS_BYTES, c, tile.chunk(0, c_share), arrival);
        tables.fetch(slots + program % 2 * SLOT, 0, tile.length, arrival);
    };
    if (thread == 0) {
        init_arrival(arrivals), init_arrival(arrivals + 8);
        store(found, Word(0));
    }
    publish();
    __syncthreads();
    Tile tile = tile_of(begin), next = tile_of(begin + 1);
    if (thread == 0) fetch_tile(tile, begin), fetch_tile(next, begin + 1);

    int head = -1;
    for (int program = begin; program < end; program++) {
        const int stage = program % 2, count = tile.length;
        const Word a_i = base + stage * STAGE, b_i = a_i + ROWS_BYTES, c_i = b_i + ROWS_BYTES;
        const Tile after = tile_of(program + 2);  // is on its way while this one is computed
        Tables tables;
        tables.place(own, tile, log_decay TOKENS_);
        tables.start(tile, log_decay TOKENS_);
        if (SLOT || tile.head != head) tables.set(scale, 1.0f, 1.0f);  // a decay a token leaves nothing from tile to tile
        head = tile.head;
        wait_arrival(arrivals + stage * 8, (program - begin) / 2 & 1);
        zero_last<STORED_ROWS>(b_i, count), zero_last<COLUMNS>(c_i, count);
        publish();
        meet();
        float faded = tables.faded(count);
        tables.read(slots + stage * SLOT, count, faded);

        float o_i[PARTS][32];
        auto compute = [&] {
            float scores[32];
            Word x[PARTS][4][4];
            begin_products();
#pragma unroll
            for (int i = 0; i < STEPS; i++)
                product(scores, by_rows(a_i) + along_rows(i), by_rows(b_i) + along_rows(i), i);
            end_products();
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                load_left(c_i + part * BLOCK + place_transposed(), x[part]);
#pragma unroll
                for (int i = 0; i < 32; i++) o_i[part][i] = 0.0f;
            }
            wait_products<0>();
            here(scores);
            tables.decay(scores, seen);
            publish();
            meet();
#pragma unroll
            for (int part = 0; part < PARTS; part++) here(o_i[part]), here(x[part]);
            begin_products();
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (16 * i < count) product(o_i[part], x[part][i], by_rows(seen) + along_rows(i), 1);
            end_products();
            wait_products<0>();
#pragma unroll
            for (int part = 0; part < PARTS; part++) here(o_i[part]), here(x[part]);
        };
        compute();
        float zero = 0.0f;
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int i = 0; i < 32; i++)
                if (i / 4 * 8 + 2 * (lane % 4) + i % 2 < count) zero = fmaf(o_i[part][i], 0.0f, zero);
        if (zero != 0.0f) store(found, Word(1));
        meet();
        if (load_word(found)) {
            float none[PARTS][HELD] = {};
            lost.start(none);
            lost.find<STORED_ROWS, false>(b_i, 0, count, false), lost.find<COLUMNS, true>(c_i, 0, count, false);
            meet();
            if (thread == 0) store(found, Word(0));
            lost.find<STORED_ROWS, false>(b_i, 0, count, true), lost.find<COLUMNS, true>(c_i, 0, count, true);
            publish();
            meet();
            compute();
#pragma unroll
            for (int part = 0; part < PARTS; part++) lost.mark(o_i[part], 0, part);
        }

        Out* to = out + tile.batch * out_batch + tile.head * out_head + tile.start * out_token;
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int i = 0; i < 32; i += 8) {  // 16 tokens
                if (WIDE) {
                    const int column = 64 * part + 16 * warp + lane / 4;
#pragma unroll
                    for (int j = i; j < i + 8; j++) {
                        const int token = j / 4 * 8 + 2 * (lane % 4) + j % 2;
                        if (token < count && has_column(64 * part + 16 * warp + j / 2 % 2 * 8))
                            to[token * out_token + column + j / 2 % 2 * 8] = Out(o_i[part][j]);
                    }
                } else {  // a warp writes where it alone has read
                    Word y[4];
#pragma unroll
                    for (int j = 0; j < 4; j++) y[j] = pack(o_i[part][i + 2 * j], o_i[part][i + 2 * j + 1]);
                    store_transposed(c_i + part * BLOCK + place_transposed() + i / 8 * 16 * 128, y);
                }
            }
        publish();
        meet();
        if (!WIDE && count == CHUNK) {
            if (thread == 0) write<COLUMNS>(o, tile.chunk(0, 1), c_i), wait_writes();
        } else if (!WIDE) {
            write_rows<COLUMNS>(reinterpret_cast<Bits*>(to), out_token, c_i, count, 0);
            meet();
        }
        tile = next, next = after;
        if (thread == 0) fetch_tile(next, program + 2);
    }
}
