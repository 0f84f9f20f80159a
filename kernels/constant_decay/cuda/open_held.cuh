// The walk's state at the open chunk's start as products take it (hopper_held.cuh): what a step reads of it until the
// chunk is closed, half as many bytes. In memory, and in a block's own, it lies as threads want it: of a warp's 16
// columns, step by step, a vector of 16 bytes a thread, and in fp16 each column's unit behind them.

struct Held {
    static constexpr int UNITS = STEPS * 32 * 16, BYTES = UNITS + (HALF ? 64 : 0);  // of a warp

    static __device__ __forceinline__ int vector(int step) { return (32 * step + threadIdx.x % 32) * 16; }
    static __device__ __forceinline__ int place_of_units() { return UNITS + threadIdx.x % 32 / 4 * 8; }

    // 16 rows of it, as an operand on the left, and the units of a thread's two columns.
    static __device__ __forceinline__ void get(Word from, int step, Word (&x)[4]) { load(from + vector(step), x); }
    static __device__ __forceinline__ void get_units(Word from, float (&unit)[2]) {
        unit[0] = unit[1] = 1.0f;
        if (HALF) load(from + place_of_units(), unit[0], unit[1]);
    }
    // The same to either memory.
    static __device__ __forceinline__ void put(const Word (&x)[4], int step, Word to) { store(to + vector(step), x); }
    static __device__ __forceinline__ void put(const Word (&x)[4], int step, Bits* to) {
        write_words(to + vector(step) / 2, x);
    }
    static __device__ __forceinline__ void put_units(const float (&unit)[2], Word to) {
        if (HALF && threadIdx.x % 4 == 0) store(to + place_of_units(), unit[0], unit[1]);
    }
    static __device__ __forceinline__ void put_units(const float (&unit)[2], Bits* to) {
        if (HALF && threadIdx.x % 4 == 0)
            store_two(reinterpret_cast<float*>(to + place_of_units() / 2), unit[0], unit[1]);
    }
};
