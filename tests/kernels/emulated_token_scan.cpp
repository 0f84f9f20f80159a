// token_scan.cu for the CPU: the kernel through a C interface.
#include "emulated_cuda.h"
#define IN 0
#define OUT 0
#include "../../kernels/constant_decay/cuda/token_scan.cu"

extern "C" void run_tile_outputs(
    const float* a, Long a_batch, Long a_head, Long a_token, Long a_share, const float* b, Long b_batch, Long b_head,
    Long b_token, Long b_share, const float* c, Long c_batch, Long c_head, Long c_token, Long c_share,
    const float* states, Long state_batch, Long state_head, Long state_tile, Long state_row, Long state_column,
    float* out, Long out_batch, Long out_head, Long out_token, const float* log_decay, const Long* table, Long heads,
    Long tiles, Long size, Long all_tokens, Long dk, Long columns, Long reverse, float scale, float state_scale,
    Long blocks
) {
    emulator.run(blocks, (columns + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS, THREADS, [=] {
        tile_outputs(a, a_batch, a_head, a_token, a_share, b, b_batch, b_head, b_token, b_share, c, c_batch, c_head,
                     c_token, c_share, states, state_batch, state_head, state_tile, state_row, state_column, out,
                     out_batch, out_head, out_token, log_decay, table, heads, tiles, size, all_tokens, dk, columns,
                     reverse, scale, state_scale);
    });
}
