"""Attention layers around the operator. Each takes its group from `module.group`, never from a global."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leetdist.arguments import as_bool, as_name, check_plain, is_memory
from leetdist.kernels.common.elementwise import sigmoid, silu
from leetdist.kernels.runtime.memo import keeps
from leetdist.nn.checks import as_eps, as_size, check_exact, check_x, refuse, share_of
from leetdist.nn.decay import log_decay
from leetdist.nn.operator import attended
from leetdist.sequence.documents import check_end, check_offsets
from leetdist.sequence.group import is_alone

if TYPE_CHECKING:
    from leetdist.sequence.group import Group


class DecayAttention(nn.Module):
    """What the layers share: the heads' decays, and the call of the operator.

    `group` belongs to the module and not to a surrounding context, so that a recomputation under activation
    checkpointing, which autograd runs later and in a thread of its own, sees the same ranks.
    """

    inplace = False
    """Whether a step of decoding overwrites its state, as a captured graph wants."""

    def __init__(
        self,
        dim: int,
        heads: int,
        decay: str | Tensor,
        layer: int,
        layers: int,
        learnable_decay: bool,
        group: Group | None,
        tile: int | None,
        exact: bool,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.group = as_size("dim", dim), as_size("heads", heads), group
        self.tile, self.exact = check_exact(tile, exact)
        learnable_decay = as_bool("learnable_decay", learnable_decay)
        ladder = _ladder(decay, self.heads, layer, layers)
        known = is_memory(ladder)  # what a fake tensor holds nobody can look at
        if known and learnable_decay and bool(ladder.isinf().any()):
            raise ValueError(f"decay must be finite to be learnt (-inf forgets at once, for good), got {decay!r}")
        if ladder.shape != (self.heads,) or (known and not bool((ladder <= 0).all())):
            wanted = f"a ladder's name or (heads,) = ({self.heads},) log decays <= 0"
            raise ValueError(f"decay must be {wanted}, got {decay!r}")
        # No buffer: `model.bfloat16()` would round it, and slow heads would forget at another rate.
        self._ladder = self._placed = ladder
        self.log_slope_change: nn.Parameter | None = None
        if learnable_decay:
            # From the ladder, and so from 0: in bf16, where a model or FSDP2 casts it, a number near 0 is precise.
            self.log_slope_change = nn.Parameter(torch.zeros(self.heads))

    @property
    def log_slope(self) -> nn.Parameter | None:
        """(heads,) if the decay is learnt: the logarithm of its slope, less that of the ladder's."""
        return self.log_slope_change

    def reset_parameters(self) -> None:
        """What `to_empty` and FSDP2's meta initialisation leave to the module that holds a parameter."""
        if self.log_slope is not None:
            nn.init.zeros_(self.log_slope)

    def _apply(self, *args: Any, **options: Any) -> Any:
        """Moves the decays too: a compiled graph that had to copy them would wait for its GPU in each call."""
        super()._apply(*args, **options)
        for parameter in self.parameters():  # FSDP of before FSDP2 has taken them away by then
            self._place(parameter.device)
            break
        return self

    def _place(self, device: torch.device) -> Tensor:
        if self._placed.device != device:
            with torch.inference_mode(False):  # kept, and so for training too
                placed = self._ladder.to(device)
            if not keeps():
                return placed
            self._placed = placed
        return self._placed

    def log_decay(self, device: torch.device) -> Tensor:
        """(heads,) fp32, <= 0."""
        if not torch.compiler.is_compiling():
            ladder = self._place(device)
        else:  # a compiled region of checkpointing may change nothing outside of it
            ladder = self._placed if self._placed.device == device else self._ladder.to(device)
        if self.log_slope is None:
            return ladder
        # Never positive. A head without decay starts at -1e-6.
        return ladder.clamp_max(-1e-6) * self.log_slope.float().exp()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        whole = state.pop(prefix + "log_slope", None)  # in earlier checkpoints: the logarithm, not its change
        if whole is not None:
            slope = self._ladder.clamp_max(-1e-6).neg().log()
            state[prefix + "log_slope_change"] = (whole.float() - slope.to(whole.device)).to(whole.dtype)
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        state: Any,
        return_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Any]:
        """(B, N, H, D) to (B, N, H, Dv), without a copy; one token with a state is a step of decoding."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        decay = self.log_decay(q.device)
        o, final = attended(
            self, q, k, v, decay, scale=scale, state=state, return_state=return_state, cu_seqlens=cu_seqlens
        )
        return o.transpose(1, 2), final


class LightningAttention(DecayAttention):
    """Lightning attention with a sigmoid gate and a norm, as in TransNormerLLM and MiniMax-01.

        q, k, v = silu(qkv_proj(x))      y = out_proj(sigmoid(output_gate(x)) * norm(attention(q, k, v)))

    Weights have the names and the layout of transformers' MiniMaxLightningAttention. No position enters but through
    the decay, so a shard needs none.

    Args:
        dim: width of x.
        heads: number of heads.
        head_dim: width of a head; None is dim / heads.
        decay: name of a ladder (leetdist.nn.decay), or (heads,) log decays.
        layer, layers: which layer of how many, for the ladders that ask.
        learnable_decay: one parameter a head, started at the ladder.
        group: ranks that hold consecutive shards of the sequence; None takes the surrounding `sequence_parallel`, and
            without one computes on this device alone. `leetdist.parallelize` sets it.
        tile: tile length in tokens, a power of two >= 16; None leaves it to the length of the sequence.
        exact: prefill and decoding give each token the bits that a training call gives it (`tile` 1,024 where none is
            named). The state is then a `leetdist.State`, or to decode a `StatePool(..., exact=True)`, and has no
            gradient.

    Shapes: x and y (B, N, dim), in the parameters' dtype; a state (B, H, D, D) fp32.

    Raises:
        ValueError: heads do not divide dim, the decay is none, or x is not (B, N, dim).

    Source: TransNormerLLM, arXiv 2307.14995; MiniMax-01, arXiv 2501.08313.

    >>> import torch, leetdist
    >>> layer = leetdist.nn.LightningAttention(64, heads=4)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        *,
        decay: str | Tensor = "tnl",
        layer: int = 0,
        layers: int = 1,
        learnable_decay: bool = False,
        group: Group | None = None,
        tile: int | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(dim, heads, decay, layer, layers, learnable_decay, group, tile, exact)
        dim, heads = self.dim, self.heads
        self.head_dim = share_of("dim", dim, heads) if head_dim is None else as_size("head_dim", head_dim)
        inner = heads * self.head_dim
        self.qkv_proj = nn.Linear(dim, 3 * inner, bias=False)
        self.output_gate = nn.Linear(dim, inner, bias=False)
        self.norm = nn.RMSNorm(inner, eps=1e-6)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        state: Any = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """x: (B, N, dim), this rank's shard under a group. state: (B, H, D, D) fp32, on the first rank."""
        check_x(x, self.dim, self.group)
        qkv = silu(self.qkv_proj(x)).unflatten(-1, (self.heads, 3 * self.head_dim))
        q, k, v = qkv.chunk(3, -1)
        o, final = self.attend(q, k, v, 1.0, state, return_state, cu_seqlens)
        o = o.flatten(2)
        # Under autocast o is bf16 and the weight fp32: mixed, there is no fused kernel. It computes in fp32 anyway.
        o = F.rms_norm(o, self.norm.normalized_shape, self.norm.weight.to(o.dtype), self.norm.eps)
        y = self.out_proj(sigmoid(self.output_gate(x)) * o)
        return y if final is None else (y, final)


class Retention(DecayAttention):
    """RetNet's multi-scale retention: a decay a head, a norm a head, a swish gate.

        q, k = rotate(q_proj(x)), rotate(k_proj(x)) / sqrt(D)      v = v_proj(x)
        y = out_proj(silu(gate(x)) * norm_per_head(retention(q, k, v)))

    The norm is per head and without weights, and makes RetNet's own normalisations of the scores redundant, but for its
    eps. `layout` names what checkpoints of others want, which load by the names that their own layers have:

    - "torchscale", the paper's authors': as above, and outputs are divided by the root of the summed decays before the
      norm, sqrt((1 - gamma^(t + 1)) / (1 - gamma)) for token t of a document, so positions are asked for without
      rotations too. What it divides by besides, the scores' own sum where that is larger than 1, the norm undoes, and
      is left out.
    - "fla", flash-linear-attention's: the halves of a head are rotated instead of neighbours, with 10000^(-2 i / D)
      instead of 10000^(-i / (D / 2 - 1)); the norm has weights and an eps of 1e-5.

    Args:
        dim: width of x.
        heads: number of heads.
        value_dim: width of v over all heads; None is 2 * dim.
        key_dim: width of q, and of k, over all heads; None is dim.
        layout: "leetdist", "torchscale" or "fla".
        eps: of the norm; None is 1e-6, in "fla" 1e-5.
        rotary: rotate q and k by their position (the part of xPos that RetNet keeps); False is the xPos-free variant.
        decay, layer, layers, learnable_decay, group, tile, exact: as for `LightningAttention`.

    Shapes: x and y (B, N, dim), in the parameters' dtype; a state (B, H, Dk, Dv) fp32.

    Raises:
        ValueError: heads do not divide key_dim or value_dim, there is no such layout, or, when called, x is not
            (B, N, dim), or a layer that needs them gets no `position_ids` under a group.

    Source: RetNet, arXiv 2307.08621, section 2.3; MultiScaleRetention of torchscale 0.3 and of flash-linear-attention
    0.6 for their layouts.

    >>> import torch, leetdist
    >>> layer = leetdist.nn.Retention(64, heads=4)
    >>> layer(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        value_dim: int | None = None,
        *,
        key_dim: int | None = None,
        layout: str = "leetdist",
        eps: float | None = None,
        rotary: bool = True,
        decay: str | Tensor = "retnet",
        layer: int = 0,
        layers: int = 1,
        learnable_decay: bool = False,
        group: Group | None = None,
        tile: int | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(dim, heads, decay, layer, layers, learnable_decay, group, tile, exact)
        dim, heads, fla = self.dim, self.heads, as_name("layout", layout, _LAYOUTS) == "fla"
        value_dim = 2 * dim if value_dim is None else as_size("value_dim", value_dim)
        key_dim = dim if key_dim is None else as_size("key_dim", key_dim)
        self.head_dim, self.rotary, self.layout = share_of("key_dim", key_dim, heads), as_bool("rotary", rotary), layout
        self.q_proj = nn.Linear(dim, key_dim, bias=False)
        self.k_proj = nn.Linear(dim, key_dim, bias=False)
        self.v_proj = nn.Linear(dim, value_dim, bias=False)
        eps = (1e-5 if fla else 1e-6) if eps is None else as_eps(eps)
        gate, norm, out_proj = _LAYOUTS[layout]
        self.add_module(gate, nn.Linear(dim, value_dim, bias=False))
        self.add_module(norm, nn.RMSNorm(share_of("value_dim", value_dim, heads), eps=eps, elementwise_affine=fla))
        self.add_module(out_proj, nn.Linear(value_dim, dim, bias=False))

    def forward(
        self,
        x: Tensor,
        *,
        position_ids: Tensor | None = None,
        state: Any = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """x: (B, N, dim), this rank's shard under a group; position_ids: (B or 1, N), global, for rotary layers. None
        is from 0 on, in each document of cu_seqlens."""
        check_x(x, self.dim, self.group)
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        gate, norm, out_proj = (getattr(self, name) for name in _LAYOUTS[self.layout])
        scaled = self.layout == "torchscale"
        positions = self._positions(x, position_ids, cu_seqlens, state is not None) if self.rotary or scaled else x
        if self.rotary:
            angles, rotate = self._angles(positions), _rotate_halves if self.layout == "fla" else _rotate
            q, k = rotate(q, angles), rotate(k, angles)
        o, final = self.attend(q, k, v, self.head_dim**-0.5, state, return_state, cu_seqlens)
        if scaled:
            o = (o * self._root(positions)).to(o.dtype)
        y = out_proj(silu(gate(x)) * norm(o).flatten(2))
        return y if final is None else (y, final)

    def _positions(self, x: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor | None, continued: bool) -> Tensor:
        """(B or 1, N), of packed documents in each of them."""
        if position_ids is None:
            if self.group is not None or not is_alone(None) or continued:
                refuse(
                    "position_ids must be given to a rotary layer whose x does not start the sequence on every rank: "
                    "(B or 1, N) positions in the whole sequence, as leetdist.shard_batch makes them",
                    x, self.group,
                )  # fmt: skip
            places = torch.arange(x.shape[1], device=x.device)
            if cu_seqlens is not None:
                check_offsets(cu_seqlens, x)
                check_end(cu_seqlens, x.shape[1:2])
                starts = cu_seqlens.to(x.device)
                places = places - starts[torch.searchsorted(starts, places, right=True) - 1]
            position_ids = places[None]
        check_plain("position_ids", position_ids)
        batch, tokens, _ = x.shape
        if position_ids.shape not in ((tokens,), (1, tokens), (batch, tokens)) or position_ids.is_complex():
            got = f"{position_ids.dtype} of shape {tuple(position_ids.shape)}"
            words = f"position_ids must be numbers of shape (B or 1, N) = ({batch} or 1, {tokens}), got {got}"
            refuse(words, x, self.group)
        return position_ids

    def _angles(self, position_ids: Tensor) -> Tensor:
        """(B or 1, N, 1, D / 2) fp64: the position times each pair's frequency."""
        # fp64, whatever the default dtype: at ten million, fp32 tells angles apart by 1, and bf16 no two positions.
        pairs, device = self.head_dim // 2, position_ids.device
        half = torch.linspace(0, 1, pairs, dtype=torch.float64, device=device)
        if self.layout == "fla":
            half = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
        return position_ids[..., None, None].double() * 10000.0**-half

    def _root(self, position_ids: Tensor) -> Tensor:
        """(B or 1, N, H, 1) fp64: one over the root of a token's summed decays."""
        decay = self.log_decay(position_ids.device).double()
        seen = position_ids[..., None].double() + 1
        total = torch.expm1(seen * decay) / torch.expm1(decay)
        return torch.where(decay == 0, seen, total).rsqrt()[..., None]


# What the gate, the norm and the last projection of a layout are called.
_LAYOUTS = {
    "leetdist": ("gate", "norm", "out_proj"),
    "torchscale": ("g_proj", "group_norm", "out_proj"),
    "fla": ("g_proj", "g_norm_swish_gate", "o_proj"),
}


def _rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair (x_i, x_(D/2 + i)) turned by its angle, in fp32 at least."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    cos, sin = angles.cos().to(first.dtype), angles.sin().to(first.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair (x_2i, x_2i+1) turned by its angle, in fp32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    even, odd = x.to(wide)[..., ::2], x.to(wide)[..., 1::2]
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


def _ladder(decay: Any, heads: int, layer: int, layers: int) -> Tensor:
    """(heads,) log decays on the CPU."""
    if isinstance(decay, str):
        return log_decay(decay, heads, layer, layers)
    check_plain("decay", decay, "a ladder's name or a tensor of log decays")
    if decay.is_meta or decay.is_complex():
        raise ValueError(f"decay must be real numbers that are known, got {decay.dtype} on {decay.device}")
    return decay.detach().float().cpu()


__all__ = ["LightningAttention", "Retention"]
