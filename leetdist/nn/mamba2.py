"""Mamba-2's layer over a sharded sequence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leetdist.arguments import as_bool, as_float, check_plain
from leetdist.inference.attend import TILE, attend
from leetdist.kernels.common.elementwise import silu
from leetdist.mamba import around, check_limits, decode, mamba_chunk_scan_combined
from leetdist.nn.checks import LARGEST, as_eps, as_size, check_exact, check_x, refuse
from leetdist.nn.conv import causal_conv1d
from leetdist.sequence.group import resolve

if TYPE_CHECKING:
    from leetdist.sequence.group import Group


class Mamba2State(NamedTuple):
    """What the layer keeps of the tokens so far, for the next ones."""

    conv: Tensor
    """(B or documents, W - 1, channels): the last tokens before the convolution, in its inputs' dtype."""
    ssm: Any
    """(B or documents, H, P, S) fp32; in an exact layer a `State`, or to decode a `StatePool(..., exact=True)`."""


class Mamba2(nn.Module):
    """Mamba-2: a gated state space whose steps, inputs and outputs depend on the token.

        z, (u, B, C), dt = in_proj(x)      u, B, C = silu(conv1d(u, B, C))
        y = out_proj(norm(ssd(u, softplus(dt + dt_bias), -exp(A_log), B, C, D) silu(z)))

    Weights have the names and the layout of transformers' Mamba2Mixer, and of mamba_ssm's Mamba2: their checkpoints
    load. Decays are computed in fp32 whatever the parameters' dtype.

    Args:
        dim: width of x.
        heads: number of heads; None is expand * dim / head_dim.
        head_dim: width of a head, P.
        state: rows of a head's state, S.
        groups: sets of B and C, which consecutive heads share; the norm is over each group's heads.
        expand: width of all heads together, in multiples of dim.
        conv: taps of the convolution, W.
        bias, conv_bias: whether the projections, and the convolution, have one.
        eps: of the norm.
        dt_limit: (least, most), what a step is clamped to.
        group: ranks that hold consecutive shards of the sequence; None takes the surrounding `sequence_parallel`, and
            without one computes on this device alone. `leetdist.parallelize` sets it.
        tile, exact: as for `LightningAttention`; beside the `State` or `StatePool`, the convolution's last tokens.

    Shapes: x and y (B, N, dim), in the parameters' dtype; a state is a `Mamba2State`.

    Raises:
        ValueError: heads * head_dim is not expand * dim, groups do not divide the heads, or x is not (B, N, dim).

    A token that goes on from a state, on one device, is a step of decoding (`leetdist.linear_attention_step`).

    Source: Mamba-2, arXiv 2405.21060, section 8; initial A (1 to 16) and dt (0.001 to 0.1) as in its code.

    >>> import torch, leetdist
    >>> layer = leetdist.nn.Mamba2(64, head_dim=16, state=32)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    by_token = True
    state_type = Mamba2State
    """What `leetdist.Session` asks: the decays are the tokens', not the layer's, and a state is several tensors."""

    inplace = False
    """Decoding writes the new state over the old one: what a captured graph wants, and only without gradients."""

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        head_dim: int = 64,
        *,
        state: int = 128,
        groups: int = 1,
        expand: float = 2,
        conv: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        eps: float = 1e-5,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        group: Group | None = None,
        tile: int | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__()
        self.tile, self.exact = check_exact(tile, exact)
        dim, head_dim = as_size("dim", dim), as_size("head_dim", head_dim)
        state, groups, conv = as_size("state", state), as_size("groups", groups), as_size("conv", conv)
        if not 1 <= (wide := as_float("expand", expand) * dim) < LARGEST:
            raise ValueError(f"expand must be a positive number, of a width of 1 to {LARGEST:,}, got {expand}")
        check_limits(dt_limit)
        inner = int(wide)
        heads = inner // head_dim if heads is None else as_size("heads", heads)
        if heads * head_dim != inner:
            raise ValueError(f"heads * head_dim must be expand * dim = {inner}, got {heads} * {head_dim}")
        if heads % groups:
            raise ValueError(f"groups must divide the {heads} heads, got {groups}")
        self.dim, self.heads, self.head_dim, self.state, self.groups = dim, heads, head_dim, state, groups
        self.dt_limit, self.group = dt_limit, group
        self.sizes = inner, inner + 2 * groups * state, heads
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=as_bool("bias", bias))
        # Its weights alone are used: a module, so that they have their names and PyTorch's initial values.
        channels = self.sizes[1]
        conv_bias = as_bool("conv_bias", conv_bias)
        self.conv1d = nn.Conv1d(channels, channels, conv, groups=channels, padding=conv - 1, bias=conv_bias)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(heads)) for _ in range(3))
        self.norm = GatedRMSNorm(inner, inner // groups, eps)
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The parameters of this module itself, as `to_empty` and FSDP2's meta initialisation want it."""
        nn.init.ones_(self.D)
        self.A_log.uniform_(1, 16).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp_().clamp_min_(1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # of which softplus makes dt

    def forward(
        self,
        x: Tensor,
        *,
        state: Mamba2State | None = None,
        return_state: bool = False,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Mamba2State]:
        """x: (B, N, dim), this rank's shard under a group, as is seq_idx (B, N); cu_seqlens in the whole sequence.
        state: on the first rank; with return_state, every rank gets the one after the last token."""
        documents: dict[str, Any] = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        before, kept = self._parts(x, state)
        keeps = self.exact and (state is not None or return_state)
        if keeps:
            transport = resolve(self.group)
            if seq_idx is not None or cu_seqlens is not None:
                words = "seq_idx and cu_seqlens must be None where an exact layer keeps a state, of one sequence"
                refuse(words, x, self.group)
            if transport is not None and transport.rank > 0:
                before = None  # which every rank has, and the first one needs
        z, inputs, last = self.scan_inputs(x, initial=before, return_state=return_state, **documents)
        scanned: Any
        one = x.shape[1] == 1 and seq_idx is None and cu_seqlens is None
        if keeps:
            y, ssm = self._exactly(**inputs, state=kept, return_state=return_state)
            scanned = (y, ssm) if return_state else y
        elif kept is not None and return_state and one and resolve(self.group) is None:
            scanned = decode(**inputs, states=kept, dt_limit=self.dt_limit, inplace=self.inplace)
        else:
            scanned = mamba_chunk_scan_combined(
                **inputs, dt_softplus=True, dt_limit=self.dt_limit,
                initial_states=kept, return_final_states=return_state,
                **documents, group=self.group, tile=self.tile or (TILE if self.exact else None),
            )  # fmt: skip
        y, ssm = scanned if return_state else (scanned, None)
        y = self.out_proj(self.norm(y.flatten(2), z))
        return y if last is None or ssm is None else (y, Mamba2State(last, ssm))

    def _parts(self, x: Tensor, state: Any) -> tuple[Tensor | None, Any]:
        """What the convolution and the scan go on from. Under a group both see to their own, so that all ranks know."""
        if state is None:
            return None, None
        if not isinstance(state, (tuple, list)) or len(state) != 2:
            refuse(f"state must be a Mamba2State, conv and ssm, got {type(state).__name__}", x, self.group)
        conv, ssm = state
        if resolve(self.group) is None:
            check_x(x, self.dim, self.group)
            if conv is not None:
                wanted = x.shape[0], self.conv1d.kernel_size[0] - 1, self.sizes[1]
                check_plain("state.conv", conv, "a tensor or None")
                if tuple(conv.shape) != wanted:
                    raise ValueError(f"state.conv must have shape {wanted}, got {tuple(conv.shape)}")
            if ssm is not None and not self.exact:
                check_plain("state.ssm", ssm, "a tensor or None")
                wanted = self.heads, self.head_dim, self.state
                if ssm.ndim != 4 or tuple(ssm.shape[1:]) != wanted:
                    raise ValueError(
                        f"state.ssm must have shape (B or documents, H, P, S) = (..., {', '.join(map(str, wanted))}), "
                        f"got {tuple(ssm.shape)}"
                    )
        return conv, ssm

    def _exactly(
        self, *, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Any, return_state: bool, **more: Tensor
    ) -> tuple[Tensor, Any]:
        """y with the bits of one call over all tokens, however they come, and what is kept of them."""
        q, k = C.transpose(1, 2), B.transpose(1, 2)

        def attended(v: Tensor, log_decay: Tensor) -> tuple[Tensor, Any]:
            return attend(q, k, v, log_decay, tile=self.tile, state=state, keep=return_state, group=self.group)

        return around(attended, x, dt, A, dt_limit=self.dt_limit, **more)

    def scan_inputs(
        self,
        x: Tensor,
        *,
        initial: Tensor | None = None,
        return_state: bool = False,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any], Tensor | None]:
        """Of x (B, N, dim): the gate (B, N, width), what `mamba_chunk_scan_combined` takes, by name, and with
        return_state what of it the convolution keeps; `initial` is what it kept."""
        check_x(x, self.dim, self.group)
        z, inputs, dt = self.in_proj(x).split(self.sizes, -1)
        convolved: Any = causal_conv1d(
            inputs, self.conv1d.weight[:, 0], self.conv1d.bias,
            activation="silu", initial=initial, return_state=return_state,
            seq_idx=seq_idx, cu_seqlens=cu_seqlens, group=self.group,
        )  # fmt: skip
        convolved, last = convolved if return_state else (convolved, None)
        u, B, C = convolved.split([self.sizes[0], *[self.groups * self.state] * 2], -1)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        u, B, C = (y.unflatten(-1, (n, -1)) for y, n in ((u, self.heads), (B, self.groups), (C, self.groups)))
        return z, {"x": u, "dt": dt, "A": A, "B": B, "C": C, "D": self.D, "dt_bias": self.dt_bias}, last


class GatedRMSNorm(nn.Module):
    """weight * rms_norm(x silu(gate)), the norm over each group of `size` channels, in fp32 at least.

    Shapes: x and gate (..., width), any floating dtype.

    Raises:
        ValueError: size does not divide width.

    Source: the norm before Mamba-2's output projection, arXiv 2405.21060, section 7.1.

    >>> import torch, leetdist
    >>> norm = leetdist.nn.GatedRMSNorm(64, size=16)
    >>> norm(torch.randn(2, 100, 64), torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(self, width: int, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        width, size, eps = as_size("width", width), as_size("size", size), as_eps(eps)
        if width % size:
            raise ValueError(f"size must divide the width {width}, got {size}")
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate: (..., width), to the same in x's dtype."""
        width = len(self.weight)
        for name, part in (("x", x), ("gate", gate)):
            check_plain(name, part)
            if part.ndim < 1 or part.shape != x.shape or part.shape[-1] != width or not part.is_floating_point():
                got = f"{part.dtype} of shape {tuple(part.shape)}"
                raise ValueError(f"{name} must be floating of shape (..., {width}), x and gate alike, got {got}")
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (x.to(wide) * silu(gate.to(wide))).unflatten(-1, (-1, self.size))
        # One kernel on a GPU, whose rows do not depend on how many there are, as those of a mean do.
        y = F.rms_norm(y, (self.size,), eps=self.eps)
        return self.weight.to(x.dtype) * y.flatten(-2).to(x.dtype)


__all__ = ["GatedRMSNorm", "Mamba2", "Mamba2State"]
