"""What is around the attention of `mamba_chunk_scan_combined`, as functions of autograd's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from leetdist.arguments import for_autograd, transformed
from leetdist.kernels.mamba.pytorch import scan
from leetdist.operators.layer_steps import kernel
from leetdist.sequence.once import differentiated_once


def with_attention(
    attend: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Any],
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    starts: Tensor | None,
    steps: scan.Steps,
    *,
    weighted: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and the states if `attend(v, log_decay, weight, skip)` returns some.

    weighted: v = dt x is not written. `attend` gets x in its place, with dt as its weight, and D as skip: where no z
    follows, it adds D x to the outputs itself. Otherwise weight and skip are None.
    """
    x, dt, A = (for_autograd(y) for y in (x, dt, A))
    D, z, dt_bias = (None if y is None else for_autograd(y) for y in (D, z, dt_bias))
    wide = torch.promote_types(x.dtype, torch.float32)
    A = A.to(wide)
    bias, D = (None if y is None else y.to(wide) for y in (dt_bias, D))
    if transformed():  # PyTorch's own operations have the same numbers, and what follows these knows no other
        own, log_decay = scan.scan_steps(dt, A, bias, starts, steps)
        v = (x * own.transpose(1, 2)[..., None]).to(x.dtype)
        o, states = _outputs_and_states(attend(v.transpose(1, 2), log_decay, None, None))
        return scan.scan_outputs(o.transpose(1, 2), None if D is None else x, D, z), states
    v, log_decay, weight, skipped = _Inputs.apply(x, dt, A, bias, D, starts, steps, weighted)
    o, states = _outputs_and_states(attend(v.transpose(1, 2), log_decay, weight, D if weighted else None))
    D, added = None if D is None else D.detach(), weighted and z is None
    y = o.transpose(1, 2)
    if D is not None or z is not None:
        given = y, skipped, None if added else D, z
        learns = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in given)
        if learns or not weighted:
            y = _Outputs.apply(*given)
        elif not added:  # nobody else has o
            y = kernel(scan.scan_outputs, y, y.shape[3])(*given, spent=True)
    return y, states


def _outputs_and_states(attended: Any) -> tuple[Tensor, Tensor | None]:
    """What `attend` has returned, with the states of after the last token where it was asked for them."""
    return attended if isinstance(attended, tuple) else (attended, None)


class _Inputs(torch.autograd.Function):
    """dt x, (B, N, H, P); dt A, (B, H, N); dt, (B, H, N), if weighted; and D x, if there is a D.

    Products of x are not written: x stands for them, for D x, and if weighted for dt x. Its gradients there are those
    of the products, and all that x gets comes together in one pass over it; or where dt itself has a gradient, that of
    v is already all that x gets, and D has its own from there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        bias: Tensor | None,
        D: Tensor | None,
        starts: Tensor | None,
        steps: scan.Steps,
        weighted: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        weight = None
        if weighted:
            weight, log_decay = kernel(scan.scan_steps, x, x.shape[3])(dt, A, bias, starts, steps)
            v = x
        else:
            v, log_decay = kernel(scan.scan_inputs, x, x.shape[3])(x, dt, A, bias, starts, steps)
        ctx.save_for_backward(x, dt, A, bias, D, starts, weight)
        return v, log_decay, weight, None if D is None else x

    @staticmethod
    @differentiated_once("mamba_chunk_scan_combined")
    def backward(
        ctx: Any, dv: Tensor | None, dlog_decay: Tensor | None, dweight: Tensor | None, dskipped: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        of_outputs = dv, dlog_decay, dweight, dskipped
        found = input_gradients(ctx.saved_tensors, of_outputs, ctx.steps, ctx.needs_input_grad[:5])
        return *found[:2], *map(scan.added_up, found[2:]), *[None] * 3


def input_gradients(
    given: tuple[Any, ...], of_outputs: tuple[Tensor | None, ...], steps: scan.Steps, needs: tuple[bool, ...]
) -> scan.Gradients:
    """Of x, dt, A, bias and D, those that `needs` has. given: these, where documents start, and dt itself where it is a
    weight. of_outputs: the gradients of dt x (or where the weight has one, of x, and D has its own), dt A, the weight
    and D x."""
    x, dt, A, bias, D, starts, weight = given
    dv, dlog_decay, dweight, dskipped = of_outputs
    batch, tokens, heads, _ = x.shape
    if dlog_decay is None:
        dlog_decay = A.new_zeros(batch, heads, tokens)
    if dweight is not None:
        ddt, dA, dbias = kernel(scan.scan_steps_gradient, x, x.shape[3])(
            dt, A, bias, starts, dweight, dlog_decay, steps, needs[1:4]
        )
        return scan.Gradients(dv, ddt, dA, dbias, None)
    if dv is None:
        dv = torch.zeros_like(x)
    if D is not None and dskipped is None:
        dskipped = torch.zeros_like(x)
    found: scan.Gradients = kernel(scan.scan_inputs_gradient, x, x.shape[3])(
        x, dt, A, bias, D, starts, dv, dlog_decay, dskipped, steps, needs, own=weight, spent=weight is not None
    )
    return found


class _Outputs(torch.autograd.Function):
    """(o + D x) silu(z), rounded once. skipped: x, which stands for D x; without D and z it is in o."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, skipped: Tensor | None, D: Tensor | None, z: Tensor | None) -> Tensor:
        ctx.gated = z is not None
        if z is not None:
            ctx.save_for_backward(o, skipped, D, z)
        if D is None and z is None:
            return o.detach()  # of which nobody keeps anything: no view, so that it can be written over
        y: Tensor = kernel(scan.scan_outputs, o, o.shape[3])(o, skipped, D, z)
        return y

    @staticmethod
    @differentiated_once("mamba_chunk_scan_combined")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dz = None
        if ctx.gated:
            o, skipped, D, z = ctx.saved_tensors
            dy, dz = kernel(scan.scan_outputs_gradient, o, o.shape[3])(dy, o, skipped, D, z)
        return dy, dy if ctx.needs_input_grad[1] else None, None, dz
