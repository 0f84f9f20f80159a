"""The short way of a scan on one GPU: what it launches around the attention and in it is recorded and repeated as one,
and its two passes are one function of autograd's.

What a scan launches follows from its options and from how its tensors lie in memory, as of leetdist.engine.repeats. A
scan that cannot be repeated computes the same: it is this module's functions, called.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from leetdist.arguments import for_autograd, in_memory
from leetdist.engine import repeats
from leetdist.engine.inputs import canonical_options, canonical_tensors
from leetdist.engine.layout import contiguous, row_major
from leetdist.engine.passes import added_over_tokens, forward_pass, gradients_by_token, repeater
from leetdist.engine.plan import Plan
from leetdist.engine.planning import plan_call
from leetdist.engine.values import checks_values
from leetdist.kernels.mamba.pytorch import scan
from leetdist.kernels.runtime.memo import Memo
from leetdist.kernels.runtime.settings import raw_settings
from leetdist.mamba.passes import input_gradients
from leetdist.operators.layer_steps import kernel
from leetdist.sequence.once import differentiated_once

# x, dt, A, B, C, D, bias of dt, initial states (B, H, S, P), where documents start.
Given: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Any]"
OF_Q, OF_K, OF_V, OF_STATE = (4,), (3,), (0, 1, 2, 5, 6), (7,)  # whose gradients need those of the attention's inputs


class Call(NamedTuple):
    """What decides on a scan beside how its tensors lie. learns: whether the attention's gradients of q, of k, of v and
    log_decay, and of the initial state are wanted; gated: z follows."""

    steps: scan.Steps
    return_state: bool
    tile: int | None
    precision: str | None
    records: bool
    learns: tuple[bool, bool, bool, bool]
    gated: bool


def possible(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a scan of these, without documents told by offsets, is of that kind; x is the first."""
    x, given = tensors[0], [x for x in tensors if x is not None]
    return x is not None and repeats.are_plain(given) and repeats.could_repeat(x) and not checks_values()


# Kinds of scans whose arguments were looked at, and are right: values on a GPU are not.
checked: Memo[Hashable, None] = Memo(4096)


def kind_of(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> Hashable:
    """All that `leetdist.mamba.checks.check` looks at; None where that cannot be told apart from other kinds."""
    if not all([type(x) in _PLAIN for x in options]):
        return None
    return (*[None if x is None else (x.shape, x.dtype, x.device) for x in tensors], *options, *map(type, options))


_PLAIN = frozenset((bool, int, float, str, type(None)))


def run(given: Given, z: Tensor | None, steps: scan.Steps, **options: Any) -> tuple[Tensor, Tensor | None]:
    """y, and the state after the last token if that is asked for, (B, H, S, P)."""
    asked = canonical_options(scale=1.0, method="auto", **options)
    x, dt, A, B, C, D, bias, initial, starts = given
    wide = torch.promote_types(x.dtype, torch.float32)
    A, D, bias = A.to(wide), None if D is None else D.to(wide), None if bias is None else bias.to(wide)
    given = x, dt, A, B, C, D, bias, None if initial is None else contiguous(initial, wide), starts
    records = torch.is_grad_enabled()
    if records:
        *kept, z = [None if x is None else for_autograd(x) for x in (*given, z)]
        given = tuple(kept)  # type: ignore[assignment]
    wants = [records and x is not None and x.requires_grad for x in given]
    learns: Any = tuple([any([wants[i] for i in of]) for of in (OF_Q, OF_K, OF_V, OF_STATE)])
    call = Call(
        steps, asked["return_state"], asked["tile"], asked["precision"], records, learns, z is not None
    )  # fmt: skip
    if not any(learns):
        if not records or z is None or not z.requires_grad:
            return _repeated(_outputs, (*given, z), call)[:2]
        o, state = _repeated(_forward, given, call)[:2]
    else:
        o, state = Scan.apply(call, *given)
    if z is None:
        return o, state
    x, D = given[0], given[5]
    return Gate.apply(o, None if D is None else x.detach(), None if D is None else D.detach(), z), state


class Scan(torch.autograd.Function):
    """`y, state = Scan.apply(call, *given)`. Of a gated call y is without D x, and its gradient that of D x too."""

    @staticmethod
    def forward(ctx: Any, call: Call, *given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y, state, *kept = _repeated(_forward, given, call)
        ctx.call = call
        ctx.save_for_backward(*given, *kept)
        ctx.set_materialize_grads(False)
        return y, state

    @staticmethod
    @differentiated_once("mamba_chunk_scan_combined")
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, _, _, D, bias, *_ = ctx.needs_input_grad[1:]
        tensors = (*ctx.saved_tensors, *[None if y is None else row_major(y) for y in (dy, dstate)])
        dC, dB, dx, ddt, dA, dbias, dD, of_tokens, dinitial = _repeated(
            _backward, tensors, ctx.call, (x, dt, A, bias, D)
        )
        dD = scan.added_up(dD) if of_tokens is None else added_over_tokens(of_tokens)
        found = dx, ddt, scan.added_up(dA), dB, dC, dD, scan.added_up(dbias), dinitial, None
        return None, *[grad if wanted else None for grad, wanted in zip(found, ctx.needs_input_grad[1:], strict=True)]


class Gate(torch.autograd.Function):
    """(o + D x) silu(z). Apart from `Scan`, so that o, which is kept for z's gradient alone, is let go when that is
    made."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor) -> Tensor:
        ctx.save_for_backward(o, x, D, z)
        (y,) = _repeated(_gated, (o, x, D, z))
        return y

    @staticmethod
    @differentiated_once("mamba_chunk_scan_combined")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        do, dz = _repeated(_gate_gradients, (*in_memory(dy), *ctx.saved_tensors))
        return do, None, None, dz


def _repeated(function: Any, tensors: tuple[Tensor | None, ...], *more: Any) -> tuple[Any, ...]:
    """function(*tensors, *more, device, settings), which decide on kernels; its launches again where it is known."""
    device = next(x.device for x in tensors if x is not None)
    found: tuple[Any, ...] = repeater()(function, tensors, *more, device, *raw_settings())
    return found


def _outputs(*args: Any) -> tuple[Tensor | None, ...]:
    """Where nothing is learnt: y, and the state."""
    (x, *given, z), call = args[:10], args[10]
    y, state, *_ = _forward(x, *given, call)
    if z is None:
        return y, state
    D = given[4]
    return kernel(scan.scan_outputs, y, y.shape[3])(y, None if D is None else x, D, z, spent=True), state


def _forward(*args: Any) -> tuple[Any, ...]:
    """The outputs, the state, and what is kept for the backward pass: dt, dt A and the states of tiles."""
    given, call = args[:9], args[9]
    x, dt, A, _, _, _, bias, _, starts = given
    weight, log_decay = kernel(scan.scan_steps, x, x.shape[3])(dt, A, bias, starts, call.steps)
    plan, inputs, initial = _planned(given, weight, log_decay, call)
    o, state, states = forward_pass(inputs, initial, plan)
    return o.transpose(1, 2).detach(), state, weight, log_decay, states  # y is no view, so that it can be written over


def _backward(*args: Any) -> tuple[Tensor | None, ...]:
    """Gradients of C, B, x, dt; in parts those of A, the bias and D, or D's token by token; of the initial state."""
    given, (weight, log_decay, states, dy, dstate, call, needs) = args[:9], args[9:16]
    x, dt, A, _, _, D, bias, _, starts = given
    plan, inputs, _ = _planned(given, weight, log_decay, call)
    learns = plan.problem.needs_decay_grad
    *grads, dinitial = gradients_by_token(inputs, states, _turned(dy), dstate, plan, needs_gate_grads=learns)
    dq, dk, dv, dlog_decay, dweight, *of_skip = grads
    of_inputs: tuple[Tensor | None, ...] = (None,) * 5
    if learns:
        own = x, dt, A, bias, D, starts, weight
        of_inputs = input_gradients(own, (_turned(dv), dlog_decay, dweight, dy), call.steps, needs)
    of_tokens = of_skip[0] if of_skip and dweight is not None else None
    return _turned(dq), _turned(dk), *of_inputs, of_tokens, dinitial


def _turned(x: Tensor | None) -> Tensor | None:
    """Tokens and heads, either way."""
    return None if x is None else x.transpose(1, 2)


def _gated(o: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor, *_: Any) -> tuple[Tensor]:
    return (kernel(scan.scan_outputs, o, o.shape[3])(o, x, D, z),)


def _gate_gradients(
    dy: Tensor, o: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = kernel(scan.scan_outputs_gradient, o, o.shape[3])(dy, o, x, D, z)
    return found


def _planned(
    given: Any, weight: Tensor, log_decay: Tensor, call: Call
) -> tuple[Plan, tuple[Tensor, ...], Tensor | None]:
    x, _, _, B, C, D, _, initial, _ = given
    of_q, of_k, of_v, of_state = call.learns
    q, k, v = (y.transpose(1, 2) for y in (C, B, x))
    with torch.set_grad_enabled(call.records):

        def seen(y: Tensor, learns: bool) -> Tensor:
            return y.detach().requires_grad_(learns)

        plan = plan_call(
            seen(q, of_q), seen(k, of_k), seen(v, of_v), seen(log_decay, of_v),
            initial_state=None if initial is None else seen(initial, of_state), return_state=call.return_state,
            cu_seqlens=None, scale=1.0, method="auto", tile=call.tile, precision=call.precision, transport=None,
            weighted=True, skipped=D is not None, gated=call.gated, factor_grads=D is None or D.ndim == 1,
        )  # fmt: skip
    with torch.no_grad():
        *inputs, initial = canonical_tensors(q, k, v, log_decay, initial, None, plan.highest)
        inputs += [contiguous(y, log_decay.dtype) for y in (weight, D) if y is not None]
    return plan, tuple(inputs), initial
