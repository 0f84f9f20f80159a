// tile_states.cu for heads that share b, four to a block (-DGROUPS=4): each has a warpgroup, 64 columns and its own
// decays, and b is fetched once for all of them. They do not meet: a head's last warp that has read a chunk fetches
// another one to its place, and the last head's also b. Four warpgroups to a multiprocessor, where tile_states.cu has two, fill each other's waits; products
// and their order are the same, so the bits are too. A tile's number counts fours.

#include "../../constant_decay/cuda/hopper_tile.cuh"

static_assert(PARTS == 1 && !LAST_FETCHES);
constexpr int STAGES = 4, STAGE = ROWS_BYTES + GROUPS * COLUMNS_BYTES;

extern "C" __global__ void __launch_bounds__(GROUPS * THREADS, 1)
shared_states(OPERAND(b), OPERAND(c), float* out, TILES, Offset unread, float scale) {
    Tile tile(TILE);
    if (tile.number == unread) return;
    const int first_head = GROUPS * tile.head, group = __shfl_sync(0xffffffffu, group_number(), 0);
    Weights weights;
    int most = 0, mine = 0;
    for (int head = 0; head < GROUPS; head++) {
        tile.head = first_head + head;
        weights.start(tile, log_decay TOKENS_);
        weights.leave_out(tile);
        most = max(most, tile.chunks), mine = head == group ? tile.chunks : mine;
    }
    tile.chunks = most;
    const Word base = shared_memory(), slots = base + STAGES * STAGE, all_weights = slots + STAGES * GROUPS * SLOT;
    const Word arrivals = all_weights + GROUPS * Weights::BYTES, counters = arrivals + STAGES * 8;
    const Word head_b = counters + STAGES * (GROUPS + 1) * 4;
    tile.head = first_head + group;
    weights.place(all_weights + group * Weights::BYTES, tile, log_decay TOKENS_);
    auto slot = [&](int step, int head) { return slots + (step % STAGES * GROUPS + head) * SLOT; };
    auto counter = [&](int step, int of) { return counters + (step % STAGES * (GROUPS + 1) + of) * 4; };
    auto fetch_chunk = [&](int step) {  // by the last of a head's warps
        const Word to = base + step % STAGES * STAGE, arrival = arrivals + step % STAGES * 8;
        if (step >= tile.chunks) return;
        const int count = tile.count(step), own = thread_anew() / THREADS;
        expect(arrival, COLUMNS_BYTES + weights.bytes(count));
        const Place place = tile.chunk_of(step, head_of(first_head + own, c_share));
        fetch<COLUMNS>(to + ROWS_BYTES + own * COLUMNS_BYTES, c, place, arrival);
        weights.fetch(slot(step, own), tile.first(step), count, arrival);
        if (!is_last_of(GROUPS, counter(step, GROUPS))) return;
        expect(arrival, ROWS_BYTES);
        fetch<ROWS>(to, b, tile.chunk_of(step, load_word(head_b)), arrival);
    };
    if (threadIdx.x == 0) {
        store(head_b, Word(head_of(first_head, b_share)));
        for (int stage = 0; stage < STAGES; stage++) {
            init_arrival(arrivals + stage * 8, GROUPS + 1);
            for (int of = 0; of <= GROUPS; of++) store(counter(stage, of), Word(0));
        }
    }
    publish();
    __syncthreads();
    if (thread_number() == 0)
        for (int step = 0; step < STAGES; step++) fetch_chunk(step);

    float state[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) state[i] = 0.0f;
    const int skip = most - mine;  // steps of the walk that this head leaves out
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
        if (is_last(counter(step, thread_anew() / THREADS), WARPS)) fetch_chunk(step + STAGES);
    }

    const int lane = threadIdx.x % 32, warp = thread_number() / 32;
    const Offset four = tile.program / int(tiles);
    out += ((GROUPS * four + group) * tiles + tile.number) * ROWS * COLUMNS;
    out += 2 * (lane % 4) * COLUMNS + 16 * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        out[(8 * (i / 4) + i % 2) * COLUMNS + i / 2 % 2 * 8] = scale * state[i];
}
