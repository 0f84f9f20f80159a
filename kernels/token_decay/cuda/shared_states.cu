// tile_states.cu for heads that share b, four to a block (-DGROUPS=4): each has a warpgroup, 64 columns and its own
// decays, and b is fetched once for all of them. They do not meet: the last warp that has read a chunk fetches another
// one to its place. Four warpgroups to a multiprocessor, where tile_states.cu has two, fill each other's waits; products
// and their order are the same, so the bits are too. A tile's number counts fours.

#include "../../constant_decay/cuda/hopper_tile.cuh"

static_assert(PARTS == 1 && !LAST_FETCHES);
constexpr int FETCHES = WEIGHTED ? 1 : GROUPS;  // at a time: for more, weighted, there are no registers
constexpr int STAGES = 4, STAGE = ROWS_BYTES + GROUPS * COLUMNS_BYTES;

extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, 1)
shared_states(OPERAND(b), OPERAND(c), float* out, TILES, Offset unread, float scale) {
    Tile tile(TILE);
    if (tile.number == unread) return;
    const int first_head = GROUPS * tile.head, group = __shfl_sync(0xffffffffu, group_number(), 0);
    Weights weights;
    int most = 0, own = 0;
    for (int head = 0; head < GROUPS; head++) {
        tile.head = first_head + head;
        weights.start(tile, log_decay TOKENS_);
        weights.leave_out(tile);
        most = max(most, tile.chunks), own = head == group ? tile.chunks : own;
    }
    tile.chunks = most;
    const Word base = shared_memory(), slots = base + STAGES * STAGE, all_weights = slots + STAGES * GROUPS * SLOT;
    const Word arrivals = all_weights + GROUPS * Weights::BYTES, counters = arrivals + STAGES * 8;
    tile.head = first_head + group;
    weights.place(all_weights + group * Weights::BYTES, tile, log_decay TOKENS_);
    auto slot = [&](int step, int head) { return slots + (step % STAGES * GROUPS + head) * SLOT; };
    auto fetch_chunk = [&](int step) {
        if (step >= tile.chunks) return;
        const Word to = base + step % STAGES * STAGE, arrival = arrivals + step % STAGES * 8;
        const int first = tile.first(step), count = tile.count(step);
        auto others = [&](int head) {
            Weights moved = weights;
            moved.move(0, (head - group) * decay_head);
            return moved;
        };
        int bytes = STAGE;
#pragma unroll FETCHES
        for (int head = 0; head < GROUPS; head++) bytes += others(head).bytes(count);
        expect(arrival, bytes);
        fetch<ROWS>(to, b, tile.chunk(step, b_share), arrival);
#pragma unroll FETCHES
        for (int head = 0; head < GROUPS; head++) {
            tile.head = first_head + head;
            fetch<COLUMNS>(to + ROWS_BYTES + head * COLUMNS_BYTES, c, tile.chunk(step, c_share), arrival);
            others(head).fetch(slot(step, head), first, count, arrival);
        }
    };
    if (threadIdx.x == 0)
        for (int stage = 0; stage < STAGES; stage++)
            init_arrival(arrivals + stage * 8), store(counters + stage * 4, Word(0));
    publish();
    __syncthreads();
    if (threadIdx.x == 0)
        for (int step = 0; step < STAGES; step++) fetch_chunk(step);

    float state[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) state[i] = 0.0f;
    const int skip = most - own;  // steps of the walk that this head leaves out
    for (int step = 0; step < tile.chunks; step++) {
        const Word b_i = base + step % STAGES * STAGE, c_i = b_i + ROWS_BYTES + group * COLUMNS_BYTES;
        const int count = tile.count(step);
        wait_arrival(arrivals + step % STAGES * 8, step / STAGES & 1);
        if (count < CHUNK) {  // all write the same zeros to b
            zero_rows<ROWS>(b_i, count), zero_rows<COLUMNS>(c_i, count);
            if (WEIGHTED) zero_numbers(weights.weights(slot(step, group)), count);
            publish();
            meet();
        }
        wait_products<0>();  // for ptxas, which does not see that none is under way
        float faded;
        weights.read(slot(step, group), count, faded);
        if (step == skip)  // what is older decays to nothing, or was no number
#pragma unroll
            for (int i = 0; i < HELD; i++) state[i] = 0.0f;
        Word x[4][4];
        load_left(c_i + place_transposed(), x);
        if (WEIGHTED) weigh(x, weights.weights(slot(step, group)));
        Weighted weighted;
        weighted.set(x, weights.pairs);
        fade(state, faded);
        advance(state, weighted, b_i);
        wait_products<0>();
        here(state), here(weighted);
        if (is_last(counters + step % STAGES * 4)) fetch_chunk(step + STAGES);
    }

    const int lane = threadIdx.x % 32, warp = thread_number() / 32;
    const Offset four = tile.program / int(tiles);
    out += ((GROUPS * four + group) * tiles + tile.number) * ROWS * COLUMNS;
    out += 2 * (lane % 4) * COLUMNS + 16 * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        out[(8 * (i / 4) + i % 2) * COLUMNS + i / 2 % 2 * 8] = scale * state[i];
}
