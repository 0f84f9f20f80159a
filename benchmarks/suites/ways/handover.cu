// The hand-over of a one-pass forward by itself: a state of 128 x 128 fp32 passes from tile to tile of a head, in order,
// through the second cache, S = keep S + L. Programs take tiles in order, head by head of each tile, so that whoever
// waits waits for a tile that another has taken. Without products: how long a hop takes is all that is asked.
//
// -DTILE: tokens. -DWORKERS: threads. -DSPLITS=1|2: programs that share a tile's state by columns. -DTRAFFIC=1: and the
// 4 units that must be moved: k and v to shared memory before the hop (with tiles of 512 tokens, which do not fit, they
// come once more after it), q in and o out after it. -DMODE, how the state travels:
//     0 each warp writes its share and then a flag of its own
//     1 no flags: each 16 bytes are three numbers and the tile's number
//     2 as bulk copies, a flag for all
//     3 blocks of a cluster, 8 consecutive tiles, write to each other's shared memory; from cluster to cluster as 0
//
// Two slots a head are enough: who writes a slot again has read what was made from it.

#include "../../../leetdist/kernels/constant_decay/cuda/hopper.cuh"

constexpr int SIZE = 128 * 128 / SPLITS, OWN = SIZE / WORKERS;  // numbers of the state; a thread's
constexpr int CLUSTER = MODE == 3 ? 8 : 1;
constexpr int PIECE = CHUNK * 256, OWN_PIECE = PIECE / SPLITS, PIECES = TILE / CHUNK;  // bytes of 64 tokens
constexpr bool HELD = TILE <= 256;
constexpr int HELD_PIECES = TRAFFIC ? HELD ? PIECES : 2 : 0;
constexpr int STATE_BYTES = MODE > 1 ? SIZE * 4 : 0;
constexpr int TAGGED = (OWN + 2) / 3;

__device__ __forceinline__ Word acquire(const Word* from) {
    Word x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
__device__ __forceinline__ void release(Word* to, Word x) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ void load4(const float* from, float* x) {
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "l"(from) : "memory");
}
__device__ __forceinline__ void store4(float* to, float x, float y, float z, float w) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};"
                 ::"l"(to), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
__device__ __forceinline__ void spun(unsigned& times) {  // seconds: nobody will come
    if (++times > 1u << 22) asm volatile("trap;");
}
__device__ __forceinline__ void wait_flag(const Word* flag, Word value) {
    unsigned times = 0;
    while (acquire(flag) < value) spun(times);
}
__device__ __forceinline__ void write_bytes(char* to, Word from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int under_way> __device__ __forceinline__ void wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(under_way) : "memory");
}

#if MODE == 3
#define CLUSTERS __cluster_dims__(8, 1, 1)
#else
#define CLUSTERS
#endif

extern "C" __global__ void CLUSTERS __launch_bounds__(WORKERS, 1)
handover(const char* q, const char* k, const char* v, char* o, float* slots, Word* flags, Word* next, Offset heads,
         Offset tiles, float keep) {
    __shared__ alignas(8) Long barriers[4];
    __shared__ Word taken;
    const Word base = shared_memory(), ring = base + HELD_PIECES * (PIECE + OWN_PIECE);
    const Word box = ring + (TRAFFIC ? 2 * PIECE : 0), arrivals = Word(__cvta_generic_to_shared(barriers));
    const Word held_here = arrivals, piece_here = arrivals + 8, box_here = arrivals + 24;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, rank = MODE == 3 ? cluster_rank() : 0;
    const int chains = int(heads) * SPLITS, all = chains * int(tiles) / CLUSTER;
    if (thread == 0)
        for (int i = 0; i < 4; i++) init_arrival(arrivals + i * 8);
    publish();
    __syncthreads();
    unsigned held_parity = 0, pieces = 0, box_parity = 0;
    for (;;) {
        __syncthreads();
#if MODE == 3
        meet_cluster();
        if (thread == 0 && rank == 0) {
            const Word mine = atomicAdd(next, 1u), place = Word(__cvta_generic_to_shared(&taken));
            for (int other = 0; other < CLUSTER; other++)
                asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %0, %1; st.shared::cluster.u32 [a], %2; }"
                             ::"r"(place), "r"(other), "r"(mine) : "memory");
        }
        meet_cluster();
#else
        if (thread == 0) taken = atomicAdd(next, 1u);
        __syncthreads();
#endif
        const int number = int(taken);
        if (number >= all) break;
        const int chain = number % chains, tile = number / chains * CLUSTER + rank, split = chain % SPLITS;
        const Offset first = (Offset(chain / SPLITS) * tiles + tile) * PIECES;  // piece
        auto fetch_piece = [&](int i) {  // of q, and of k and v where they come again
            const Word arrival = piece_here + (pieces + i) % 2 * 8, place = (pieces + i) % 2;
            expect(arrival, PIECE + (HELD ? 0 : PIECE + OWN_PIECE));
            fetch_bytes(ring + place * PIECE, q + (first + i) * PIECE, PIECE, arrival);
            if (!HELD) {
                fetch_bytes(base + place * (PIECE + OWN_PIECE), k + (first + i) * PIECE, PIECE, arrival);
                fetch_bytes(base + place * (PIECE + OWN_PIECE) + PIECE, v + (first + i) * PIECE + split * OWN_PIECE,
                            OWN_PIECE, arrival);
            }
        };
        if (TRAFFIC && thread == 0) {
            for (int i = 0; i < PIECES; i++) {
                const Word to = base + i % HELD_PIECES * (PIECE + OWN_PIECE);
                if (i == 0) expect(held_here, HELD_PIECES * (PIECE + OWN_PIECE));
                if (!HELD && i > 0 && i % 2 == 0) {  // two pieces on their way, then the next two
                    wait_arrival(held_here, held_parity);
                    held_parity ^= 1;
                    expect(held_here, HELD_PIECES * (PIECE + OWN_PIECE));
                }
                fetch_bytes(to, k + (first + i) * PIECE, PIECE, held_here);
                fetch_bytes(to + PIECE, v + (first + i) * PIECE + split * OWN_PIECE, OWN_PIECE, held_here);
            }
            wait_arrival(held_here, held_parity);
            held_parity ^= 1;
            for (int i = 0; i < 2; i++) fetch_piece(i);
        }
        __syncthreads();

        // The hop.
        float x[OWN] = {};
        const float add = float(tile % 7 + 1);
        Word* const flag = flags + (chain * 32 + warp) * 8;  // 32 bytes each
        float* const from = slots + (Offset(chain) * 2 + (tile + 1) % 2) * 2 * SIZE;
        float* const to = slots + (Offset(chain) * 2 + tile % 2) * 2 * SIZE;
        const bool outside = MODE != 3 || rank == 0, leaves = MODE != 3 || rank == CLUSTER - 1;
        if (MODE == 1) {
            unsigned times = 0;
#pragma unroll
            for (int i = TAGGED - 1; tile > 0 && i >= 0; i--) {  // the last is written last
                float y[4];
                load4(from + (i * WORKERS + thread) * 4, y);
                while (__float_as_uint(y[3]) != Word(tile)) spun(times), load4(from + (i * WORKERS + thread) * 4, y);
#pragma unroll
                for (int j = 0; j < 3; j++)
                    if (3 * i + j < OWN) x[3 * i + j] = y[j];
            }
        } else if (MODE == 2) {
            if (tile > 0) {
                if (thread == 0) {
                    wait_flag(flag, tile);
                    asm volatile("fence.proxy.async;" ::: "memory");
                    expect(box_here, STATE_BYTES);
                    fetch_bytes(box, reinterpret_cast<const char*>(from), STATE_BYTES, box_here);
                }
                wait_arrival(box_here, box_parity);
                box_parity ^= 1;
            }
        } else if (outside && tile > 0) {
            if (lane == 0) wait_flag(flag, tile);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < OWN; i += 4) load4(from + i * WORKERS + thread * 4, x + i);
        } else if (MODE == 3 && !outside) {
            if (thread == 0) expect(box_here, STATE_BYTES);
            wait_arrival(box_here, box_parity);
            box_parity ^= 1;
        }
        if (MODE > 1 && !(MODE == 3 && outside) && tile > 0) {
#pragma unroll
            for (int i = 0; i < OWN; i += 4) {
                Word y[4];
                load(box + i * WORKERS * 4 + thread * 16, y);
#pragma unroll
                for (int j = 0; j < 4; j++) x[i + j] = __uint_as_float(y[j]);
            }
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) x[i] = fmaf(x[i], keep, add + float(thread % 4));
        if (MODE == 1) {
#pragma unroll
            for (int i = 0; i < TAGGED; i++)
                store4(to + (i * WORKERS + thread) * 4, x[3 * i], 3 * i + 1 < OWN ? x[3 * i + 1] : 0.0f,
                       3 * i + 2 < OWN ? x[3 * i + 2] : 0.0f, __uint_as_float(Word(tile + 1)));
        } else if (MODE == 2) {
#pragma unroll
            for (int i = 0; i < OWN; i += 4) {
                const Word y[4] = {__float_as_uint(x[i]), __float_as_uint(x[i + 1]), __float_as_uint(x[i + 2]),
                                   __float_as_uint(x[i + 3])};
                store(box + i * WORKERS * 4 + thread * 16, y);
            }
            publish();
            __syncthreads();
            if (thread == 0) {
                write_bytes(reinterpret_cast<char*>(to), box, STATE_BYTES);
                asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
                asm volatile("fence.proxy.async;" ::: "memory");
                release(flag, tile + 1);
            }
        } else if (leaves) {
#pragma unroll
            for (int i = 0; i < OWN; i += 4) store4(to + i * WORKERS + thread * 4, x[i], x[i + 1], x[i + 2], x[i + 3]);
            __syncwarp();
            if (lane == 0) release(flag, tile + 1);
        } else {
#pragma unroll
            for (int i = 0; i < OWN; i += 4)
                send(box + i * WORKERS * 4 + thread * 16, box_here, rank + 1, x[i], x[i + 1], x[i + 2], x[i + 3]);
        }

        if (TRAFFIC && thread == 0) {
            for (int i = 0; i < PIECES; i++) {
                const Word place = (pieces + i) % 2;
                wait_arrival(piece_here + place * 8, (pieces + i) / 2 & 1);
                const int own = split * OWN_PIECE;
                write_bytes(o + (first + i) * PIECE + own, ring + place * PIECE + own, OWN_PIECE);
                if (i + 2 < PIECES) wait_read<0>(), fetch_piece(i + 2);
            }
            wait_read<0>();
        }
        pieces += PIECES;
    }
}
