// The state as an operand: rounded, in as many steps as a product sums over.

constexpr int STEPS = ROWS / 16;  // of a product over the state's rows
constexpr int SHARES = ROWS <= 128 ? 1 : GROUPS > 2 ? STEPS / 2 : 2;  // in which the state is rounded
constexpr int HELD_STEPS = STEPS / SHARES;
[[maybe_unused]] constexpr int TIMES = (1 + HIGH) * SHARES;  // with -DHIGH=1, then what rounding has left of each

// What a thread multiplies its two rows of a part of the state by to hold them in 16 bits, and the inverse: a state
// grows with the sequence and can exceed fp16's range, so fp16 holds each row times a power of two.
struct Units {
    float power[2] = {1.0f, 1.0f}, unit[2] = {1.0f, 1.0f};

    __device__ __forceinline__ void set(const float (&state)[HELD]) {
#if HALF
#pragma unroll
        for (int row = 0; row < 2; row++) {
            float largest = 0.0f;
#pragma unroll
            for (int i = 2 * row; i < HELD; i += 4) largest = max(largest, max(fabsf(state[i]), fabsf(state[i + 1])));
            largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
            largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
            // The power of two below it, but so large that its inverse is finite; and the inverse.
            const unsigned below = max(__float_as_uint(largest) & 0x7f800000u, 0x10000000u);
            power[row] = __uint_as_float(0x7f000000u - below) * 16384.0f;
            unit[row] = __uint_as_float(below) * (1.0f / 16384.0f);
        }
#endif
    }
};

// 16 rows of a part of the state as an operand on the left.
__device__ __forceinline__ void hold(const float* rows, const float (&power)[2], Word (&held)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) held[i] = pack(rows[2 * i] * power[i % 2], rows[2 * i + 1] * power[i % 2]);
}
// A part of it, or what is rounded of one at a time.
__device__ __forceinline__ void hold(const float (&state)[HELD], const float (&power)[2], int time,
                                     Word (&held)[HELD_STEPS][4]) {
#pragma unroll
    for (int i = 0; i < HELD_STEPS; i++) {
        const float* rows = state + 8 * (time % SHARES * HELD_STEPS + i);
        hold(rows, power, held[i]);
        if (time < SHARES) continue;
#pragma unroll
        for (int j = 0; j < 4; j++)
            held[i][j] = rest(rows[2 * j] * power[j % 2], rows[2 * j + 1] * power[j % 2], held[i][j]);
    }
}
