// What tile_outputs.cu wants of hopper_tile.cuh to walk a tile again without what is not finite in it (-DAGAIN=1).
//
// Every number that is not finite in b, c or the state at the start is 0 in this walk. The outputs that see it are NaN:
// of a row of b in all columns, of c and of the state in its own, from its token on in the order of the walk.

// The token of the walk from which on each of a warpgroup's columns is lost, and from which on all are.
struct Lost {
    static constexpr int BYTES = AGAIN ? (COLUMNS + 4) * 4 : 0;
    Word columns, all;

    __device__ __forceinline__ explicit Lost(Word base) : columns(base), all(base + COLUMNS * 4) {}
    static __device__ __forceinline__ int walked(int step, int token) {
        return step * CHUNK + (REVERSE ? CHUNK - 1 - token : token);
    }
    // Nothing yet but the columns in which the state at the start is; there it becomes 0.
    __device__ __forceinline__ void start(float (&state)[PARTS][HELD], bool first = true) const {
        for (int i = thread_number(); first && i <= COLUMNS; i += THREADS) store(columns + i * 4, Word(0x7fffffff));
        meet();
        const int column = thread_number() / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
        for (int part = 0; part < PARTS; part++)
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (not_finite(state[part][i])) {
                    store_least(columns + (64 * part + column + i / 2 % 2 * 8) * 4, 0);
                    state[part][i] = 0.0f;
                }
    }
    // What another has noted, and nothing else.
    __device__ __forceinline__ void take(const Lost& other) const {
        for (int i = thread_number(); i <= COLUMNS; i += THREADS) store(columns + i * 4, load_word(other.columns + i * 4));
    }
    // Note what is not finite in the first `count` rows of a chunk of b, or of c, and then, with `zero`, put 0 there.
    template <int WIDTH, bool C> __device__ __forceinline__ void find(Word chunk, int step, int count, bool zero) const {
#pragma unroll 1
        for (int i = thread_number(); i < WIDTH / 2 * CHUNK; i += THREADS) {
            const int row = i / 32 % CHUNK, column = i / (32 * CHUNK) * 64 + (i % 32 / 4 ^ row % 8) * 8 + i % 4 * 2;
            if (row >= count) continue;
            const Word x = load_word(chunk + i * 4);
            const bool low = not_finite(x, 0), high = not_finite(x, 1);
            if (zero && (low || high)) store(chunk + i * 4, x & (low ? 0xffff0000u : ~0u) & (high ? 0xffffu : ~0u));
            if (zero) continue;
            if (low) store_least(C ? columns + column * 4 : all, walked(step, row));
            if (high) store_least(C ? columns + column * 4 + 4 : all, walked(step, row));
        }
    }
    // NaN for the outputs of a chunk, from its token `first` on, that are lost.
    template <int n> __device__ __forceinline__ void mark(float (&o)[n], int step, int part, int first = 0) const {
        const int lane = threadIdx.x % 32, column = 64 * part + thread_number() / 32 * 16 + lane / 4;
        int from[2];
#pragma unroll
        for (int row = 0; row < 2; row++)
            from[row] = min(int(load_word(columns + (column + 8 * row) * 4)), int(load_word(all)));
#pragma unroll
        for (int j = 0; j < n; j++) {
            const int token = first + j / 4 * 8 + 2 * (lane % 4) + j % 2;
            if (walked(step, token) >= from[j / 2 % 2]) o[j] = __int_as_float(0x7fffffff);
        }
    }
};
