// The weights of a chunk that is still open, of a decay a token: those of hopper_weights.cuh, token by token.
//
// The names are those of kernels/constant_decay/cuda/open_weights.cuh.

#define DECAYS const float *log_decay, Offset decay_batch, Offset decay_head, Offset decay_token, float *ring_decay, \
               double *total
#define DECAYS_ log_decay, decay_batch, decay_head, decay_token, ring_decay, total

struct OpenWeights {
    static constexpr int BYTES = CHUNK / 2 * 8 + 5 * CHUNK * 4;
    Word pairs, upto, behind, earlier, ends, half;
    const float* given;  // the row's log-decays
    Offset next_head, next;
    float* ring;    // the slot's, head by head
    double* total;  // the same, of the tile's closed chunks
    int head, heads;
    float kept;

    __device__ __forceinline__ OpenWeights(Word base, const Row& row, DECAYS) {
        pairs = base, upto = base + CHUNK / 2 * 8, behind = upto + CHUNK * 4, earlier = behind + CHUNK * 4;
        ends = earlier + CHUNK * 4, half = ends + CHUNK * 4;
        given = log_decay + row.batch * decay_batch, next_head = decay_head, next = decay_token;
        ring = ring_decay + row.slot * row.heads * CHUNK, this->total = total + row.slot * row.heads;
        head = row.head, heads = row.heads;
    }
    // The log-decay of a head's token, the chunk's `place`-th and the call's `place + shift`-th.
    __device__ __forceinline__ float decay(int of, int place, int shift) const {
        return place + shift < 0 ? ring[of * CHUNK + place] : given[of * next_head + (place + shift) * next];
    }
    __device__ __forceinline__ Sums sums(int rows, int shift) const {
        const int token = 2 * (threadIdx.x % 32);
        const float x = token < rows ? step_of<NEAR>(decay(head, token, shift)) : 0.0f;
        const float y = token + 1 < rows ? step_of<NEAR>(decay(head, token + 1, shift)) : 0.0f;
        return Sums(x, y);
    }
    __device__ __forceinline__ void read(int rows, int shift) const {
        if (threadIdx.x >= 32) return;
        const Sums found = sums(rows, shift);
        const Word to = threadIdx.x * 8;
        store(upto + to, found.upto[0], found.upto[1]);
        store(behind + to, found.behind[0], found.behind[1]);
        store(earlier + to, found.earlier, found.earlier);
        store(ends + to, found.earlier + found.total, found.earlier + found.total);
        store(half + to, found.earlier_half, found.earlier_half);
    }
    __device__ __forceinline__ float between(int i, int j, float scale) const {
        if (i < j) return 0.0f;
        const float since = load(upto + i * 4), toward = load(behind + j * 4);
        if (i / 8 == j / 8) return exp2_(since - load(upto + j * 4)) * scale;
        if (i / 16 == j / 16) return exp2_(since + toward) * scale;
        const float through = at_most_0(load(earlier + i / 16 * 16 * 4) - load(ends + j * 4));
        return exp2_(since + load(half + i * 4)) * scale * exp2_(toward + through);
    }
    __device__ __forceinline__ float from_state(int i, float scale) const {
        return exp2_(load(upto + i * 4) + load(earlier + i * 4)) * scale;
    }
    __device__ __forceinline__ float close(int shift, bool first) {
        const Sums found = sums(CHUNK, shift);
        if (threadIdx.x < 32)
            store_pair(pairs, threadIdx.x, exp2_(found.behind[0] + found.later), exp2_(found.behind[1] + found.later));
        kept = float(exp(summed(head, shift, first)));
        return exp2_(found.all);
    }
    __device__ __forceinline__ bool begins(int, int token, float faded) const {
        return token == 0 || (faded == 0.0f && total[head] == total[head]);
    }
    // The tile's log-decays up to the end of a full chunk as token_decay/triton/sums.py adds them up, in multiples of
    // 2^-44: exact where exp does not make 0 of them, so in any order. NaN if one is no decay.
    __device__ __forceinline__ double summed(int of, int shift, bool first) const {
        constexpr double UNITS = double(1ll << 44);
        double sum = 0.0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float x = decay(of, threadIdx.x % 32 + 32 * i, shift);
            sum += x <= 0.0f ? double((long long)(double(x > -128.0f ? x : -128.0f) * UNITS)) / UNITS : nan("");
        }
#pragma unroll
        for (int apart = 1; apart < 32; apart *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
        return first ? sum : total[of] + sum;
    }
    // Of tokens that come behind `open` others.
    __device__ __forceinline__ void keep_open(int open, int tokens) const {
        if (threadIdx.x < tokens)
            ring[head * CHUNK + open + threadIdx.x] = given[head * next_head + threadIdx.x * next];
    }
    // The same where they fill the chunk: of all heads, by the last block. first, last: chunk of the tile.
    __device__ __forceinline__ void keep_closed(int open, int tokens, bool first, bool last) const {
        for (int of = threadIdx.x / 32; of < heads; of += blockDim.x / 32) {
            const double sum = summed(of, -open, first);
            if (threadIdx.x % 32 == 0) total[of] = last ? 0.0 : sum;
        }
        __syncthreads();
        const int left = open + tokens - CHUNK;
        for (int i = threadIdx.x; i < heads * left; i += blockDim.x)
            ring[i / left * CHUNK + i % left] = given[i / left * next_head + (tokens - left + i % left) * next];
    }
};
