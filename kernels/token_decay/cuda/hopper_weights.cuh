// The weights of a decay a token, made by each warp for itself, chunk by chunk, from 64 log-decays: 256 bytes that come
// with the chunk's operands. The names are those of kernels/constant_decay/cuda/hopper_weights.cuh.
//
// Let G_i be the sum of a chunk's log-decays up to token i. A token i sees an earlier token j by exp(G_i - G_j), and long
// sums lose what their difference would tell. So none are subtracted: sums stay in blocks of 8 tokens (4 lanes of a warp,
// two tokens each), where `upto` is what there is from the block's start to a token, inclusive, and `behind` what
// there is from there to its end; and the sums of whole blocks make `earlier` and `later`. Then
//
//     token i from the state at the chunk's start     exp(earlier + upto)      reversed: to the state there
//     token j to the state at the chunk's end         exp(behind + later)      reversed: from the state there
//     token i from token j of the block before        exp(behind_j) exp(upto_i)
//
// with factors for the blocks in between. Only in one and the same block are there differences, of sums of at most 8
// numbers. A sum depends on no token that its result does not see: where a NaN is, all from there on is NaN.

// From the 16 bytes on in which the first of them lies. Weighted, behind that as many of v's weights.
constexpr int SLOT_OF_ONE = CHUNK * 4 + 16, SLOT = SLOT_OF_ONE * (WEIGHTED ? 2 : 1);

// Log-decays to base 2 are bounded, so that sums of them are numbers: NEAR decays to 0 already. NaN stays.
enum { NEAR = -127, FAR = -10000 };
template <int LEAST> __device__ __forceinline__ float bounded(float x) { return x < LEAST ? LEAST : x; }
// NaN if positive.
template <int LEAST> __device__ __forceinline__ float step_of(float log_decay) {
    return log_decay > 0.0f ? __int_as_float(0x7fffffff) : bounded<LEAST>(log_decay * LOG2E);
}
__device__ __forceinline__ float at_most_0(float x) { return x > 0.0f ? 0.0f : x; }

// A lane's two tokens.
struct Sums {
    float upto[2], behind[2], total, earlier, later, all;
    float earlier_half, later_half;  // of the blocks of the same 16 tokens

    __device__ __forceinline__ Sums(float x, float y) {
        constexpr unsigned WARP = 0xffffffffu;
        const int lane = threadIdx.x % 32;
        const float own = x + y, beside = __shfl_xor_sync(WARP, own, 1);
        const float far = __shfl_xor_sync(WARP, own + beside, 2);
        const float before = (lane & 1 ? beside : 0.0f) + (lane & 2 ? far : 0.0f);
        const float after = (lane & 1 ? 0.0f : beside) + (lane & 2 ? 0.0f : far);
        upto[0] = before + x, upto[1] = before + own;
        behind[0] = y + after, behind[1] = after;
        total = all = bounded<NEAR>(own + beside + far);
        earlier = later = 0.0f;
#pragma unroll
        for (int apart = 4; apart < 32; apart *= 2) {
            const float others = __shfl_xor_sync(WARP, all, apart);
            earlier += lane & apart ? others : 0.0f;
            later += lane & apart ? 0.0f : others;
            all += others;
            if (apart == 4) earlier_half = earlier, later_half = later;
        }
    }
};

template <bool OUTPUTS> struct TokenWeights {
    // Pairs, a warp's own; or where all of the warpgroup meet before they are read, each warp makes those of 16 tokens, and
    // what these have from the state. Then a warp's: of columns, and of its 16 rows: their factors, `since` and `toward`.
    static constexpr int PAIRS = CHUNK / 2 * 8, SHARED = OUTPUTS ? PAIRS + CHUNK * 4 : 0;
    static constexpr int OWN = OUTPUTS ? CHUNK * 4 + 3 * 16 * 4 : PAIRS;
    static constexpr int BYTES = SHARED + WARPS * OWN;
    Word pairs, from_state, columns, rows;
    const float* first_decay;  // of the tile
    int shift;                 // in bytes, of the first from the 16 bytes that it lies in
    Long to_weight = 0;        // in bytes, from a token's decay to its weight
    float scale = 1.0f, state_scale = 1.0f, added_scale = 1.0f;

    __device__ __forceinline__ void start(const Tile& tile, const float* log_decay TOKENS) {
        first_decay = log_decay + tile.batch * decay_batch + tile.head * decay_head + tile.start;
        shift = int(Long(first_decay) & 15);
        if (WEIGHTED) to_weight = Long(WEIGHT_OR_NONE) - Long(log_decay);
    }
    __device__ __forceinline__ void place(Word base, const Tile& tile, const float* log_decay TOKENS) {
        start(tile, log_decay TOKENS_);
        columns = base + SHARED + thread_number() / 32 * OWN, rows = columns + CHUNK * 4;
        pairs = OUTPUTS ? base : columns, from_state = pairs + PAIRS;
    }
    // Those of another head, `decays` behind this one's, in a place of their own.
    __device__ __forceinline__ void move(int bytes, Offset decays) {
        pairs += bytes, from_state += bytes, columns += bytes, rows += bytes;
        first_decay += decays, shift = int(Long(first_decay) & 15);
    }
    // Chunks are left out if what is between them and the state decays them to 0 in fp32 (e^-104), and all decays of the
    // tile are numbers. Forward, tokens may also come one by one (open_chunk.cu), and then no sum knows those to come: so
    // one chunk's own decays must leave nothing, or all of them less than 2^-278, which is 0 of any number of fp32. The
    // block's first bytes are not in use yet.
    __device__ __forceinline__ void leave_out(Tile& tile) const {
        constexpr int AT_ONCE = 64;
        constexpr float LEAST = REVERSE ? -104.0f * LOG2E : -278.0f;
        const Word sums = shared_memory();
        const int lane = threadIdx.x % 32;
        float between = 0.0f;
        int chunks = 0;
        for (int from = 0; from < tile.all; from += AT_ONCE) {  // beginning beside the state
#pragma unroll 4
            for (int i = threadIdx.x / 32; i < AT_ONCE; i += WARPS * GROUPS) {
                const int chunk = REVERSE ? from + i : tile.all - 1 - from - i;
                float sum;
                if (REVERSE) {
                    const int token = chunk * CHUNK + lane;
                    sum = (token < tile.length ? step_of<FAR>(first_decay[token]) : 0.0f) +
                          (token + 32 < tile.length ? step_of<FAR>(first_decay[token + 32]) : 0.0f);
#pragma unroll
                    for (int apart = 1; apart < 32; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
                } else {
                    const int token = chunk * CHUNK + 2 * lane;
                    const float x = chunk >= 0 && token < tile.length ? step_of<NEAR>(first_decay[token]) : 0.0f;
                    const float y = chunk >= 0 && token + 1 < tile.length ? step_of<NEAR>(first_decay[token + 1]) : 0.0f;
                    const float all = Sums(x, y).all;
                    sum = exp2_(all) == 0.0f ? FAR : all;
                }
                if (lane == 0) store(sums + i * 4, sum);
            }
            __syncthreads();
            const int end = min(AT_ONCE, tile.all - from);
            for (int i = 0; i < end; i++) {
                if (!(between <= LEAST)) chunks = from + i + 1;
                between += load(sums + i * 4);
            }
            __syncthreads();
        }
        tile.chunks = between == between ? chunks : tile.all;
    }
    // See kernels/constant_decay/cuda/hopper_weights.cuh; not where a decay before is no number.
    __device__ __forceinline__ bool begins(int, int, float faded) const { return faded == 0.0f; }
    // The 16 bytes around a number are always there.
    static __device__ __forceinline__ int bytes_from(int shift, int count) { return (shift + 4 * count + 15) & ~15; }
    __device__ __forceinline__ int weight_shift() const { return shift + int(to_weight) & 15; }
    __device__ __forceinline__ int bytes(int count) const {
        return bytes_from(shift, count) + (WEIGHTED ? bytes_from(weight_shift(), count) : 0);
    }
    __device__ __forceinline__ void fetch(Word slot, int first, int count, Word arrival) const {
        const char* from = reinterpret_cast<const char*>(first_decay + first);
        fetch_bytes(slot, from - shift, bytes_from(shift, count), arrival);
        if (!WEIGHTED) return;
        from += to_weight - weight_shift();
        fetch_bytes(slot + SLOT_OF_ONE, from, bytes_from(weight_shift(), count), arrival);
    }
    // Where v's weights are in a chunk's slot.
    __device__ __forceinline__ Word weights(Word slot) const { return slot + SLOT_OF_ONE + weight_shift(); }
    __device__ __forceinline__ void set(float, int) const {}
    __device__ __forceinline__ float faded(int) const { return 0.0f; }  // not known before it is read

    // Make a chunk's tables; faded: what it leaves of the state before it.
    __device__ __forceinline__ void read(Word slot, int count, float& faded) const { make(sums(slot, count), faded); }
    __device__ __forceinline__ Sums sums(Word slot, int count) const {
        const int lane = threadIdx.x % 32;
        const Word from = slot + shift + 2 * lane * 4;
        const float x = load(from), y = load(from + 4);  // behind the last token there is nothing, or another document
        return Sums(2 * lane < count ? step_of<NEAR>(x) : 0.0f, 2 * lane + 1 < count ? step_of<NEAR>(y) : 0.0f);
    }
    __device__ __forceinline__ void make(const Sums& sums, float& faded) const {
        const int lane = threadIdx.x % 32, warp = thread_number() / 32;
        faded = exp2_(sums.all);
        const float(&toward)[2] = REVERSE ? sums.upto : sums.behind, (&since)[2] = REVERSE ? sums.behind : sums.upto;
        const float blocks_toward = REVERSE ? sums.earlier : sums.later, blocks_since = REVERSE ? sums.later : sums.earlier;
        __syncwarp();  // all have read what is written now
        if (!OUTPUTS || lane / 8 == warp)  // rounded here, not fused with the subtraction in one kernel and not in another
            store_pair(pairs, lane, __fmul_rn(exp2_(toward[0] + blocks_toward), added_scale),
                       __fmul_rn(exp2_(toward[1] + blocks_toward), added_scale));
        if (OUTPUTS) {
            // Columns up to the warp's 16 rows: what they see of them through all blocks in between.
            const float seen = __shfl_sync(0xffffffffu, blocks_since, REVERSE ? 8 * warp + 4 : 8 * warp);
            const float between = at_most_0(seen - (blocks_since + sums.total));
            const bool behind = REVERSE ? lane >= 8 * warp + 8 : lane < 8 * warp;
            store(columns + lane * 8, behind ? exp2_(toward[0] + between) : 0.0f,
                  behind ? exp2_(toward[1] + between) : 0.0f);
            if (lane / 8 == warp) {
                store(from_state + lane * 8, exp2_(since[0] + blocks_since) * state_scale,
                      exp2_(since[1] + blocks_since) * state_scale);
                const Word to = rows + lane % 8 * 8;
                const float half = REVERSE ? sums.later_half : sums.earlier_half;
                store(to, exp2_(since[0] + half) * scale, exp2_(since[1] + half) * scale);
                store(to + 64, since[0], since[1]);
                store(to + 128, toward[0], toward[1]);
            }
        }
        __syncwarp();
    }
};

using Weights = TokenWeights<false>;

struct Tables : TokenWeights<true> {
    __device__ __forceinline__ void set(float scale_, float state_scale_, float added_scale_) {
        scale = scale_, state_scale = state_scale_, added_scale = added_scale_;
    }
    // scores, decayed and rounded, to shared memory; OWN_FIRST: as of `each`
    template <bool OWN_FIRST = false>
    __device__ __forceinline__ void decay(const float (&scores)[32], Word seen) const {
        const int lane = threadIdx.x % 32, warp = thread_number() / 32;
        const Word to = seen + (warp * 16 + (lane & 15)) * 128 + ((lane >> 4 ^ lane) & 7) * 16;
        each<OWN_FIRST>(warp, [&](int step, const float (&d)[8]) {
            Word x[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[i] = pack(scores[8 * step + 2 * i] * d[2 * i], scores[8 * step + 2 * i + 1] * d[2 * i + 1]);
            store_matrices(to ^ step * 32, x);
        });
    }
    // A thread's decays of 16 columns after the other: two beside each other, 8 rows further on, 8 columns further on.
    // OWN_FIRST: those within the warp's own tokens first, and then no branch, so that loads are under way together. It
    // takes 8 registers: o and dv gain by it, dq and dk do not (benchmarks/notes/gated.md).
    template <bool OWN_FIRST = false, class F>
    __device__ __forceinline__ void each(int warp, F function) const {
        const int row = threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
        const float of_row[2] = {load(rows + row * 4), load(rows + row * 4 + 32)};
        float own[8];
        if (OWN_FIRST) within(row, column, own);
#pragma unroll
        for (int step = 0; step < 4; step++) {
            float d[8];
            if (!OWN_FIRST && step == warp) {
                within(row, column, d);
            } else {
#pragma unroll
                for (int i = 0; i < 8; i += 4) {
                    float of_column[2];
                    load(columns + (16 * step + 2 * i + column) * 4, of_column[0], of_column[1]);
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        d[i + j] = OWN_FIRST && step == warp ? own[i + j] : of_row[j / 2] * of_column[j % 2];
                }
            }
            function(step, d);
        }
    }
    // The decays within the warp's 16 tokens, times scale: two blocks of 8, and from one of them to the other.
    __device__ __forceinline__ void within(int row, int column, float (&d)[8]) const {
        const Word since = rows + 64, toward = rows + 128;
        const int near = REVERSE ? 4 : 2;  // where rows see the other block's columns
        float of_column[2];
#pragma unroll
        for (int block = 0; block < 2; block++) {
            const float of_row = load(since + (row + 8 * block) * 4);
            load(since + (column + 8 * block) * 4, of_column[0], of_column[1]);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const bool sees = REVERSE ? column + j >= row : column + j <= row;
                d[6 * block + j] = sees ? exp2_(of_row - of_column[j]) * scale : 0.0f;
            }
        }
        const float of_row = load(since + (REVERSE ? row : row + 8) * 4);
        load(toward + (REVERSE ? column + 8 : column) * 4, of_column[0], of_column[1]);
#pragma unroll
        for (int j = 0; j < 2; j++) d[near + j] = exp2_(of_row + of_column[j]) * scale, d[6 - near + j] = 0.0f;
    }
    // o, transposed, times the decay from the state at a chunk's start
    __device__ __forceinline__ void fade(float (&o)[32], const float (&unit)[2], int) const {
        fade_outputs<true>(o, unit, from_state, 0);
    }
};
