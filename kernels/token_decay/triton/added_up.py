"""The gradient of a decay a token from what two passes over each tile leave (kernels/token_decay/cuda/gradients.cu).

By the names of leetdist.kernels.token_decay.triton.gradient, the passes leave A, B and M of each token, and Phi, which
is <S, R> at the start of each tile. E follows from chunk to chunk: what leaves a chunk is what has entered it, less
what its tokens read, plus what they write.

    E = Phi - sum_i A_i      Phi of the next chunk = E + sum_j B_j

Where a chunk keeps less of the state than rounding loses of these sums, E is 0 and Phi starts anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leetdist.kernels.common.memory import step_of
from leetdist.kernels.common.tiles import Tiles, ceil_div
from leetdist.kernels.constant_decay.triton.configs import padded
from leetdist.kernels.constant_decay.triton.tiles import COUNTS, span
from leetdist.kernels.runtime.triton_launch import launch
from leetdist.kernels.token_decay.triton.gradient import gradient_config
from leetdist.kernels.token_decay.triton.gradient_kernels import add_behind, add_inside, keep_states
from leetdist.kernels.token_decay.triton.sums import token_sums

CHUNK = tl.constexpr(64)  # of what is added up, as gradients.cu's
CHUNKS = 16  # that a program adds up at a time
LEAST = tl.constexpr(-14.0)  # the logarithm of what a chunk keeps at least for E not to be 0
# Bytes of kept states at most, where more than one tile is walked at a time; and flags that a program reads at a time.
KEPT, FLAGS = 64 << 20, 64


def added_up(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    states: Tensor,
    ends: Tensor,
    log_decay: Tensor,
    tiles: Tiles,
    read: Tensor,
    written: Tensor,
    across: Tensor,
    lost: tuple[Tensor, Tensor],
    *,
    scale: float,
    out: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The gradient of log_decay, (B, H, N) fp32, in `out` if given, else where A was, if that is one part.

    The first eight arguments: see leetdist.kernels.token_decay.triton.gradient.decay_gradient. read: (B, H, n, N) fp32,
    A in n parts; written: the same of B and M; across: (B, H, tiles.count) fp32, Phi; lost: (B * H * tiles.count,)
    int32 each, not 0 for tiles that hold something that is not finite. These are walked once more by the kernels of
    that module, so that what a NaN reaches is the same. weight: what v is still to be multiplied by, (B, H, N) fp32.
    Nobody reads `read` and `written` after this: at the pass's peak, what is made here lies where they did.
    """
    batch, heads, tokens = log_decay.shape
    if out is None:  # a program reads its tokens' A before it writes their gradients, and no other does
        alone = read.shape[2] == 1
        out = read[:, :, 0] if alone else torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    target = out.contiguous()  # of other tiles too
    tasks, table = batch * heads * tiles.count, tiles.needed_table(q.device)
    counts = heads, tokens, tiles.count, tiles.size
    launch(
        _add_up, (tasks,), (log_decay, read, written, across, *lost, target, table, *log_decay.stride(), *counts),
        {"REGULAR": tiles.regular, "CHUNKS": CHUNKS, "READ": read.shape[2]}, num_warps=4, num_stages=1,
    )  # fmt: skip
    rows, columns = q.shape[3], do.shape[3]
    config, chunks = gradient_config(rows, columns, q.dtype, tiles.size), ceil_div(min(tiles.size, tokens), 64)
    place = padded(rows) * config.columns
    together = max(1, min(tasks, 16, KEPT // (2 * place * chunks)))
    kept = torch.empty(together, chunks, place, dtype=q.dtype, device=q.device)
    units = torch.empty(together, chunks, dtype=torch.float32, device=q.device)
    constants: dict[str, Any] = {
        "REGULAR": tiles.regular, "CHUNK_": config.chunk, "ROWS": padded(rows), "COLUMNS": config.columns,
        "FLAGS": FLAGS,
    }  # fmt: skip
    shares = (heads // x.shape[1] for x in (q, k, v))
    sums = token_sums(log_decay, tiles, lost[1], out=written.view(batch, heads, tokens, 2))
    launch(
        _walk_again, (together,),
        (
            q, k, v, do, states, step_of(states), ends, step_of(ends), sums, target, kept, units, table, lost[1],
            weight, *((0, 0) if weight is None else weight.stride()[:2]),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
            heads, *shares, tokens, tiles.count, tiles.size, tasks, chunks, rows, columns, scale,
        ),
        constants, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out if target is out else out.copy_(target)


@triton.jit(do_not_specialize=COUNTS)
def _add_up(
    log_decay, read, written, across, early_lost, late_lost, out, table, decay_batch, decay_head, decay_token,
    heads, tokens, tiles, tile_size, REGULAR: tl.constexpr, CHUNKS: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """One tile, so many chunks at a time; late_lost becomes what is lost in either pass."""
    program = tl.program_id(0).to(tl.int64)
    tile, row = program % tiles, program // tiles
    start, length = span(table, tile, tokens, tile_size, REGULAR)
    tl.store(late_lost + program, tl.load(late_lost + program) | tl.load(early_lost + program))
    log_decay += row // heads * decay_batch + row % heads * decay_head + start * decay_token
    read += READ * row * tokens + start
    written += 2 * row * tokens + start
    out += row * tokens + start
    phi = tl.load(across + program)
    position = tl.arange(0, CHUNK)[None, :]
    for offset in range(0, length, CHUNKS * CHUNK):
        token = offset + tl.arange(0, CHUNKS)[:, None] * CHUNK + position
        here = token < length
        g = tl.load(log_decay + token.to(tl.int64) * decay_token, mask=here, other=0.0)
        a = tl.load(read + token, mask=here, other=0.0)
        for part in tl.static_range(1, READ):
            a += tl.load(read + part * tokens + token, mask=here, other=0.0)
        b = tl.load(written + token, mask=here, other=0.0)
        before = tl.load(written + token - 1, mask=here & (position > 0), other=0.0)
        kept = tl.where(tl.sum(g, 1) > LEAST, 1.0, 0.0)
        a_all, b_all = tl.sum(a, 1), tl.sum(b, 1)
        # Phi behind each chunk is a part of Phi before it, and something more.
        part, more = tl.associative_scan((kept, b_all - kept * a_all), 0, _then)
        behind = part * phi + more
        across_chunk = kept * (behind - b_all)
        inside = tl.load(written + tokens + token, mask=here, other=0.0)
        total = inside + tl.cumsum(a, 1, reverse=True) + tl.cumsum(before, 1) + across_chunk[:, None]
        tl.store(out + token, total, mask=here)
        phi = tl.sum(tl.where(tl.arange(0, CHUNKS) == CHUNKS - 1, behind, 0.0), 0)


@triton.jit
def _then(part, more, next_part, next_more):
    return part * next_part, next_part * more + next_more


@triton.jit(do_not_specialize=[*COUNTS, "tasks", "chunks"])
def _walk_again(
    q, k, v, do, states, states_step, ends, ends_step, log_decay, out, kept, units, table, lost,
    weight, weight_batch, weight_head,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, do_batch, do_head, do_token,
    heads, q_share, k_share, v_share, tokens, tiles, tile_size, tasks, chunks, rows, columns, scale,
    REGULAR: tl.constexpr, CHUNK_: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Tiles that are lost, one after the other; nearly always there is none."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    for first in range(0, tasks, programs * FLAGS):
        flags = first + program + programs * tl.arange(0, FLAGS)
        if tl.max(tl.load(lost + flags, mask=flags < tasks, other=0), 0) != 0:
            for i in range(FLAGS):
                task = first + program + programs * i
                if task < tasks:
                    if tl.load(lost + task) != 0:
                        keep_states(
                            task, program, k, v, states, states_step, log_decay, kept, units, table,
                            k_batch, k_head, k_token, v_batch, v_head, v_token, heads, k_share, v_share,
                            tokens, tiles, tile_size, chunks, 0, rows, columns, REGULAR, CHUNK_, ROWS, COLUMNS, 1,
                            weight, weight_batch, weight_head,
                        )  # fmt: skip
                        tl.debug_barrier()
                        for chunk in range(chunks):
                            add_inside(
                                task, program, chunk, q, k, v, do, log_decay, out, kept, units, table,
                                q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
                                do_batch, do_head, do_token, heads, q_share, k_share, v_share,
                                tokens, tiles, tile_size, chunks, 0, rows, columns, scale,
                                REGULAR, CHUNK_, ROWS, COLUMNS, 1, True, weight, weight_batch, weight_head,
                            )  # fmt: skip
                        tl.debug_barrier()
                        add_behind(
                            task, program, q, k, v, do, ends, ends_step, log_decay, out, kept, units, table,
                            q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
                            do_batch, do_head, do_token, heads, q_share, k_share, v_share,
                            tokens, tiles, tile_size, chunks, 0, rows, columns, scale,
                            REGULAR, CHUNK_, ROWS, COLUMNS, 1, weight, weight_batch, weight_head,
                        )  # fmt: skip
                        tl.debug_barrier()
