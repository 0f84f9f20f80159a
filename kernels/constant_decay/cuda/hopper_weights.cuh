// The weights of a constant decay: the same in every chunk, from tables in shared memory that are made once.
//
// kernels/token_decay/cuda/hopper_weights.cuh has the same names for a decay a token.

constexpr float LEAST = -1e4f;
[[maybe_unused]] constexpr int SLOT = 0;  // bytes of shared memory in which a chunk's log-decays come

// A log-decay: -inf means the same as LEAST, but gamma^0 would be NaN. NaN stays, which max would drop.
__device__ float bounded(float log_decay) { return log_decay < LEAST ? LEAST : log_decay; }

// From a token to the state at the chunk's end, as pairs (high, low) of 16-bit numbers, two tokens at a time.
struct Weights {
    static constexpr int BYTES = CHUNK / 2 * 8;
    Word pairs;
    float log_gamma, g;

    __device__ __forceinline__ void place(Word base, const Tile&, const float*) { pairs = base; }
    __device__ __forceinline__ void start(const Tile& tile, const float* log_decay) {
        log_gamma = bounded(log_decay[tile.head]), g = log_gamma * LOG2E;
    }
    // Chunks whose tokens are so far from the state that gamma^distance is 0 in fp32 (from e^-104 on) are left out.
    __device__ __forceinline__ int reached(int length, int all) const {
        const int reach = int(min(104.0f / max(-log_gamma, 1e-9f), float(length)));
        return min(all, (reach + CHUNK - 1) / CHUNK + 1);
    }
    __device__ __forceinline__ void leave_out(Tile& tile) const { tile.chunks = reached(tile.length, tile.all); }
    // Whether a tile of `whole` tokens, all known at once, leaves out all before the chunk that begins at `token`.
    __device__ __forceinline__ bool begins(int whole, int token, float) const {
        const int all = (whole + CHUNK - 1) / CHUNK;
        return token == (all - reached(whole, all)) * CHUNK;
    }
    __device__ __forceinline__ int bytes(int) const { return 0; }
    __device__ __forceinline__ void fetch(Word, int, int, Word) const {}
    __device__ __forceinline__ void read(Word, int, float&) const {}
    // `scale` times gamma^(steps to the end of a chunk of `count` tokens)
    __device__ __forceinline__ void set(float scale, int count) const {
        const int thread = thread_number();
        if (thread >= CHUNK / 2) return;
        const int token = 2 * thread, steps = REVERSE ? token + 1 : count - 1 - token;
        // Rounded here, not fused with the subtraction in one kernel and not in another.
        const float x = __fmul_rn(exp2_(g * float(max(steps, 0))), scale);
        const float y = __fmul_rn(exp2_(g * float(max(REVERSE ? steps + 1 : steps - 1, 0))), scale);
        store_pair(pairs, thread, x, y);
    }
    // What a chunk leaves of the state before it; and what a tile leaves, rounded as by the fold between tiles.
    __device__ __forceinline__ float faded(int count) const { return exp2_(g * float(count)); }
    __device__ __forceinline__ float folded(int count) const {
        return exp2_subnormal(__fmul_rn(__fmul_rn(log_gamma, float(count)), LOG2E));
    }
};

// What the outputs want besides: the decays between tokens, and from the state at the chunk's start.
struct Tables : Weights {
    static constexpr int BYTES = 2 * 128 * 4 + Weights::BYTES;
    Word decays, from_state;

    __device__ __forceinline__ void place(Word base, const Tile&, const float*) {
        decays = base, from_state = decays + 128 * 4, pairs = from_state + 128 * 4;
    }
    __device__ __forceinline__ void set(float scale, float state_scale, float added_scale, int count = CHUNK) const {
        // scale gamma^distance at 63 + distance, where a token sees only those that are not ahead of it.
        const int i = thread_number(), distance = REVERSE ? 63 - i : i - 63;
        store(decays + i * 4, distance < 0 ? 0.0f : exp2_(g * float(distance)) * scale);
        // Reversed, chunks of fewer tokens read it from further on.
        store(from_state + i * 4, exp2_(g * float(REVERSE ? max(63 - i, 0) : i + 1)) * state_scale);
        Weights::set(added_scale, count);
    }
    // scores, decayed and rounded, to shared memory; with -DHIGH=1, and what that has left of them
    __device__ __forceinline__ void decay(const float (&scores)[32], Word seen) const {
        const int lane = threadIdx.x % 32, row = thread_number() / 32 * 16;
        const Word from = decays + (63 + row + lane / 4 - 2 * (lane % 4)) * 4;
        const Word to = seen + (row + (lane & 15)) * 128 + ((lane >> 4 ^ lane) & 7) * 16;
        float table[9][2];  // by how many times 8 tokens a row lies after a column, from 1 down to -7
#pragma unroll
        for (int i = 0; i < 18; i++) table[i / 2][i % 2] = load(from + (8 - i / 2 * 8 - i % 2) * 4);
#pragma unroll
        for (int step = 0; step < 4; step++) {
            Word x[4], left[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {  // 8 rows further for odd i, 8 columns for the second two
                const float(&d)[2] = table[1 - i % 2 + 2 * step + i / 2];
                const float y = scores[8 * step + 2 * i] * d[0], z = scores[8 * step + 2 * i + 1] * d[1];
                x[i] = pack(y, z);
                if (HIGH) left[i] = rest(y, z, x[i]);
            }
            store_matrices(to ^ step * 32, x);
            if (HIGH) store_matrices((to ^ step * 32) + BLOCK, left);
        }
    }
    // o, transposed, times the decay from the state at the start of a chunk of `count` tokens
    template <int n> __device__ __forceinline__ void fade(float (&o)[n], const float (&unit)[2], int count) const {
        fade_outputs<!REVERSE>(o, unit, from_state, REVERSE ? CHUNK - count : 0);
    }
};
