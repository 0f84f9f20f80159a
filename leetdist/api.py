"""The public functions: they check, plan, and hand over to the autograd function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from leetdist.arguments import for_autograd, in_memory, transformed, without_autocast
from leetdist.engine import ops
from leetdist.engine.call import run
from leetdist.engine.checks import ONE_DEVICE, check_step, describe
from leetdist.engine.inputs import a_head
from leetdist.operators.dispatch import decoder
from leetdist.operators.methods import attention_on_one_device
from leetdist.sequence.group import check_alone, name_of, resolve

if TYPE_CHECKING:
    from leetdist.sequence.group import Group


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
    group: Group | None = None,
    tile: int | None = None,
    precision: str | None = None,
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
    group: Group | None = None,
    tile: int | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
    group: Group | None = None,
    tile: int | None = None,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    method: str = "auto",
    group: Group | None = None,
    tile: int | None = None,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exponentially decaying causal linear attention, on one device or over a sequence sharded across ranks.

    For each batch entry and head, with `gamma_t = exp(log_decay)`, the same for all tokens or one for each:

        S_t = gamma_t S_{t-1} + k_t v_t^T        o_t = scale * q_t^T S_t

    Differentiable in q, k, v, log_decay and initial_state (once). The result on P ranks is, bit for bit, the shards of
    the result on one device, forward and backward; also when, for the same `tile`, a sequence is split in time at a
    tile boundary, documents are packed, or the batch is larger.

    Args:
        q: (B, H, N, Dk), fp32, bf16, fp16 (fp64 too, in PyTorch's own kernels); any strides.
        k: (B, H, N, Dk), same dtype and device. Each of q, k and v may have fewer heads, of a number that divides the
            largest, H: then consecutive heads share one.
        v: (B, H, N, Dv).
        log_decay: natural log of the decay, <= 0, fp32; None is no decay. (H,) or (H, 1, 1) is one decay a head, the
            same for all tokens. (B, H, N) is one a token, by which the state before that token decays; -inf makes the
            state start anew. Under a group (B, H, N) is this rank's shard, like q, and so is its gradient.
            A positive value or NaN is a ValueError where the host reads the values. Of those on a GPU it does not read
            (B, H, N), nor (H,) that are learnt, because that would stop the stream: there outputs are NaN from such a
            token on, or of such a head. LEETDIST_CHECK_VALUES=1 has them read all the same.
        scale: factor of the output.
        initial_state: (B, H, Dk, Dv) fp32, or (documents, H, Dk, Dv) with `cu_seqlens`; None is zero. Under a group it
            is given on the first rank only.
        return_state: return the state after the last token as well; under a group, every rank gets it.
        cu_seqlens: (documents + 1,) int32 or int64, token offsets of documents packed in one row (B = 1), from 0 to N;
            under a group, offsets in the whole sequence, which need not lie on any grid. The state restarts at each.
        method: "auto", or by name: "block", "causal_dot_product", "lightning", "fleet"; on one device also "vanilla"
            and "recursion", which need no tiles (and can be differentiated twice). `explain` says what "auto" takes.
        group: ProcessGroup, 1-D DeviceMesh or virtual group whose ranks hold consecutive shards in rank order; None
            takes the surrounding `sequence_parallel`, and without one computes on this device alone. All ranks call
            forward, and backward, together.
        tile: tile length in tokens, a power of two >= 16: pins the order of summation. None chooses from the length of
            the whole sequence.
        precision: None keeps the accuracy of the dtype: relative errors of 1e-6 in fp32, 2.4e-3 in bf16. "tf32": fp32
            inputs, products of 11-bit numbers (1e-3), faster. "high": bf16 and fp16 inputs, state and scores with the
            accuracy of fp32, so that the rounding of the output is all that is left (1.8e-3 in bf16), slower. All ranks
            must ask for the same. Kernels that compute in fp32 anyway (on the CPU; "fleet", "causal_dot_product") do.

    Returns:
        o, (B, H, N, Dv) in q's dtype; or (o, state) with `return_state`, state fp32 shaped as `initial_state`.

    Raises:
        ValueError: an argument is wrong (the message says which, what it is, what it must be), shard boundaries are off
            the tile grid, or the ranks disagree; under a group every rank raises.
        RuntimeError: a rank does not answer within the timeout of the group, or of LEETDIST_TIMEOUT (seconds).

    Source: LeetDecoding, arXiv 2501.02573, eq. 1; RetNet, arXiv 2307.08621, eqs. 5 to 7; Lightning Attention-2, arXiv
    2401.04658, for the blocked form; Mamba-2, arXiv 2405.21060, section 6, for a decay a token.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 100, 16) for _ in range(3))
    >>> log_decay = torch.tensor([-0.01, -0.5])
    >>> o, state = leetdist.linear_attention(q, k, v, log_decay, scale=16**-0.5, return_state=True)
    >>> o.shape, state.shape
    (torch.Size([1, 2, 100, 16]), torch.Size([1, 2, 16, 16]))
    """
    log_decay = a_head(log_decay, q, k, v)
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "return_state": return_state,
        "cu_seqlens": cu_seqlens,
        "method": method,
        "tile": tile,
        "precision": precision,
    }
    if isinstance(method, str) and method in ONE_DEVICE and resolve(group) is None:
        problem = describe(q, k, v, log_decay, **options, read_values=not ops.wanted(q))
        o, state = attention_on_one_device(problem, q, k, v, log_decay, initial_state)
        return (o, state) if return_state else o
    if ops.wanted(q):
        o, state = ops.linear_attention(q, k, v, log_decay, options, name_of(group))
        return (o, state) if return_state else o
    o, state = run((q, k, v, log_decay), options, resolve(group))
    return (o, state) if return_state else o


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Any,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    inplace: bool = False,
) -> tuple[Tensor, Any]:
    """One token of decoding: `state = gamma state + k v^T`, `o = scale * q^T state`; differentiable.

    On a GPU, without gradients, this is one kernel, which reads and writes the state once and can be captured in a CUDA
    graph. The state is rounded once a token: after 65,536 tokens that add to it, it is off by 4e-6 (fp32). Where
    nothing is added, a loss of less than half a unit of the last place is rounded away, so that under a decay of less
    than 1e-5 a token a state forgets more slowly than it should.

    Args:
        q: (B, H, 1, Dk), fp32, bf16, fp16 or fp64.
        k: (B, H, 1, Dk), same dtype and device. Each of q, k and v may have fewer heads, which divide the largest.
        v: (B, H, 1, Dv).
        state: (B, H, Dk, Dv) fp32 (fp64 with fp64 inputs), as `linear_attention` returns it. Or a `State`, as `stream`
            makes it: then o has the bits that one call gives this token, the state returned is another `State`, its
            decay (but a token's own) and scale count, and nothing is differentiable.
        log_decay: (H,) or (H, 1, 1) fp32, or (B, H, 1), this token's; natural log, <= 0 (-inf: the token starts
            anew); None is no decay.
        scale: factor of the output.
        inplace: write the new state over `state` and return it (what a captured graph wants); not differentiable.

    Returns:
        o, (B, H, 1, Dv) in q's dtype, and the new state, shaped and typed as `state`.

    Raises:
        ValueError: an argument is wrong (the message says which, what it is and what it must be), or a
            `sequence_parallel` of several ranks surrounds the call: a token has no shards.

    Source: RetNet, arXiv 2307.08621, eq. 6 (recurrent form).

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 10, 16) for _ in range(3))
    >>> o, state = leetdist.linear_attention(q[:, :, :9], k[:, :, :9], v[:, :, :9], return_state=True)
    >>> last, state = leetdist.linear_attention_step(q[:, :, 9:], k[:, :, 9:], v[:, :, 9:], state)
    >>> torch.testing.assert_close(last, leetdist.linear_attention(q, k, v)[:, :, 9:])
    """
    check_alone("linear_attention_step")
    log_decay = a_head(log_decay, q, k, v)
    if not isinstance(state, Tensor) and hasattr(state, "boundary"):  # a State
        o, after = state.step(q, k, v, log_decay, scale=scale, inplace=inplace)
        return o, after
    compiling = torch.compiler.is_compiling()
    plain = not compiling and (transformed() or ops.without_numbers(q))  # by operations, which all of PyTorch follows
    problem = describe(
        q, k, v, log_decay, read_values=not (compiling or plain),
        scale=scale, initial_state=None, return_state=True, cu_seqlens=None, method="auto", tile=None,
    )  # fmt: skip
    check_step(problem, q, state, inplace=inplace)
    out = state if inplace else None
    differentiable = problem.needs_grad or (torch.is_grad_enabled() and state.requires_grad)
    if compiling and not differentiable:
        o, new = _step_op(q, k, v, state, log_decay, problem.scale)
        return o, state.copy_(new) if inplace else new
    choice = None if compiling or plain else decoder("step", problem)
    if not differentiable and choice is not None and choice.implementation.compiler:
        step = choice.function()
        return step(*in_memory(q, k, v, state, log_decay), scale=problem.scale, out=out)
    from leetdist.kernels.constant_decay.pytorch import decode

    if differentiable:
        q, k, v, state = (for_autograd(x) for x in (q, k, v, state))
        log_decay = None if log_decay is None else for_autograd(log_decay)
    with without_autocast(q.device):
        return decode.step(q, k, v, state, log_decay, scale=problem.scale, out=out)


def _run_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return linear_attention_step(q, k, v, state, log_decay, scale=scale)


_step_op = ops.define(
    "linear_attention_step",
    "(Tensor q, Tensor k, Tensor v, Tensor state, Tensor? log_decay, float scale) -> (Tensor, Tensor)",
    _run_step,
    lambda q, k, v, state, log_decay, scale: (
        q.new_empty(*state.shape[:2], 1, v.shape[3]),
        state.new_empty(state.shape),
    ),
)


__all__ = ["linear_attention", "linear_attention_step"]
