"""What a call would do, and why, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from leetdist.engine.plan import plan_call
from leetdist.engine.problem import ONE_DEVICE, describe
from leetdist.operators.methods import backend_of, choice_for
from leetdist.sequence.group import resolve

if TYPE_CHECKING:
    from leetdist.engine.plan import Plan
    from leetdist.engine.problem import Problem
    from leetdist.sequence.group import Group


def explain(
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
) -> str:
    """How `linear_attention` with the same arguments would be computed: method, kernels, tile, shards, and why.

    Args:
        All as `linear_attention` takes them: (B, H, N, D) tensors, fp32, bf16, fp16 or fp64. Nothing is computed; under
        a group all ranks call, and each gets its own text.

    Returns:
        Lines of text for a reader.

    Raises:
        ValueError: as `linear_attention`.

    Source: the cost model of leetdist/operators/cost.py; the methods are LeetDecoding's, arXiv 2501.02573.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 1000, 64) for _ in range(3))
    >>> print(leetdist.explain(q, k, v, method="fleet"))
    problem  B 1, H 2, N 1,000, Dk 64, Dv 64, torch.float32 on cpu, forward, no decay
    method   fleet: named by the caller
    kernels  leetdist.kernels.constant_decay.pytorch.fleet, leetdist.kernels.constant_decay.pytorch.block
    tile     128 tokens, 8 tiles: chosen from the length of the whole sequence
    shards   one device
    """
    options: dict[str, Any] = {
        "scale": scale,
        "initial_state": initial_state,
        "return_state": return_state,
        "cu_seqlens": cu_seqlens,
        "method": method,
        "tile": tile,
        "precision": precision,
    }
    transport = resolve(group)
    if method in ONE_DEVICE and transport is None:
        return _lines(describe(q, k, v, log_decay, **options), None)
    plan = plan_call(q, k, v, log_decay, **options, transport=transport)
    return _lines(plan.problem, plan)


def _lines(problem: Problem, plan: Plan | None) -> str:
    tokens = problem.tokens if plan is None else plan.layout.offsets[-1]
    decay = "" if problem.has_decay else ", no decay"
    precision = "" if problem.precision is None else f", precision {problem.precision}"
    lines = {
        "problem": f"B {problem.batch}, H {problem.heads}, N {tokens:,}, Dk {problem.dk}, Dv {problem.dv}, "
        f"{problem.dtype} on {problem.device}, {'forward and backward' if problem.needs_grad else 'forward'}"
        + decay
        + precision,
        "method": _method(problem, tokens),
    }
    if plan is not None:
        lines |= {
            "kernels": backend_of(cast(Any, plan.operator).kernels),
            "tile": f"{plan.tiles.size:,} tokens, {plan.tiles.count:,} tiles: "
            + ("named by the caller" if problem.tile else "chosen from the length of the whole sequence"),
            "shards": _shards(plan),
        }
        if plan.transport is not None:
            lines["states"] = (
                f"by {plan.transport.kind}, {plan.sent_bytes():,} bytes from this rank in the forward scan, heads in "
                f"{len(plan.lanes)} lane{'s' if len(plan.lanes) > 1 else ''}"
            )
            lines["hops"] = _hops(plan)
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def _method(problem: Problem, tokens: int) -> str:
    if problem.method in ONE_DEVICE:
        return f"{problem.method}: named by the caller; one device, no tiles"
    if problem.method != "auto":
        return f"{problem.method}: named by the caller"
    choice = choice_for(problem, tokens)
    costs = ", ".join(f"{name} {1e3 * s:.3g}" for name, s in sorted(choice.seconds.items(), key=lambda x: x[1]))
    return (
        f"{choice.method}: at most {choice.ratios[choice.method]:.2f} x the best for 1 to 16 x 32 heads of the tile's "
        f"usual length (expected ms for 4 x 32: {costs}; measured on {choice.measured_on})"
    )


def _hops(plan: Plan) -> str:
    """How many hops each head needs, and which wait for more."""
    hops, last = plan.hops(), plan.layout.ranks - 1
    why = {0: "decay at once", 1: "forget within a tile"}
    parts = []
    for count in sorted(set(hops), reverse=True):
        heads = [str(head) for head, own in enumerate(hops) if own == count]
        named = ", ".join(heads[:8]) + (", ..." if len(heads) > 8 else "")
        reason = f", which {why[count]}" if count in why and count < last else ""
        parts.append(f"{count} for {len(heads)} of the heads ({named}){reason}")
    # A lane travels as one: who could do with fewer hops waits for the others in it.
    held = sum(hops[h] < last for lane in plan.lanes if not lane.forgets for h in range(len(hops))[lane.heads])
    if held:
        parts.append(f"{held} of the heads with fewer wait for others in their lane")
    return "; ".join(parts)


def _shards(plan: Plan) -> str:
    if plan.transport is None:
        return "one device"
    lengths = ", ".join(f"{n:,}" for n in plan.layout.lengths)
    return f"rank {plan.rank} of {len(plan.layout.lengths)}, tokens a rank: {lengths}"
