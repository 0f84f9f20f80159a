"""The mean loss over all tokens of the job, scaled so that averaged gradients come out right."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from leetdist.arguments import as_float, as_str, is_readable
from leetdist.mesh import all_sum, all_transports
from leetdist.sequence.agreement import gathered
from leetdist.sequence.once import check_not_transformed

if TYPE_CHECKING:
    from leetdist.mesh import Mesh
    from leetdist.sequence.transport import Transport


def reduce_loss(
    loss_sum: Tensor,
    n_tokens: Tensor | int,
    mesh: Mesh | None,
    *,
    total_tokens: Tensor | int | None = None,
    gradients: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The mean loss over every label that counts, on all ranks; its backward gives each rank its own share.

    A mean of the ranks' means is wrong wherever shards are uneven or labels are masked. Here the sums are added up
    first, and the backward is scaled for what happens to gradients next: DDP, FSDP2 and ZeRO 1 to 3 average them over
    all ranks (`gradients="mean"`, right for each of them without further settings), a plain sum does not.

    Call it outside of what torch.compile traces, which knows no meshes.

    With gradient accumulation, pass the step's `total_tokens`: the shares of the micro-batches then add up to the mean.

    Args:
        loss_sum: scalar, the loss summed over this rank's labels that count.
        n_tokens: how many labels that is, in tokens.
        mesh: the job's (dp, sp) mesh, or a group that is all of the job; None for one process.
        total_tokens: labels that count over all ranks, and micro-batches, of the step; None sums `n_tokens`.
        gradients: what is done to gradients over the ranks of `mesh`.

    Returns:
        scalar, loss_sum's dtype: the same number on every rank; 0 where no label counts.

    Raises:
        ValueError: `loss_sum` is no scalar, `gradients` is neither, or the ranks disagree on `gradients` or
            `total_tokens`, whose values on a GPU are not read; every rank raises.
        RuntimeError: a rank does not answer.

    Source: measured factors, gradients compared with one process: an average of local means was off by 0.03 where the
    largest gradient was 0.46.

    >>> import torch, leetdist
    >>> losses = [torch.tensor([1., 2., 3.]), torch.tensor([6.])]
    >>> def rank(group):
    ...     mine = losses[group.rank]
    ...     return leetdist.reduce_loss(mine.sum(), len(mine), group)
    >>> leetdist.virtual_ranks(rank, ranks=2)
    [tensor(3.), tensor(3.)]
    """
    transports = [] if mesh is None else all_transports(mesh)
    try:
        _check(loss_sum, n_tokens, total_tokens, gradients)
    except ValueError as error:
        _agree(error, transports)
        raise
    if transports:
        _agree((as_str("gradients", gradients), _known(total_tokens)), transports)
        check_not_transformed("reduce_loss over ranks", loss_sum)
    mine = torch.stack([loss_sum.detach().double().reshape(()), loss_sum.new_tensor(0.0).double() + n_tokens])
    everyone = all_sum(mine, transports)
    tokens = everyone[1] if total_tokens is None else everyone.new_tensor(0.0) + total_tokens
    tokens = tokens.clamp_min(1)
    ranks = 1
    for transport in transports:
        ranks *= transport.size
    factor = (ranks if gradients == "mean" else 1) / tokens
    mean: Tensor = _Share.apply(loss_sum, everyone[0] / tokens, factor)
    return mean


def _check(loss_sum: Any, n_tokens: Any, total_tokens: Any, gradients: Any) -> None:
    """One rank's arguments."""
    if not isinstance(loss_sum, Tensor) or loss_sum.numel() != 1:
        raise ValueError(f"loss_sum must be a scalar tensor, got {getattr(loss_sum, 'shape', loss_sum)}")
    if not loss_sum.is_floating_point() or loss_sum.is_meta:
        raise ValueError(f"loss_sum must be a floating number, got {loss_sum.dtype} on {loss_sum.device}")
    for name, count in (("n_tokens", n_tokens), ("total_tokens", total_tokens)):
        if count is not None or name == "n_tokens":
            _check_count(name, count)
    if not isinstance(gradients, str) or gradients not in ("mean", "sum"):
        raise ValueError(f"gradients must be 'mean' or 'sum', got {gradients!r}")


def _agree(mine: Any, transports: list[Transport]) -> None:
    """ValueError on every rank of all transports where one's arguments differ, or are bad: `mine` is its error then."""
    for transport in transports:
        try:
            everyone = gathered(mine, transport, "the arguments of reduce_loss")
            for rank, theirs in enumerate(everyone):
                for name, value, first in zip(("gradients", "total_tokens"), theirs, everyone[0], strict=True):
                    if value != first:
                        raise ValueError(f"reduce_loss: rank {rank} has {name} {value}, rank 0 has {first}")
        except ValueError as error:  # the ranks of the next transport have to hear of it too
            mine = error
    if isinstance(mine, ValueError):
        raise mine


def _known(count: Tensor | int | None) -> float | str | None:
    """A number of tokens as ranks compare it: the values of a tensor on a GPU are not read."""
    if count is None:
        return None
    return float(count) if not isinstance(count, Tensor) or is_readable(count) else "a tensor"


def _check_count(name: str, count: Any) -> None:
    """A number of tokens; of a tensor its value too, where that can be read."""
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.is_complex() or count.dtype is torch.bool or count.is_meta:
            got = f"{count.dtype} of shape {tuple(count.shape)} on {count.device}"
            raise ValueError(f"{name} must be one number of tokens, got {got}")
        if is_readable(count):
            _check_count(name, count.item())
    elif not 0 <= as_float(name, count) < math.inf:
        raise ValueError(f"{name} must be a number of tokens, at least 0, got {count!r}")


class _Share(torch.autograd.Function):
    """The value is the whole job's; the gradient is this rank's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(loss_sum: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        return mean.to(loss_sum.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        loss_sum, _, factor = inputs
        ctx.save_for_backward(factor)
        ctx.save_for_forward(factor)
        ctx.like = loss_sum.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return (grad * factor).to(grad.dtype).reshape(ctx.like), None, None

    @staticmethod
    def jvp(ctx: Any, loss_sum: Tensor, *_: None) -> Tensor:
        (factor,) = ctx.saved_tensors
        return (loss_sum * factor).to(loss_sum.dtype).reshape(())


__all__ = ["reduce_loss"]
