// Four blocks of a cluster walk a head's whole sequence, each with 32 of v's columns: copies alone. A chunk of q and k
// comes once from memory: each block fetches a quarter of it for all four (-DMULTICAST=0: each block fetches all).
// v's and o's quarters are taken to lie together, which is better than they would.

#include "../../../leetdist/kernels/constant_decay/cuda/hopper.cuh"

constexpr int BLOCKS = 4, WIDE = CHUNK * 256, QUARTER = WIDE / BLOCKS, STAGE = 2 * WIDE + QUARTER;

__device__ __forceinline__ void fetch_for_all(Word to, const char* from, int bytes, Word arrival) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(arrival), "h"(Bits(15)) : "memory");
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(64, 1)
walk(const char* q, const char* k, const char* v, char* o, Offset chunks) {
    __shared__ alignas(8) Long barriers[2 * STAGES];
    const Word base = shared_memory(), full = Word(__cvta_generic_to_shared(barriers)), empty = full + STAGES * 8;
    const int rank = cluster_rank();
    const Offset head = blockIdx.x / BLOCKS * chunks;
    if (threadIdx.x == 0)
        for (int i = 0; i < STAGES; i++) init_arrival(full + i * 8), init_arrival(empty + i * 8, MULTICAST ? BLOCKS : 1);
    publish();
    meet_cluster();
    if (threadIdx.x == 0) {
        for (int i = 0; i < int(chunks); i++) {
            const int stage = i % STAGES;
            const Word place = base + stage * STAGE, arrival = full + stage * 8;
            if (i >= STAGES) wait_arrival(empty + stage * 8, i / STAGES - 1 & 1);
            expect(arrival, STAGE);
            const Offset at = (head + i) * WIDE;
            if (MULTICAST) {
                fetch_for_all(place + rank * QUARTER, q + at + rank * QUARTER, QUARTER, arrival);
                fetch_for_all(place + WIDE + rank * QUARTER, k + at + rank * QUARTER, QUARTER, arrival);
            } else {
                fetch_bytes(place, q + at, WIDE, arrival), fetch_bytes(place + WIDE, k + at, WIDE, arrival);
            }
            fetch_bytes(place + 2 * WIDE, v + at + rank * QUARTER, QUARTER, arrival);
        }
    } else if (threadIdx.x == 32) {
        auto done = [&](int i) {  // its place may be filled again, in all four blocks
            if (MULTICAST)
                for (int other = 0; other < BLOCKS; other++) arrive(empty + i % STAGES * 8, other);
            else
                arrive(empty + i % STAGES * 8);
        };
        for (int i = 0; i < int(chunks); i++) {
            wait_arrival(full + i % STAGES * 8, i / STAGES & 1);
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                         ::"l"(o + (head + i) * WIDE + rank * QUARTER), "r"(base + i % STAGES * STAGE + 2 * WIDE),
                           "r"(QUARTER) : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
            if (i > 0) done(i - 1);
        }
        wait_writes();
    }
    __syncwarp();
    meet_cluster();
}
