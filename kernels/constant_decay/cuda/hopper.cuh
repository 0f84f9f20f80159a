// What the kernels for Hopper (sm_90a) are made of: 16-bit numbers in pairs, matrices in shared memory, asynchronous
// products (wgmma) and copies (TMA). A product reads blocks of 64 x 64 numbers, a row 128 bytes long, swizzled.
//
// Compile with -DHALF=0|1 (bf16, fp16) -DGROUPS=1|2 (warpgroups of a block). No other headers: NVRTC needs none.

typedef unsigned short Bits;  // a 16-bit number
typedef unsigned int Word;    // two of them, the earlier in the lower half; or an address in shared memory
typedef unsigned long long Long;
typedef long long Offset;

constexpr int CHUNK = 64;           // tokens that products work on
constexpr int THREADS = 128;        // a warpgroup
constexpr int WARPS = THREADS / 32;
constexpr int BLOCK = 64 * 64 * 2;  // bytes

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

// ------------------------------------------------------------------------------------------------ warpgroups

// A thread's number in its warpgroup, and the warpgroup's in its block.
__device__ __forceinline__ int thread_number() { return GROUPS == 1 ? threadIdx.x : threadIdx.x % THREADS; }
__device__ __forceinline__ int group_number() { return GROUPS == 1 ? 0 : threadIdx.x / THREADS; }
// A thread's number in its block, read anew: for what is done once a chunk it is no register more in between.
__device__ __forceinline__ int thread_anew() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}
// All threads of a block take part in hand-over `number`: those of one warpgroup say that they are here, those of the other
// wait until all are.
template <int number> __device__ __forceinline__ void say_here() {
    asm volatile("bar.arrive %0, %1;" ::"n"(1 + GROUPS + number), "n"(GROUPS * THREADS) : "memory");
}
template <int number> __device__ __forceinline__ void wait_here() {
    asm volatile("bar.sync %0, %1;" ::"n"(1 + GROUPS + number), "n"(GROUPS * THREADS) : "memory");
}
// Each thread of a warpgroup gets so many registers, or keeps so many, of those that the block has.
template <int registers> __device__ __forceinline__ void get_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers> __device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}
// The threads of a warpgroup wait for each other.
__device__ __forceinline__ void meet() {
    if (GROUPS == 1) __syncthreads();
    else asm volatile("bar.sync %0, %1;" ::"r"(1 + group_number()), "n"(THREADS) : "memory");
}

// ------------------------------------------------------------------------------------------------ numbers

__device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The same with results too small to be normal, as Triton's exp has them.
__device__ __forceinline__ float exp2_subnormal(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers rounded to 16 bits.
__device__ __forceinline__ Word pack(float low, float high) {
    Word x;
    asm("cvt.rn." TYPE "x2.f32 %0, %2, %1;" : "=r"(x) : "f"(low), "f"(high));
    return x;
}

__device__ __forceinline__ float unpack(Word x, int place) {
#if HALF
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(Bits(x >> 16 * place)));
    return y;
#else
    return __uint_as_float(place ? x & 0xffff0000u : x << 16);
#endif
}

__device__ __forceinline__ Word times(Word a, Word b) {
    Word x;
    asm("mul.rn." TYPE "x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
}

__device__ __forceinline__ Word times_plus(Word a, Word b, Word c) {
    Word x;
    asm("fma.rn." TYPE "x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
}

// Whether a number is a NaN or an infinity; of two 16-bit numbers, that at `place`.
__device__ __forceinline__ bool not_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) == 0x7f800000u; }
__device__ __forceinline__ bool not_finite(Word x, int place) {
    constexpr Word EXPONENT = HALF ? 0x7c00u : 0x7f80u;
    return (x >> 16 * place & EXPONENT) == EXPONENT;
}

__device__ __forceinline__ Word minus(Word x) { return x ^ 0x80008000u; }

// ------------------------------------------------------------------------------------------------ shared memory

__device__ __forceinline__ Word shared_memory() {
    extern __shared__ char memory[];
    return (Word(__cvta_generic_to_shared(memory)) + 1023) & ~1023u;  // where a block may begin
}

__device__ __forceinline__ float load(Word from) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from));
    return x;
}
__device__ __forceinline__ void load(Word from, float& x, float& y) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(from));
}
__device__ __forceinline__ void load(Word from, Word& x, Word& y) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(from));
}
__device__ __forceinline__ void store(Word to, float x) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}
__device__ __forceinline__ void store(Word to, Word x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void store(Word to, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void load(Word from, Word (&x)[4]) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from));
}
__device__ __forceinline__ void store(Word to, const Word (&x)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ __forceinline__ Word load_word(Word from) {
    Word x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from));
    return x;
}
__device__ __forceinline__ void store_least(Word to, int x) {
    asm volatile("red.shared.min.s32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

// Four matrices of 8 x 8, as a product holds them in registers; transposed on the way.
__device__ __forceinline__ void load_transposed(Word from, Word (&x)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void store_transposed(Word to, const Word (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ __forceinline__ void load_matrices(Word from, Word (&x)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void store_matrices(Word to, const Word (&x)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// What ordinary instructions of this thread did to shared memory comes before what products and copies do.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ------------------------------------------------------------------------------------------------ copies

// A tensor (batch, heads, tokens, dim) as the copy engine knows it.
struct alignas(64) Map {
    Long words[16];
};

// Where a chunk begins.
struct Place {
    int column, token, head, batch;
};

// A barrier that arrivals flip, and of the expected bytes; and the wait for flip 1, 3, .. (parity 0) or 2, 4, ..
__device__ __forceinline__ void init_arrival(Word arrival, int arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(arrival), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(Word arrival) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(arrival) : "memory");
}
__device__ __forceinline__ void expect(Word arrival, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrival), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_arrival(Word arrival, int parity) {
    int done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(arrival), "r"(parity) : "memory");
    } while (!done);
}

// Count this thread, or this warp; whether it is the last of `many`, or of the block's (in one thread). What all of them
// have read is read by then.
__device__ __forceinline__ bool is_last_of(Word many, Word counter) {
    Word before;
    asm volatile("atom.acq_rel.cta.shared::cta.add.u32 %0, [%1], 1;" : "=r"(before) : "r"(counter) : "memory");
    return before % many == many - 1;
}
__device__ __forceinline__ bool is_last(Word counter, Word many = WARPS * GROUPS) {
    return thread_number() % 32 == 0 && is_last_of(many, counter);
}

// Start to copy a chunk of WIDTH columns: its blocks side by side.
template <int WIDTH> __device__ __forceinline__ void fetch(Word to, const Map& map, Place at, Word arrival) {
#pragma unroll
    for (int block = 0; block < WIDTH / 64; block++)
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%2, %3, %4, %5}], [%6];"
                     ::"r"(to + block * BLOCK), "l"(&map), "r"(at.column + block * 64), "r"(at.token), "r"(at.head),
                       "r"(at.batch), "r"(arrival) : "memory");
}
// Bring it into the second cache: whoever fetches it a chunk's time later does not wait for memory.
template <int WIDTH> __device__ __forceinline__ void fetch_ahead(const Map& map, Place at) {
#pragma unroll
    for (int block = 0; block < WIDTH / 64; block++)
        asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];"
                     ::"l"(&map), "r"(at.column + block * 64), "r"(at.token), "r"(at.head), "r"(at.batch) : "memory");
}
// The same as `fetch` of a few bytes: multiples of 16, from where multiples of 16 are.
__device__ __forceinline__ void fetch_bytes(Word to, const char* from, int bytes, Word arrival) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(arrival) : "memory");
}
// A line of 128 bytes to the second cache.
__device__ __forceinline__ void prefetch(const float* line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line) : "memory");
}
template <int WIDTH> __device__ __forceinline__ void write(const Map& map, Place at, Word from) {
#pragma unroll
    for (int block = 0; block < WIDTH / 64; block++)
        asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];"
                     ::"l"(&map), "r"(at.column + block * 64), "r"(at.token), "r"(at.head), "r"(at.batch),
                       "r"(from + block * BLOCK) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Four numbers, where multiples of 16 bytes are.
__device__ __forceinline__ void load_four(const float* from, float (&x)[4]) {
    const float4 y = *reinterpret_cast<const float4*>(from);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
}
__device__ __forceinline__ void store_four(float* to, float x, float y, float z, float w) {
    *reinterpret_cast<float4*>(to) = make_float4(x, y, z, w);
}
// Wait until what this thread writes has left shared memory.
__device__ __forceinline__ void wait_writes() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Zero the rows of a chunk from `count` on: they are another document's, or nobody's.
template <int WIDTH> __device__ __forceinline__ void zero_rows(Word chunk, int count) {
    for (int i = thread_number(); i < WIDTH / 2 * CHUNK; i += THREADS)
        if (i / 32 % CHUNK >= count) store(chunk + i * 4, Word(0));
}

// ------------------------------------------------------------------------------------------------ clusters

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of a cluster wait for each other, and see what they have written to each other's shared memory.
__device__ __forceinline__ void meet_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Start to write four numbers to the shared memory of another block of the cluster, which count as bytes of its arrival.
__device__ __forceinline__ void send(Word to, Word arrival, int rank, float x, float y, float z, float w) {
    asm volatile("{ .reg .b32 t, a; mapa.shared::cluster.u32 t, %0, %2; mapa.shared::cluster.u32 a, %1, %2;"
                 " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [t], {%3, %4, %5, %6}, [a]; }"
                 ::"r"(to), "r"(arrival), "r"(rank), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
// Arrive at a barrier of another block of the cluster.
__device__ __forceinline__ void arrive(Word arrival, int rank) {
    asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1;"
                 " mbarrier.arrive.release.cluster.shared::cluster.b64 _, [a]; }" ::"r"(arrival), "r"(rank) : "memory");
}
// 16 bytes to global memory, where multiples of 16 are.
__device__ __forceinline__ void write_words(Bits* to, const Word (&x)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

// ------------------------------------------------------------------------------------------------ products

// Operands in shared memory. By rows: the product sums over what lies along a row; by columns: over the rows.
__device__ __forceinline__ Long by_rows(Word chunk) {
    return Long((chunk & 0x3ffff) >> 4) | Long(64) << 32 | Long(1) << 62;
}
__device__ __forceinline__ Long by_columns(Word chunk) { return by_rows(chunk) | Long(BLOCK >> 4) << 16; }
// The same where a block's right neighbour is not the next one in memory, but so many further on.
__device__ __forceinline__ Long by_columns(Word chunk, int apart) {
    return by_rows(chunk) | Long(apart * (BLOCK >> 4)) << 16;
}
// From the first 16 numbers that are summed over to those of a later step.
__device__ __forceinline__ Long along_rows(int step, int apart = 1) {
    return Long(step / 4 * apart * (BLOCK >> 4) + step % 4 * 2);
}
__device__ __forceinline__ Long along_columns(int step) { return Long(step * (16 * 128 >> 4)); }

#define LIST8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
                    "+f"(x[i + 6]), "+f"(x[i + 7])
#define LIST16(x, i) LIST8(x, i), LIST8(x, i + 8)
#define LIST32(x, i) LIST16(x, i), LIST16(x, i + 16)
#define LIST64(x, i) LIST32(x, i), LIST32(x, i + 32)
#define NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES32 NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES48 NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES64 NAMES48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES80 NAMES64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES96 NAMES80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES112 NAMES96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES128 NAMES112 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define PRODUCT(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." TYPE "." TYPE

// One step of x (64 x 64) = a b (or +=), both by rows; a in shared memory, or in registers; of x also 32 or 16 columns.
__device__ __forceinline__ void product(float (&x)[32], Long a, Long b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; " PRODUCT("64") " {" NAMES32 "}, %32, %33, p, 1, 1, 0, 0; }"
                 : LIST32(x, 0) : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void product(float (&x)[32], const Word (&a)[4], Long b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; " PRODUCT("64")
                 " {" NAMES32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
                 : LIST32(x, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void product(float (&x)[16], const Word (&a)[4], Long b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %21, 0; " PRODUCT("32")
                 " {" NAMES16 "}, {%16, %17, %18, %19}, %20, p, 1, 1, 0; }"
                 : LIST16(x, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void product(float (&x)[8], const Word (&a)[4], Long b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %13, 0; " PRODUCT("16")
                 " {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1, 0; }"
                 : LIST8(x, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// One step of x (64 x 128) = a b (or +=), a by rows; b by rows, or by columns.
template <bool COLUMNS_> __device__ __forceinline__ void product(float (&x)[64], Long a, Long b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; " PRODUCT("128")
                 " {" NAMES64 "}, %64, %65, p, 1, 1, 0, %67; }"
                 : LIST64(x, 0) : "l"(a), "l"(b), "r"(add), "n"(int(COLUMNS_)));
}
// One step of x (64 x n) += a b, b by columns.
#define ADD_PRODUCT(n, list, names, i, j, k, l, m)                                                                   \
    __device__ __forceinline__ void add_product(float (&x)[n / 2], const Word (&a)[4], Long b) {                     \
        asm volatile(PRODUCT(#n) " {" names "}, {%" #i ", %" #j ", %" #k ", %" #l "}, %" #m ", 1, 1, 1, 1;"          \
                     : list : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                   \
    }
#define AND ,
ADD_PRODUCT(32, LIST16(x, 0), NAMES16, 16, 17, 18, 19, 20)
ADD_PRODUCT(64, LIST32(x, 0), NAMES32, 32, 33, 34, 35, 36)
ADD_PRODUCT(96, LIST32(x, 0) AND LIST16(x, 32), NAMES48, 48, 49, 50, 51, 52)
ADD_PRODUCT(128, LIST64(x, 0), NAMES64, 64, 65, 66, 67, 68)
ADD_PRODUCT(160, LIST64(x, 0) AND LIST16(x, 64), NAMES80, 80, 81, 82, 83, 84)
ADD_PRODUCT(192, LIST64(x, 0) AND LIST32(x, 64), NAMES96, 96, 97, 98, 99, 100)
ADD_PRODUCT(224, LIST64(x, 0) AND LIST32(x, 64) AND LIST16(x, 96), NAMES112, 112, 113, 114, 115, 116)
ADD_PRODUCT(256, LIST64(x, 0) AND LIST64(x, 64), NAMES128, 128, 129, 130, 131, 132)

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int under_way> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(under_way) : "memory");
}

// Nothing that reads or writes these registers is moved over this point. What a product under way reads must live until
// it is done, or ptxas gives its registers to others.
template <int n> __device__ __forceinline__ void here(float (&x)[n]) {
#pragma unroll
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int n> __device__ __forceinline__ void here(Word (&x)[n][4]) {
#pragma unroll
    for (int i = 0; i < n; i++)
        asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}
