// The weights of a chunk that is still open, of a constant decay: those of hopper_weights.cuh, token by token.
//
// kernels/token_decay/cuda/open_weights.cuh has the same names for a decay a token.

#define DECAYS const float *log_decay, const float *keep
#define DECAYS_ log_decay, keep

struct OpenWeights : Weights {
    const float *log_decay, *keep;
    float kept;  // of the state before a full tile

    __device__ __forceinline__ OpenWeights(Word base, const Row& row, DECAYS)
        : log_decay(log_decay + row.head), keep(keep + row.head) {
        pairs = base;
    }
    // What there is to know of a chunk's tokens.
    __device__ __forceinline__ void read(int, int) { log_gamma = bounded(*log_decay), g = log_gamma * LOG2E; }
    // Of token i from token j, and from the state at the chunk's start.
    __device__ __forceinline__ float between(int i, int j, float scale) const {
        return i < j ? 0.0f : exp2_(g * float(i - j)) * scale;
    }
    __device__ __forceinline__ float from_state(int i, float scale) const { return exp2_(g * float(i + 1)) * scale; }
    // The weights of a full chunk; what it leaves of the state before it.
    __device__ __forceinline__ float close(int, bool) {
        set(1.0f, CHUNK), kept = *keep;
        return faded(CHUNK);
    }
    // What a slot keeps of the tokens' decays: none.
    __device__ __forceinline__ void keep_open(int, int) const {}
    __device__ __forceinline__ void keep_closed(int, int, bool, bool) const {}
};
