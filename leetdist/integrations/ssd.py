"""Mamba-2's layers of transformers models, whatever the family, through `leetdist.mamba_chunk_scan_combined`.

In all of them a mixer projects its input to a gate, to what a causal convolution goes over (x, B and C) and to dt;
scans; gates, norms and projects back. So there is one `Mixer`, and a file a family under models/ says to which class it
belongs and what is different there.

On shards the convolution gets the tokens before them, and the scan the state, from the ranks to the left; all else is
each token's own. dt and its bias, the decays and D x are fp32 whatever the model's dtype, as in mamba_ssm's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks

from leetdist.api import linear_attention_step
from leetdist.integrations.caches import ONE_DOCUMENT
from leetdist.integrations.options import check_known
from leetdist.integrations.registry import register
from leetdist.mamba import mamba_chunk_scan_combined
from leetdist.nn.conv import causal_conv1d
from leetdist.sequence.shard import gather_sequence

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

M = TypeVar("M", bound="type[Mixer]")

_MEANINGLESS = {"position_embeddings", "output_attentions", "labels", "kept"}  # the last is what attention_mask says


class Mixer(nn.Module):
    """A transformers Mamba-2 mixer with the same weights and the same result, through leetdist's operators.

    Source: Mamba-2, arXiv 2405.21060, section 7; transformers' mixers, whose attributes these are.
    """

    joins_states = True
    """After a prompt that was cut for the ranks, each of them has the cache of the whole."""

    group: Group | None

    intermediate_size: int
    num_heads: int
    n_groups: int
    ssm_state_size: int
    conv_dim: int
    conv_kernel_size: int
    activation: str
    time_step_limit: tuple[float, float]
    layer_idx: int
    in_proj: nn.Module
    conv1d: nn.Conv1d
    act: nn.Module
    A_log: nn.Parameter
    D: nn.Parameter
    dt_bias: nn.Parameter
    norm: nn.Module
    out_proj: nn.Module

    @force_accelerate_hooks("conv1d")  # whose weights are used, but not its forward
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As theirs. transformers calls the cache `cache_params` before 5.24, and `cache` since then."""
        check_known(kwargs, type(self).__name__, besides=_MEANINGLESS)
        cache = cache_params if cache is None else cache
        if cache is not None and cu_seqlens is not None:
            raise ValueError(ONE_DOCUMENT)
        rows, dtype = hidden_states.shape[0], hidden_states.dtype
        projected = self.project(_kept(hidden_states, attention_mask))
        if cu_seqlens is not None:  # all rows as one, whose documents are told by offsets
            projected = projected.flatten(0, 1)[None]
            attention_mask = None if attention_mask is None else attention_mask.flatten()[None]
        gate, inputs, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
        before, state = self._taken_from(cache)
        convolved: Any = self._convolved(inputs, before, cu_seqlens)
        sizes = [self.intermediate_size, *[self.n_groups * self.ssm_state_size] * 2]
        x, B, C = _kept(convolved, attention_mask).split(sizes, -1)
        x, z = (y.unflatten(-1, (self.num_heads, -1)) for y in (x, gate))
        B, C = (y.unflatten(-1, (self.n_groups, -1)) for y in (B, C))
        normed = not isinstance(self.norm, nn.Identity)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        scanned: Any
        if state is not None and x.shape[1] == 1 and self.group is None:
            scanned = self._step(x, dt, A, B, C, None if normed else z, state)
        else:
            scanned = mamba_chunk_scan_combined(
                x, dt, A, B, C, D=self.D, z=None if normed else z,
                dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.time_step_limit,
                initial_states=state, return_final_states=cache is not None, cu_seqlens=cu_seqlens, group=self.group,
            )  # fmt: skip
        if cache is not None:
            scanned, state = scanned
            self._keep(cache, inputs, state)
        y: Tensor = scanned.reshape(-1, self.intermediate_size)
        if normed:  # of rows of tokens: FalconH1's drops a dimension of one token in transformers 5.15
            y = self.norm(y, gate.reshape(y.shape))
        y = self.out_proj(y.to(dtype).view(rows, -1, self.intermediate_size))
        return y

    def project(self, hidden_states: Tensor) -> Tensor:
        """(B, N, width) to the gate, the convolution's inputs and dt."""
        projected: Tensor = self.in_proj(hidden_states)
        return projected

    def _step(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What `mamba_chunk_scan_combined` gives one token, and the state after it."""
        wide = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.time_step_limit)
        q, k, v = (y.transpose(1, 2) for y in (C, B, (x * dt[..., None]).to(x.dtype)))
        o, after = linear_attention_step(q, k, v, state.to(wide).mT, (dt * A.to(wide)).transpose(1, 2))
        y = o.transpose(1, 2) + x * self.D.to(wide)[:, None]
        y = y if z is None else y * F.silu(z.to(wide))
        return y.to(x.dtype), after.mT

    def _convolved(self, inputs: Tensor, before: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        silu = self.activation in ("silu", "swish")
        y: Any = causal_conv1d(
            inputs, self.conv1d.weight[:, 0], self.conv1d.bias,
            activation="silu" if silu else None, initial=before, cu_seqlens=cu_seqlens, group=self.group,
        )  # fmt: skip
        return y if silu else self.act(y)

    def _taken_from(self, cache: Any) -> tuple[Tensor | None, Tensor | None]:
        """What the cache has of the tokens so far: (B, W - 1, channels) before the convolution, and the state."""
        if cache is None or not cache.has_previous_state(self.layer_idx):
            return None, None
        kept = cache.layers[self.layer_idx]
        taps = self.conv_kernel_size
        return kept.conv_states[0][..., kept.conv_states[0].shape[-1] - taps + 1 :].mT, kept.recurrent_states[0]

    def _keep(self, cache: Any, inputs: Tensor, state: Tensor) -> None:
        taps = self.conv_kernel_size
        if self.group is not None:  # the last ones of the sequence, wherever they are
            inputs = gather_sequence(inputs[:, -taps:], 1, self.group)
        short = taps - inputs.shape[1]
        if short > 0 and not cache.has_previous_state(self.layer_idx):  # which takes the shape of what comes first
            inputs = F.pad(inputs, (0, 0, short, 0))
        cache.update_conv_state(inputs.mT, self.layer_idx, conv_kernel_size=taps)
        cache.update_recurrent_state(state, layer_idx=self.layer_idx)


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where there is padding."""
    return x if mask is None else (x * mask[:, :, None]).to(x.dtype)


def serves(theirs: type[nn.Module]) -> Callable[[M], M]:
    """Decorator: the class, of `Mixer` and `theirs`, that `parallelize` makes of a layer of theirs."""

    def add(ours: M) -> M:
        @register(theirs)
        def give_group(layer: Any, group: Group | None) -> None:
            if not isinstance(layer, Mixer):
                layer.__class__ = ours
            layer.group = group

        return ours

    return add


__all__ = ["Mixer", "serves"]
