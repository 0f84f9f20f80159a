// What a warp does by itself, beside hopper.cuh: products without asynchrony, of small matrices, and vectors of 16 bytes.

// x (16 x 8) += a b.
__device__ __forceinline__ void add_small(float (&x)[4], const Word (&a)[4], Word b, Word b_further) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(b_further));
}
// 16 bytes to shared memory; the wait for all of this thread's; 16 bytes at once; and from there.
__device__ __forceinline__ void copy_vector(Word to, const Bits* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void copy_vector(Bits* to, const Bits* from) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}
__device__ __forceinline__ void copy_vector(Bits* to, Word from) {
    Word x[4];
    load(from, x[0], x[1]), load(from + 8, x[2], x[3]);
    *reinterpret_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void load_two(const float* from, float& x, float& y) {
    asm volatile("ld.global.L1::no_allocate.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "l"(from) : "memory");
}
__device__ __forceinline__ void store_two(float* to, float x, float y) {
    *reinterpret_cast<float2*>(to) = make_float2(x, y);
}
__device__ __forceinline__ void store(Word to, Bits x) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(x) : "memory");
}
// The lower, or the higher, halves of two words.
__device__ __forceinline__ Word join(Word x, Word y, bool high) { return __byte_perm(x, y, high ? 0x7632 : 0x5410); }

// Count this block, in one thread; whether it is the last of `blocks`. The counter is zero again then.
__device__ __forceinline__ bool arrives_last(unsigned* counter, unsigned blocks) {
    return atomicInc(counter, blocks - 1) == blocks - 1;
}
