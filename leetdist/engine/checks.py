"""What a call of the operator asks for, checked once: everything behind this takes it for granted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from leetdist.arguments import as_bool, as_tile, autocasts, check_plain
from leetdist.engine.hints import layout_hint, more_heads_than_tokens, warn_of_layout
from leetdist.engine.inputs import canonical_options
from leetdist.engine.values import bad_step, boundaries_of, decays_of
from leetdist.kernels.runtime.settings import variable
from leetdist.operators.problem import Problem, state_dtype
from leetdist.sequence.documents import check_form, check_one_row
from leetdist.sequence.grid import Layout, default_tile
from leetdist.sequence.shard import check_cut

METHODS = ("auto", "vanilla", "recursion", "block", "causal_dot_product", "lightning", "fleet")
ONE_DEVICE = ("vanilla", "recursion")
PRECISIONS = (None, "tf32", "high")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
    method: str,
    tile: int | None,
    precision: str | None = None,
    weighted: bool = False,
    skipped: bool = False,
    gated: bool = False,
    factor_grads: bool = False,
    around: tuple[tuple[str, str], ...] = (),
    rank: int = 0,
    ranks: int = 1,
    sharded: bool = False,
    read_values: bool = True,
    sees_grads: bool = True,
    traced_grads: tuple[bool, bool] = (False, False),
) -> Problem:
    """Check one rank's arguments and describe them; ValueError names the argument, what it is and what it must be.

    read_values: check the values of log_decay too, which stops a GPU's stream where they are not known yet.
    sees_grads: whether what requires grad here is what gradients will be asked for.
    traced_grads: of an op, which sees none, whether autograd records it by q, k, v or log_decay, and by initial_state.
    """
    check_qkv(q, k, v)
    batch, q_heads, tokens, dk = q.shape
    heads = max(q_heads, k.shape[1], v.shape[1])
    if tokens == 0 and ranks == 1:
        raise ValueError("q: N is 0; a sequence needs at least one token")
    options = canonical_options(scale=scale, return_state=return_state, method=method, tile=tile, precision=precision)
    check_options(**options, dtype=q.dtype, sharded=sharded)
    if log_decay is not None:
        check_log_decay(log_decay, q, heads, read_values=read_values)
    warn_of_layout(q, log_decay)
    documents = None
    if cu_seqlens is not None:
        documents = check_documents(cu_seqlens, batch, tokens if ranks == 1 else None, q)
    if initial_state is not None:
        if rank > 0:
            raise ValueError(f"initial_state is given on the first rank of the group only, got one on rank {rank}")
        rows = batch if documents is None else len(documents) - 1
        check_state("initial_state", initial_state, (rows, heads, dk, v.shape[3]), q)
    grad = torch.is_grad_enabled()
    learnt = log_decay is not None and log_decay.requires_grad
    return Problem(
        batch=batch,
        q_heads=q_heads,
        k_heads=k.shape[1],
        v_heads=v.shape[1],
        dk=dk,
        dv=v.shape[3],
        dtype=q.dtype,
        device=q.device,
        documents=documents,
        has_decay=log_decay is not None,
        grad_mode=grad,
        needs_grad=grad and (q.requires_grad or k.requires_grad or v.requires_grad or learnt),
        needs_initial_grad=grad and initial_state is not None and initial_state.requires_grad,
        needs_decay_grad=grad and learnt,
        has_initial=initial_state is not None,
        tokens=tokens,
        lanes=wanted_lanes(),
        weighted=weighted,
        skipped=skipped,
        gated=gated,
        factor_grads=factor_grads,
        around=around,
        sees_grads=sees_grads,
        traced_grad=traced_grads[0],
        traced_initial_grad=traced_grads[1],
        requires_grad=tuple(grad and x.requires_grad for x in (q, k, v)) if sharded and documents is not None else (),
        operator="constant_decay" if log_decay is None or log_decay.ndim == 1 else "token_decay",
        **options,
    )


def check_options(
    *,
    scale: float,
    return_state: bool,
    method: str,
    tile: int | None,
    precision: str | None,
    dtype: torch.dtype,
    sharded: bool,
) -> None:
    """The values of canonical options."""
    if not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")
    if dtype != torch.float64 and abs(scale) > torch.finfo(torch.float32).max:
        raise ValueError(f"scale must be a number that fp32 holds beside {dtype} inputs, got {scale!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if sharded and method in ONE_DEVICE:
        able = ", ".join(name for name in METHODS if name not in ONE_DEVICE)
        raise ValueError(f"method {method!r} works on one device only; under a group use one of {able}")
    if tile is not None:
        as_tile(tile)
    if precision not in PRECISIONS:
        raise ValueError(f'precision must be None, "tf32" or "high", got {precision!r}')
    if precision == "tf32" and dtype != torch.float32:
        raise ValueError(f'precision "tf32" is for float32 inputs, got {dtype}')


def check_agreement(everyone: Sequence[Problem]) -> None:
    """ValueError, the same on every rank, that says who differs in what."""
    first = everyone[0]
    for rank, theirs in enumerate(everyone):
        if not isinstance(theirs, Problem) or dict(theirs.around).keys() != dict(first.around).keys():
            raise ValueError(f"linear_attention: rank {rank} makes another call of the group")
        for (name, other), (_, ours) in zip(theirs.around, first.around, strict=True):
            if other != ours:
                raise ValueError(
                    f"the ranks of the group disagree on {name}: rank {rank} has {other}, rank 0 has {ours}"
                )
    check_cut([problem.sharded_from for problem in everyone])
    only_here = {
        "tokens", "has_initial", "needs_initial_grad", "grad_mode", "captured", "sharded_from", "traced_initial_grad"
    }  # fmt: skip
    if first.needs_initial_grad:  # then every rank has a backward pass
        only_here.remove("grad_mode")
    for rank, theirs in enumerate(everyone):
        for field in fields(Problem):
            ours, other = getattr(first, field.name), getattr(theirs, field.name)
            if field.name == "device":
                ours, other = ours.type, other.type
            if field.name not in only_here and ours != other:
                raise ValueError(
                    f"the ranks of the group disagree on {field.name}: rank {rank} has {other}, rank 0 has {ours}"
                )
    if first.traced_initial_grad and not first.traced_grad:
        raise ValueError(
            "initial_state needs a gradient, so q, k, v or log_decay must, on every rank: of a compiled or transformed "
            "call, a rank that records nothing has no backward pass, for which the first rank would wait"
        )


def check_declared(problem: Problem, lengths: tuple[int, ...], rank: int) -> None:
    """This rank keeps the promise of `sequence_parallel(lengths=...)`."""
    if problem.tokens != lengths[rank]:
        raise ValueError(
            f"q: sequence_parallel(lengths={list(lengths)}) promises {lengths[rank]} tokens on rank {rank}, got "
            f"{problem.tokens}"
        )


def global_layout(everyone: Sequence[Problem]) -> tuple[Layout, int]:
    """How the tokens lie over the ranks, and the tile length; ValueError where the boundaries are off the grid."""
    problem = everyone[0]
    layout = Layout(problem.batch, tuple(p.tokens for p in everyone), problem.documents)
    total = layout.offsets[-1]
    if total == 0:
        raise ValueError("q: N is 0 on every rank; a sequence needs at least one token")
    tile = problem.tile or default_tile(total)
    if problem.documents is not None:
        if problem.documents[-1] != total:
            raise ValueError(
                f"cu_seqlens must end at the number of tokens on all ranks, {total}, got {problem.documents[-1]}"
            )
        return layout, tile
    for rank, offset in enumerate(layout.offsets[1:-1]):
        if offset % tile and offset < total:
            raise ValueError(
                f"shard boundaries must lie on the tile grid: rank {rank} ends at token {offset}, which is no multiple "
                f"of the tile length {tile} (of {total} tokens in all). shard_sequence cuts on the grid; or pass a "
                f"tile that divides the boundaries"
            )
    return layout, tile


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_plain(name, x)
        shape = x.shape
        if len(shape) != 4:
            raise ValueError(f"{name} must have shape (B, H, N, D), got {tuple(shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype, {q.dtype}, got {x.dtype}{_autocast_hint(q.device)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device, {q.device}, got {x.device}")
        if shape[0] == 0 or shape[1] == 0 or shape[3] == 0:
            raise ValueError(f"{name} must have no empty dimension but N, got {tuple(shape)}")
    batch, _, tokens, dk = q.shape
    heads = max(q.shape[1], k.shape[1], v.shape[1])
    if k.shape[3] != dk:
        raise ValueError(f"k must have q's head dimension Dk = {dk}, got {k.shape[3]} (shape {tuple(k.shape)})")
    for name, x in (("q", q), ("k", k), ("v", v)):
        rows, own, length, _ = x.shape
        if rows != batch or length != tokens:
            raise ValueError(
                f"{name} must have q's batch and tokens, B = {batch} and N = {tokens}, got shape {tuple(x.shape)}"
                + (layout_hint(q) if (rows, own) == (batch, heads) and more_heads_than_tokens(q) else "")
            )
        if heads % own:
            most = next(other for other, y in (("q", q), ("k", k), ("v", v)) if y.shape[1] == heads)
            raise ValueError(f"{name} must have a number of heads that divides {most}'s {heads}, got {own}")


def _autocast_hint(device: torch.device) -> str:
    if not autocasts(device):
        return ""
    return "; autocast leaves some operations in fp32: cast q, k and v to one dtype before the call"


def check_log_decay(log_decay: Tensor, q: Tensor, heads: int, *, read_values: bool = True) -> None:
    """Shape, dtype, device, and that no value is positive or NaN. Of a decay a token, or a head that is learnt, the
    values are on the GPU, and read there only if LEETDIST_CHECK_VALUES=1 says so: what is no log-decay makes NaN of the
    outputs that see it."""
    check_plain("log_decay", log_decay, "a tensor or None")
    batch, _, tokens, _ = q.shape
    if log_decay.shape not in ((heads,), (batch, heads, tokens)):
        hint = ""
        if log_decay.shape == (tokens,):
            hint = layout_hint(q)
        elif log_decay.shape == (batch, tokens, heads):
            hint = layout_hint(q) if more_heads_than_tokens(q) else "; pass log_decay.transpose(1, 2)"
        raise ValueError(
            f"log_decay must have shape (H,) = ({heads},), or (B, H, N) = {(batch, heads, tokens)}, got "
            f"{tuple(log_decay.shape)}{hint}"
        )
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_decay must be float32 (float64 with fp64 inputs), got {log_decay.dtype}")
    if log_decay.device != q.device:
        raise ValueError(f"log_decay must be on q's device, {q.device}, got {log_decay.device}")
    if log_decay.ndim == 3:
        bad = bad_step(log_decay, read=read_values)
        if bad is not None:
            row, head, token = bad
            raise ValueError(
                f"log_decay must be <= 0 (the natural log of a decay of at most 1), got {log_decay[bad].item()} for "
                f"head {head} at token {token}" + (f" of batch entry {row}" if batch > 1 else "")
            )
        return
    decays = decays_of(log_decay, read=read_values)
    if decays is not None and decays.bad is not None:
        raise ValueError(
            f"log_decay must be <= 0 (the natural log of a decay of at most 1), got {decays.values[decays.bad]} for "
            f"head {decays.bad}"
        )


def check_state(name: str, state: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """Shape, dtype and device of a state."""
    check_plain(name, state)
    if tuple(state.shape) != shape:
        swapped = tuple(state.shape) == (shape[0], q.shape[2], *shape[2:]) and more_heads_than_tokens(q)
        hint = layout_hint(q) if swapped else ""
        raise ValueError(
            f"{name} must have shape (B or documents, H, Dk, Dv) = {shape}, got {tuple(state.shape)}{hint}"
        )
    wanted = state_dtype(q.dtype)
    if state.dtype != wanted:
        raise ValueError(f"{name} must be {wanted}, got {state.dtype}")
    if state.device != q.device:
        raise ValueError(f"{name} must be on q's device, {q.device}, got {state.device}")


def check_written(name: str, x: Tensor) -> None:
    """A tensor that is changed in place: no element of it may stand for several, nor for its negative."""
    if not torch.compiler.is_compiling() and x.is_neg():  # of which Dynamo knows nothing
        raise ValueError(f"{name} is changed in place, so it must not be a view of negated values")
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{name} is changed in place, so it must not be expanded, got strides {x.stride()}")
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1):
        if stride <= reach:
            raise ValueError(f"{name} is changed in place, so its elements must not overlap, got strides {x.stride()}")
        reach += stride * (size - 1)


def check_step(problem: Problem, q: Tensor, state: Tensor, *, inplace: bool) -> None:
    """What one step of decoding needs beside `describe`."""
    if problem.tokens != 1:
        raise ValueError(f"q must hold one token, (B, H, 1, Dk), got shape {tuple(q.shape)}")
    check_state("state", state, (problem.batch, problem.heads, problem.dk, problem.dv), q)
    if not isinstance(inplace, bool):
        raise ValueError(f"inplace must be True or False, got {inplace!r}")
    if inplace:
        check_written("state", state)
    if inplace and (problem.needs_grad or (torch.is_grad_enabled() and state.requires_grad)):
        raise ValueError("inplace must be False where gradients are recorded: the old state is needed for them")


def check_gamma(gamma: Tensor | None, is_mask_weight: bool, is_need_exp: bool, q: Tensor) -> None:
    """The decay arguments of `causal_linear_decoder`, but for gamma's values."""
    as_bool("is_mask_weight", is_mask_weight)
    as_bool("is_need_exp", is_need_exp)
    if not is_mask_weight:
        if gamma is not None:
            raise ValueError("gamma is given, so is_mask_weight must be True, got False")
        return
    heads = q.shape[1]
    wanted = f"a floating tensor of shape (H,) = ({heads},) where is_mask_weight is True"
    check_plain("gamma", gamma, wanted)
    assert gamma is not None
    if not gamma.is_floating_point() or gamma.shape != (heads,):
        raise ValueError(f"gamma must be {wanted}, got {gamma.dtype} of shape {tuple(gamma.shape)}")
    if gamma.device != q.device:
        raise ValueError(f"gamma must be on q's device, {q.device}, got {gamma.device}")


def check_documents(cu_seqlens: Tensor, batch: int, tokens: int | None, q: Tensor | None = None) -> tuple[int, ...]:
    """The boundaries as numbers. q: of which they are, if of one."""
    check_form(cu_seqlens)
    check_one_row(batch)
    boundaries = boundaries_of(cu_seqlens)
    if tokens is not None and boundaries[-1] != tokens:
        hint = layout_hint(q) if q is not None and boundaries[-1] == q.shape[1] else ""
        raise ValueError(f"cu_seqlens must end at the number of tokens, {tokens}, got {boundaries[-1]}{hint}")
    return boundaries


def lanes_setting() -> str | None:
    """LEETDIST_LANES, as it is."""
    return variable("LEETDIST_LANES")


def wanted_lanes() -> int | None:
    """In how many groups the heads of a sharded call are to go; None leaves it to the cost model."""
    value = lanes_setting()
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"LEETDIST_LANES must be a positive number, got {value!r}")
    return int(value)
