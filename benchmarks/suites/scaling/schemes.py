"""What scaling.py is given, and what it measures beside leetdist: other ways to pass states, and fla."""

from __future__ import annotations

import importlib.util
import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leetdist.engine.checks import describe
from leetdist.kernels.common.tiles import Tiles
from leetdist.operators.methods import kernels_for
from leetdist.testing.equality import lightning_slopes

# A decay a head (Lightning Attention's slopes), one a token, and one a token of Mamba-2's heads: twice as many of v,
# half as wide, and a quarter as many of q and k.
OPERATORS = ("constant", "token", "mamba2")


def inputs(tokens: int, args: Namespace, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, do: (1, H, N, D) in a model's (1, N, H, D) layout; log_decay."""
    mamba = args.operator == "mamba2"
    shared = args.heads // 4 if mamba else args.heads
    heads, columns = (2 * args.heads, args.dim // 2) if mamba else (args.heads, args.dim)
    generator = torch.Generator(device).manual_seed(tokens)

    def normal(heads: int, columns: int) -> Tensor:
        shape = (1, tokens, heads, columns)
        return torch.randn(shape, generator=generator, device=device, dtype=args.dtype).transpose(1, 2)

    q, k, v, do = normal(shared, args.dim), normal(shared, args.dim), normal(heads, columns), normal(heads, columns)
    if args.operator == "constant":
        return q, k, v, do, lightning_slopes(heads).to(device)
    # As Mamba-2 begins: dt from 0.001 to 0.1, each as likely by its logarithm, times A from -1 to -16.
    dt = torch.empty(1, heads, tokens, device=device).uniform_(math.log(1e-3), math.log(0.1), generator=generator)
    return q, k, v, do, -dt.exp() * torch.linspace(1, 16, heads, device=device)[:, None]


def around_our_kernels(
    tokens: int, tile: int, transport: Any, args: Namespace, device: torch.device
) -> dict[tuple[str, str], Callable[[], Any]]:
    """Two other ways to pass states, around the same kernels; their sums associate otherwise than one device's."""
    if args.operator != "constant":
        return {}
    q, k, v, _, decay = inputs(tokens, args, device)
    options: dict[str, Any] = {"initial_state": None, "return_state": False, "cu_seqlens": None, "tile": tile}
    kernels = kernels_for(describe(q, k, v, decay, scale=1.0, method="block", **options), tokens)
    tiles = Tiles(tile, (0, tokens))
    group, rank, ranks = transport.group, transport.rank, transport.size
    shape = (1, args.heads, args.dim, args.dim)
    # gamma^(tokens between another rank's end and this rank's start)
    distance = torch.tensor([(rank - 1 - other) * tokens for other in range(ranks)], device=q.device)
    weights = torch.exp(decay[:, None] * distance.clamp_min(0)) * (distance >= 0)

    def outputs(states: Tensor) -> Tensor:
        return kernels.tile_outputs(
            q, k, v, states, decay, tiles, reverse=False, scale=1.0, state_scale=1.0, out_dtype=q.dtype
        )

    def gathered() -> Tensor:
        states = kernels.tile_states(k, v, decay, tiles, reverse=False)
        mine = kernels.fold(states.clone(), None, decay, tiles, reverse=False)
        everyone = mine.new_empty(ranks, *shape)
        dist.all_gather_into_tensor(everyone.view(-1), mine.view(-1), group=group)
        initial = torch.einsum("hr,rbhij->bhij", weights, everyone).contiguous()
        kernels.fold(states, initial, decay, tiles, reverse=False)
        return outputs(states)

    def ring() -> Tensor:
        states = kernels.tile_states(k, v, decay, tiles, reverse=False)
        initial = torch.zeros(shape, device=q.device)
        if rank > 0:
            dist.recv(initial, group=group, group_src=rank - 1)
        final = kernels.fold(states, initial, decay, tiles, reverse=False)
        if rank < ranks - 1:
            dist.send(final, group=group, group_dst=rank + 1)
        return outputs(states)

    return {("all-gather, LASP-2's scheme", "forward"): gathered, ("serial ring, LASP's scheme", "forward"): ring}


def fla(tokens: int, args: Namespace, device: torch.device) -> dict[tuple[str, str], Callable[[], Any]]:
    """fla's chunk_simple_gla on one GPU."""
    if args.operator != "constant" or device.type != "cuda" or importlib.util.find_spec("fla") is None:
        return {}
    from fla.ops.simple_gla import chunk_simple_gla

    *rows, decay = inputs(tokens, args, device)
    q, k, v, do = (x.transpose(1, 2) for x in rows)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
        out: Tensor = chunk_simple_gla(q, k, v, g_gamma=decay, scale=1.0)[0]
        return out

    def both() -> Any:
        return torch.autograd.grad(forward(*leaves), leaves, do)

    calls: dict[tuple[str, str], Callable[[], Any]] = {("fla", "forward"): forward, ("fla", "forward + backward"): both}
    return {key: call for key, call in calls.items() if key[1] in args.fla}
