"""What a call would do, and why, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leetdist.engine.checks import ONE_DEVICE, describe
from leetdist.engine.inputs import a_head
from leetdist.engine.ops import wanted
from leetdist.engine.planning import plan_call
from leetdist.kernels.runtime.settings import settings
from leetdist.operators.choice import Choice, Refusals
from leetdist.operators.composition import Kernels
from leetdist.operators.facts import machine_of
from leetdist.operators.layer_steps import choice_for
from leetdist.operators.methods import kernels_for, method_for
from leetdist.operators.words import in_words, refusals
from leetdist.sequence.group import resolve

if TYPE_CHECKING:
    from leetdist.engine.plan import Plan
    from leetdist.operators.problem import Problem
    from leetdist.sequence.group import Group


# What runs around a decay a token in Mamba-2's layers, and how many tokens its convolutions usually see.
SCAN = "scan_steps", "scan_outputs", "scan_inputs_gradient", "scan_outputs_gradient"
CONVOLUTION, TAPS = ("convolution", "convolution_gradient"), 4
WITHIN = "weighted_values", "skipped_outputs"  # by kernels of the call, or around it


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
    """How `linear_attention` with the same arguments would be computed, and why: method, kernels, tile and shards.

    Each kernel is told by name, version and configuration, with the reasons why those that were asked before it do not
    serve. On a GPU the kernels are compiled, as by the call: one that cannot be compiled is not what would run. With a
    decay a token the text also has the kernels that `mamba_chunk_scan_combined` runs around such a call, where q is C,
    k is B and v is x, and those of `causal_conv1d`.

    Args:
        q, k, v, log_decay, and the options: as `linear_attention` takes them, (B, H, N, D) tensors, fp32, bf16, fp16 or
            fp64. Nothing is computed; under a group all ranks call, and each gets its own text.

    Returns:
        Lines of text for a reader.

    Raises:
        ValueError: as `linear_attention`.

    Source: the cost model of leetdist/operators/cost.py; the methods are LeetDecoding's, arXiv 2501.02573.

    >>> import torch, leetdist
    >>> q, k, v = (torch.randn(1, 2, 1000, 64) for _ in range(3))
    >>> print(leetdist.explain(q, k, v, method="fleet"))  # doctest: +ELLIPSIS
    problem  B 1, H 2, N 1,000, Dk 64, Dv 64, torch.float32 on cpu, forward, no decay
    method   fleet: named by the caller
    kernels  outputs by PyTorch ... (pytorch.fleet)
             states, fold by PyTorch ... (pytorch.block): chunks of 128 tokens
    not      CUDA C++ (cuda.token_scan): needs a GPU, this is a CPU
             Triton (triton.fleet): needs a GPU, this is a CPU
             CUDA C++ (cuda.grouped): needs a GPU, this is a CPU
             CUDA C++ (cuda.high): needs a GPU, this is a CPU
             Gluon (triton.hopper): needs a GPU, this is a CPU
             Gluon wide (triton.hopper_wide): needs a GPU, this is a CPU
             Triton (triton.block): needs a GPU, this is a CPU
    launches not repeated: a CPU has none
    tile     128 tokens, 8 tiles: chosen from the length of the whole sequence
    shards   one device
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
    transport = resolve(group)
    if isinstance(method, str) and method in ONE_DEVICE and transport is None:
        return _lines(describe(q, k, v, log_decay, **options, read_values=not wanted(q)), None)
    plan = plan_call(q, k, v, log_decay, **options, transport=transport, read_values=not wanted(q))
    return _lines(plan.problem, plan)


def _lines(problem: Problem, plan: Plan | None) -> str:
    tokens = problem.tokens if plan is None else plan.layout.offsets[-1]
    decay = ", a decay a token" if problem.operator == "token_decay" else "" if problem.has_decay else ", no decay"
    precision = "" if problem.precision is None else f", precision {problem.precision}"
    lines = {
        "problem": f"B {problem.batch}, H {problem.heads}, N {tokens:,}, Dk {problem.dk}, Dv {problem.dv}, "
        f"{problem.dtype} on {problem.device}, {'forward and backward' if problem.needs_grad else 'forward'}"
        + decay
        + precision,
        "method": _method(problem, tokens),
    }
    if plan is None:
        version = machine_of(problem.device, settings()).torch
        lines["kernels"] = f"PyTorch {version} (operators.methods.{problem.method})"
    else:
        kernels = kernels_for(problem, tokens)
        around = _around(problem, tokens)
        lines |= {
            "kernels": _named(kernels.used),
            "around": _named(around),
            "not": _refused((*kernels.used, *around), kernels.unserved),
            "launches": _launches(plan, kernels),
            "tile": f"{plan.tiles.size:,} tokens, {plan.every_tile.count:,} tiles: "
            + ("named by the caller" if problem.tile else "chosen from the length of the whole sequence"),
            "shards": _shards(plan),
        }
        if plan.transport is not None:
            lines["states"] = (
                f"by {plan.transport.carrier}, {plan.sent_bytes():,} bytes from this rank in the forward scan, "
                f"heads in {len(plan.lanes)} lane{'s' if len(plan.lanes) > 1 else ''}"
            )
            lines["hops"] = _hops(plan)
    indented = {name: text.replace("\n", "\n" + 9 * " ") for name, text in lines.items() if text}
    return "\n".join(f"{name:8} {text}" for name, text in indented.items())


def _named(choices: Iterable[Choice]) -> str:
    """Who computes which steps, and in what configuration."""
    return "\n".join(
        f"{row['steps']} by {row['name']} ({row['module']})"
        + (f": {row['configuration']}" * bool(row["configuration"]))
        for row in in_words(choices)
    )


def _around(problem: Problem, tokens: int) -> tuple[Choice, ...]:
    """Who computes what Mamba-2 does around a call with a decay a token, and who multiplies x by dt."""
    if problem.operator != "token_decay":
        return ()
    kernels = kernels_for(replace(problem, weighted=True, skipped=True), tokens)
    within = [c for c in kernels.choices if c.use.step in WITHIN]
    steps = {step: problem.dv for step in SCAN} | {step: TAPS for step in CONVOLUTION}
    beside = [choice_for(step, problem.device, problem.dtype, columns) for step, columns in steps.items()]
    return (*dict.fromkeys(within), *beside)


def _refused(choices: Iterable[Choice], unserved: Refusals) -> str:
    """Who was asked before them, and for what nobody need do, and why not."""
    return "\n".join(f"{row['name']} ({row['module']}): {row['reason']}" for row in refusals(choices, unserved))


def _launches(plan: Plan, kernels: Kernels) -> str:
    """Whether the host repeats a call's launches (leetdist.kernels.runtime.replay)."""
    if plan.problem.device.type != "cuda":
        return "not repeated: a CPU has none"
    if not kernels.recordable:
        alone = dict.fromkeys(c.implementation.module for c in kernels.choices if not c.implementation.recordable)
        if not alone:
            return "not repeated: what blocks of the state's rows say of the decays' gradient is added up in between"
        return f"not repeated: {', '.join(alone)} has some that are not seen"
    if plan.transport is not None and plan.transport.place() is None:
        return f"not repeated: by {plan.transport.kind}, hosts copy the states that are passed on"
    from leetdist.kernels.runtime.triton_driver import why_not_repeated

    missing = why_not_repeated()
    if missing is not None:
        return f"not repeated: {missing}"
    return "repeated, from the third call of a kind on"


def _method(problem: Problem, tokens: int) -> str:
    if problem.method in ONE_DEVICE:
        return f"{problem.method}: named by the caller; one device, no tiles"
    if problem.method != "auto":
        return f"{problem.method}: named by the caller"
    auto = method_for(problem, tokens)
    if not auto.seconds:
        return f"{auto.method}: what others cost with a decay a token is not measured"
    costs = ", ".join(f"{name} {1e3 * s:.3g}" for name, s in sorted(auto.seconds.items(), key=lambda x: x[1]))
    return (
        f"{auto.method}: at most {auto.ratios[auto.method]:.2f} x the best for 1 to 16 x 32 heads of the tile's "
        f"usual length (expected ms for 4 x 32: {costs}; measured on {auto.measured_on})"
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
