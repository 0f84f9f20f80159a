// The ceiling of fp32 fused multiply-adds: 16 independent chains a thread, 8,192 steps each, no memory.
extern "C" __global__ void fma_rate(float* out, float factor) {
    float x[16];
    for (int i = 0; i < 16; ++i) x[i] = threadIdx.x + i;
    for (int step = 0; step < 8192 / 8; ++step)
#pragma unroll
        for (int again = 0; again < 8; ++again)
#pragma unroll
            for (int i = 0; i < 16; ++i) x[i] = fmaf(x[i], factor, 1.f);
    float sum = 0.f;
    for (int i = 0; i < 16; ++i) sum += x[i];
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
