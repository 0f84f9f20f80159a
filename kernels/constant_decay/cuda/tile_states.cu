// leetdist.kernels.constant_decay.pytorch.block.tile_states on Hopper: see hopper_tile.cuh.
//
// -DONWARD=1: not from zero, but from what a walk had made of the same tile's tokens before `place`, a multiple of CHUNK
// (places: one a batch entry). Blocks of y = 0 move on `out`, the state that outputs start from, and those of y = 1 `own`,
// the tile's own sum, which leaves out what is forgotten at the end of a tile of `whole` tokens. total: what the decays
// before sum up to, NaN if they did not. passed: with -DPASSES=1, what `out` is before every so many chunks, `marks` times;
// transposed, as addresses of numbers that lie so are known without registers.

#include "hopper_tile.cuh"

constexpr int STAGES = !LAST_FETCHES ? 3 : GROUPS == 1 ? 2 : 4;
constexpr int STAGE = ROWS_BYTES + GROUPS * COLUMNS_BYTES;
// Whether the next copy to a chunk's place starts while the products of the chunk behind it run.
// (Of a decay a token, there are too few registers where one thread starts it.)
constexpr bool LATER = STAGES > 2 && (LAST_FETCHES || !TOKEN);

#ifndef ONWARD
#define ONWARD 0
#endif
#ifndef PASSES
#define PASSES 0
#endif
#if PASSES
#define PASSED , float *passed, Offset every, Offset marks
#else
#define PASSED
#endif
#if ONWARD
#define FROM , float *own, const Offset *places, Offset place, Offset whole, const double *total PASSED
#else
#define FROM
#endif

extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, GROUPS > 1 ? 1 : 2)
tile_states(OPERAND(b), OPERAND(c), float* out, Offset out_tile, TILES, Offset unread, float scale FROM PIECES_ FIRST_CHUNK(b)
            FIRST_CHUNK(c)) {
    Tile tile(TILE);
    if (tile.number == unread) return;
#if ONWARD
    if (blockIdx.y) out = own;
    else whole = 0;
#endif
    Weights weights;
    weights.start(tile, log_decay TOKENS_);
    if (!ONWARD) weights.leave_out(tile);
    const Word base = shared_memory(), slots = base + STAGES * STAGE, all_weights = slots + STAGES * SLOT;
    weights.place(all_weights + group_number() * Weights::BYTES, tile, log_decay TOKENS_);
    const Word arrivals = all_weights + GROUPS * Weights::BYTES, counters = arrivals + STAGES * 8;
    KEEP_PIECES(counters + STAGES * 4);
    auto fetch_chunk = [&](int step) {
        if (step >= tile.chunks) return;
        const Word to = base + step % STAGES * STAGE, arrival = arrivals + step % STAGES * 8;
        expect(arrival, STAGE + weights.bytes(tile.count(step)));
        const Place of_b = tile.chunk(step, b_share), of_c = tile.chunk(step, c_share, tile.column);
        fetch<STORED_ROWS>(to, FROM_MAP(b, of_b), IN_PIECE(of_b, 1), arrival);
        fetch<GROUPS * COLUMNS>(to + ROWS_BYTES, FROM_MAP(c, of_c), IN_PIECE(of_c, 2), arrival);
        weights.fetch(slots + step % STAGES * SLOT, tile.first(step), tile.count(step), arrival);
    };
    if (threadIdx.x == 0)
        for (int stage = 0; stage < STAGES; stage++) {
            init_arrival(arrivals + stage * 8);
            if (LAST_FETCHES) store(counters + stage * 4, Word(0));
        }
    publish();
    __syncthreads();
    if (threadIdx.x == 0)
        for (int step = 0; step < STAGES - !LAST_FETCHES; step++) fetch_chunk(step);
    weights.set(1.0f, CHUNK);
    if (LAST_FETCHES) meet();

    const int lane = threadIdx.x % 32, warp = thread_number() / 32;
    const int all = STATE_COLUMNS ? STATE_COLUMNS : GROUPS * COLUMNS * int(splits);
    out += tile.program * out_tile + 2 * (lane % 4) * all + tile.own + 16 * warp + lane / 4;
    auto place_of = [&](int part, int i) { return (8 * (i / 4) + i % 2) * all + 64 * part + i / 2 % 2 * 8; };
    auto is_there = [&](int part, int i) {
        return has_row(8 * (i / 4)) && has_column(tile.own + 16 * warp + 64 * part + i / 2 % 2 * 8);
    };
    float state[PARTS][HELD];
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < HELD; i++) state[part][i] = ONWARD && is_there(part, i) ? out[place_of(part, i)] : 0.0f;
#if ONWARD
    if (places) place = places[tile.batch];
    bool numbers = !total || total[tile.program] == total[tile.program];
#endif
    auto pass = [&](int step) {
#if PASSES
        const int mark = unsigned(step) / unsigned(every);
        if (blockIdx.y || mark >= marks || mark * every != step) return;
        float* to = passed + (tile.program * marks + mark) * out_tile + 2 * (lane % 4);
        to += (tile.own + 16 * warp + lane / 4) * STATE_ROWS;
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (is_there(part, i)) to[8 * (i / 4) + i % 2 + (64 * part + i / 2 % 2 * 8) * STATE_ROWS] = state[part][i];
#endif
    };
    bool last = LATER && !LAST_FETCHES && threadIdx.x == 0;  // who starts the next copy
    for (int step = 0; step < tile.chunks; step++) {
        const Word b_i = base + step % STAGES * STAGE, c_i = b_i + ROWS_BYTES + group_number() * COLUMNS_BYTES;
        const int count = tile.count(step);
        wait_arrival(arrivals + step % STAGES * 8, step / STAGES & 1);
        if (!LAST_FETCHES || count < CHUNK) meet();  // all have read the chunk before
        if (!LATER && !LAST_FETCHES && threadIdx.x == 0) fetch_chunk(step + STAGES - 1);
        if (count < CHUNK) {  // both warpgroups write the same zeros to b
            zero_rows<STORED_ROWS>(b_i, count), zero_rows<COLUMNS>(c_i, count);
            weights.set(1.0f, count);
            publish();
            meet();
        }
        wait_products<0>();  // for ptxas, which does not see that none is under way
        pass(step);
        float faded = weights.faded(count);
        weights.read(slots + step % STAGES * SLOT, count, faded);
#if ONWARD
        numbers = numbers && faded == faded;
        if (whole && numbers && weights.begins(int(whole), int(place) + tile.first(step), faded)) {
#pragma unroll
            for (int part = 0; part < PARTS; part++)
#pragma unroll
                for (int i = 0; i < HELD; i++) state[part][i] = 0.0f;
        }
#endif
        Weighted weighted[PARTS];
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            Word x[4][4];
            load_left(c_i + part * BLOCK + place_transposed(), x);
            weighted[part].set(x, weights.pairs);
            fade(state[part], faded);
            advance(state[part], weighted[part], b_i);
        }
        if (LATER && last) fetch_chunk(step - 1 + STAGES);
        wait_products<0>();
#pragma unroll
        for (int part = 0; part < PARTS; part++) here(state[part]), here(weighted[part]);
        if (LAST_FETCHES) last = is_last(counters + step % STAGES * 4);
        if (!LATER && last) fetch_chunk(step + STAGES);
    }

    pass(tile.chunks);
#pragma unroll
    for (int part = 0; part < PARTS; part++)
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (is_there(part, i)) out[place_of(part, i)] = scale * state[part][i];
}
