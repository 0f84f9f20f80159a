"""What `mamba_chunk_scan_combined` does before and after its attention, in PyTorch.

On a CPU each number has the same bits wherever it lies (leetdist.kernels.common.elementwise), so products and sums are
operations of their own: a CPU fuses the two in some numbers only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from leetdist.kernels.common.elementwise import sigmoid, silu, silu_gradient, softplus


class Steps(NamedTuple):
    """How dt is made of what is given: softplus or not, then clamped."""

    softplus: bool
    least: float
    most: float


class Gradients(NamedTuple):
    """Of what `scan_inputs` takes, in its order, and of D; None where nobody asked. Those of A, bias and D come in
    parts, (n, ...), for `added_up`."""

    x: Tensor | None
    dt: Tensor | None
    A: Tensor | None
    bias: Tensor | None
    D: Tensor | None


def added_up(parts: Tensor | None) -> Tensor | None:
    """Parts of a gradient, (n, ...): their sum."""
    return None if parts is None else parts[0] if parts.shape[0] == 1 else parts.sum(0)


def scan_inputs(
    x: Tensor, dt: Tensor, A: Tensor, bias: Tensor | None, starts: Tensor | None, steps: Steps
) -> tuple[Tensor, Tensor]:
    """v = dt x, in x's dtype and (B, N, H, P), and log_decay, as `scan_steps` makes it. x: (B, N, H, P)."""
    own, log_decay = scan_steps(dt, A, bias, starts, steps)
    return _rounded_product(x, own.transpose(1, 2)[..., None]), log_decay


def scan_steps(
    dt: Tensor, A: Tensor, bias: Tensor | None, starts: Tensor | None, steps: Steps
) -> tuple[Tensor, Tensor]:
    """dt itself and log_decay = dt A, which is -inf where `starts`: (B, H, N) each.

    dt: (B, N, H), before bias, softplus and limits; A and bias: (H,), of the dtype that all is computed and returned
    in; starts: (B, N) bool. Any strides.
    """
    _, own = _steps(dt, A, bias, steps)
    log_decay = own * A
    if starts is not None:
        log_decay = torch.where(starts[..., None], -math.inf, log_decay)
    return own.transpose(1, 2).contiguous(), log_decay.transpose(1, 2).contiguous()


def scan_inputs_gradient(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    D: Tensor | None,
    starts: Tensor | None,
    dv: Tensor,
    dlog_decay: Tensor,
    dskip: Tensor | None,
    steps: Steps,
    needs: tuple[bool, bool, bool, bool, bool],
    *,
    own: Tensor | None = None,
    spent: bool = False,
) -> Gradients:
    """Gradients of x, dt, A, bias and D (those that `needs` has) from those of v, log_decay and D x. own: dt itself, if
    `scan_steps` has made it. spent: nobody reads dv after this, whose memory may be that of dx.

    D: (H,) or (H, P), and dskip (B, N, H, P), that of D x, or None both. Those of A, bias and D are sums over the
    tokens here, in one order whatever the layouts.
    """
    of_x, of_dt, _, of_bias, of_D = needs
    _, own = _steps(dt, A, bias, steps)
    dx = grown = dD = None
    if of_x:
        if D is None or dskip is None:
            dx = _rounded_product(dv, own[..., None])
        else:
            dx = (dv * own[..., None] + dskip * of_heads(D)).to(x.dtype)
    if of_dt or of_bias:
        grown = _wide_product(dv, x, A.dtype).contiguous().sum(-1).transpose(1, 2)
    if of_D and D is not None and dskip is not None:
        dD = _wide_product(dskip, x, A.dtype).contiguous().sum((0, 1))
        dD = (dD if D.ndim == 2 else dD.sum(-1))[None]
    return Gradients(dx, *scan_steps_gradient(dt, A, bias, starts, grown, dlog_decay, steps, needs[1:4]), dD)


def scan_steps_gradient(
    dt: Tensor,
    A: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
    grown: Tensor | None,
    dlog_decay: Tensor,
    steps: Steps,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of dt, A and bias as `scan_inputs_gradient`'s. grown: what dt itself gets by dt x, (B, H, N)."""
    of_dt, of_A, of_bias = needs
    raw, own = _steps(dt, A, bias, steps)
    g = dlog_decay.transpose(1, 2)
    if starts is not None:
        g = torch.where(starts[..., None], 0.0, g)
    ddt = dA = dbias = None
    if grown is not None and (of_dt or of_bias):
        grown = grown.transpose(1, 2) + g * A
        soft = softplus(raw) if steps.softplus else raw
        grown = torch.where((soft >= steps.least) & (soft <= steps.most), grown, 0.0)
        if steps.softplus:
            grown = grown * sigmoid(raw)
        ddt = grown.to(dt.dtype) if of_dt else None
        dbias = grown.contiguous().sum((0, 1))[None] if of_bias else None
    if of_A:
        dA = (g * own).contiguous().sum((0, 1))[None]
    return ddt, dA, dbias


def scan_outputs(o: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor | None, *, spent: bool = False) -> Tensor:
    """(o + D x) silu(z), rounded once; (B, N, H, P), as o, x and z are. Without D, x is None; without z, no gate.
    spent: nobody reads o after this, whose memory may be that of the result."""
    y = _skipped(o, x, D)
    return (y if z is None else y * silu(z.to(y.dtype))).to(o.dtype)


def scan_outputs_gradient(
    dy: Tensor, o: Tensor, x: Tensor | None, D: Tensor | None, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of o, which are those of D x too, and of z."""
    wide = torch.promote_types(o.dtype, torch.float32)
    dy, gate = dy.to(wide), z.to(wide)
    dz = dy * _skipped(o, x, D).to(wide) * silu_gradient(gate)
    return (dy * silu(gate)).to(o.dtype), dz.to(z.dtype)


def of_heads(D: Tensor) -> Tensor:
    """(H, P or 1)."""
    return D.view(D.shape[0], -1)


def _steps(dt: Tensor, A: Tensor, bias: Tensor | None, steps: Steps) -> tuple[Tensor, Tensor]:
    """dt with its bias, and after softplus and limits."""
    raw = dt.to(A.dtype)
    if bias is not None:
        raw = raw + bias
    return raw, (softplus(raw) if steps.softplus else raw).clamp(steps.least, steps.most)


def _skipped(o: Tensor, x: Tensor | None, D: Tensor | None) -> Tensor:
    """o + D x, wide."""
    if D is None or x is None:
        return o.to(torch.promote_types(o.dtype, torch.float32))
    return x * of_heads(D) + o


def _rounded_product(x: Tensor, factor: Tensor) -> Tensor:
    """x times a wider factor, rounded to x's dtype without a wide copy between; contiguous."""
    if torch.compiler.is_compiling():  # which writes none either, and torch.export takes no out=
        return (x * factor).to(x.dtype)
    return torch.mul(x, factor, out=x.new_empty(x.shape))


def _wide_product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a times b in `wide`, without wide copies of either."""
    return torch.addcmul(a.new_zeros(1, dtype=wide), a, b)
