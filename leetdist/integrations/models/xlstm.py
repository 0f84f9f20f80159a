"""xLSTM's mLSTM layers through `leetdist.linear_attention`.

With gates i and f a head and token, transformers' layer keeps (C, n) relative to a running maximum m of the exponents,
so that nothing overflows. Without it these are

    C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T        n_t the same with 1 for v_t
    h_t = C_t^T q_t / (max(|n_t . q_t|, 1) + eps exp(m_t))        m_t = max(log sigmoid(f_t) + m_{t-1}, i_t), m_0 = 0

which is a decay a token with one more column of v. The soft cap of the gates keeps exp(i) within fp32's range; a model
without one, or with a large one, is refused. Source: xLSTM, arXiv 2405.04517, section 2.3; xLSTM 7B, arXiv 2503.13427.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.xlstm import modeling_xlstm
from transformers.models.xlstm.modeling_xlstm import xLSTMBlock, xLSTMCache, xLSTMLayer, xLSTMModel

from leetdist.api import linear_attention, linear_attention_step
from leetdist.integrations.registry import register
from leetdist.sequence.group import resolve
from leetdist.sequence.shard import gather_sequence

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

LARGEST_CAP = 40.0  # exp(40) and its inverse leave fp32 20 digits on either side for q, k, v and sums
_APART = 1e3  # less than any exponent of another document


class Layer(xLSTMLayer):
    """xLSTM's layer with the same weights and the same result, through leetdist's operator."""

    group: Group | None

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor, Tensor] | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """x: (B, N, width), this rank's shard. state: C (B, H, Dk, Dv), n (B, H, Dk) and m (B, H, 1), as theirs."""
        rows, tokens, heads = *x.shape[:2], self.config.num_heads
        q, k, v, gate, i, f = self._projected(x)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k, v = (y.unflatten(-1, (heads, -1)) for y in (q, k, v))
        i, f = (modeling_xlstm.soft_cap(y.to(wide), self.config.gate_soft_cap) for y in (i, f))
        if cu_seqlens is not None:  # all rows as one, whose documents are told by offsets
            q, k, v, i, f = (y.flatten(0, 1)[None] for y in (q, k, v, i, f))
        h, state = self._attend(q, k, v, i.transpose(1, 2), F.logsigmoid(f).transpose(1, 2), state, cu_seqlens)
        h = self.multihead_norm(h.to(q.dtype).transpose(1, 2)).reshape(rows, tokens, -1)
        return self.out_proj(self.ogate_act_fn(gate) * h), state

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.config.weight_mode == "single":
            layers = (self.q, self.k, self.v, self.ogate_preact, self.igate_preact, self.fgate_preact)
            return tuple(layer(x) for layer in layers)
        sizes = [self.qk_dim, self.qk_dim, self.v_dim, self.v_dim]
        return *self.qkv_opreact(x).split(sizes, -1), *self.ifgate_preact(x).chunk(2, -1)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, decay: Tensor, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """q, k, v (B, N, H, D), gates (B, H, N); h (B, H, N, Dv)."""
        last = state is not None
        if self.group is not None:
            state = None  # a prompt that was cut for the ranks begins the sequence
        m, m_last = _maximum(i, decay, None if state is None else state[2], cu_seqlens, self.group)
        weight = torch.exp(i)[..., None]
        dtype = torch.float32 if q.dtype == torch.float16 else q.dtype  # fp16 ends at 65,504
        q, k, v = q.transpose(1, 2).to(dtype), k.transpose(1, 2).to(dtype), v.transpose(1, 2)
        v = torch.cat([v * weight, weight], -1).to(dtype)
        before, scale = None, q.shape[-1] ** -0.5
        if state is not None:
            C, n, _ = (y.to(decay.dtype) for y in state)
            before = torch.cat([C, n[..., None]], -1) * state[2].to(decay.dtype).exp()[..., None]
        after: Tensor | None = None
        if before is not None and q.shape[2] == 1:
            o, after = linear_attention_step(q, k, v, before, decay, scale=scale)
        elif last:
            o, after = linear_attention(
                q, k, v, decay, scale=scale, initial_state=before, return_state=True, group=self.group
            )
        else:
            o = linear_attention(q, k, v, decay, scale=scale, cu_seqlens=cu_seqlens, group=self.group)
        o = o.to(decay.dtype)
        h = o[..., :-1] / (o[..., -1:].abs().clamp_min(1) + self.config.eps * m[..., None].exp())
        if after is None:
            return h, None
        after = after * m_last.neg().exp()[..., None]
        return h, (after[..., :-1], after[..., -1], m_last)


def _maximum(
    i: Tensor, decay: Tensor, before: Tensor | None, cu_seqlens: Tensor | None, group: Group | None
) -> tuple[Tensor, Tensor]:
    """m (B, H, N), and m (B, H, 1) after the whole sequence, of gates (B, H, N): this rank's shard of them."""
    transport, dtype = resolve(group), decay.dtype
    i, decay = i.double(), decay.double()
    if cu_seqlens is not None:
        offset = 0
        if transport is not None:
            lengths = gather_sequence(torch.tensor([i.shape[2]], device=i.device), 0, group)
            offset = int(lengths[: transport.rank].sum())
        place = torch.arange(offset, offset + i.shape[2], device=i.device)
        starts = torch.isin(place, cu_seqlens.to(i.device))
        i = torch.where(starts, torch.maximum(i, decay), i)  # of m_0 = 0
        decay = decay - _APART * starts
    total = decay.cumsum(-1)
    here = total + (i - total).cummax(-1).values
    carry = torch.zeros_like(total[..., :1]) if before is None else before.double()
    if transport is None:
        m = torch.maximum(here, total + carry)
        return m.to(dtype), m[..., -1:].to(dtype)
    ends = gather_sequence(torch.stack([total[..., -1:], here[..., -1:]]), -1, group)  # (2, B, H, P)
    carries = [carry + 0 * ends.sum()]  # every rank has a backward of what all gathered
    for rank in range(transport.size):
        carries.append(torch.maximum(carries[-1] + ends[0, ..., rank, None], ends[1, ..., rank, None]))
    m = torch.maximum(here, total + carries[transport.rank])
    return m.to(dtype), carries[-1].to(dtype)


class Block(xLSTMBlock):
    """xLSTM's block, whose layer is ours."""

    joins_states = True
    group: Group | None
    documents: Tensor | None = None
    """`cu_seqlens` of the call, of which the model tells its blocks nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # not in the forward: activation checkpointing comes between
        return super().__call__(*args, **{"cu_seqlens": self.documents, **kwargs})

    def forward(self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        mixed, state = self.mlstm_layer(self.norm_mlstm(x), state, cu_seqlens)
        x = x + mixed
        return x + self.ffn(self.norm_ffn(x)), state


@register(xLSTMBlock)
def _give_group(block: Any, group: Group | None) -> None:
    cap = block.config.gate_soft_cap
    if cap is None or not 0 < cap <= LARGEST_CAP:
        raise ValueError(
            f"gate_soft_cap must be positive and at most {LARGEST_CAP:g} for xLSTM under leetdist, whose states keep "
            f"exp(i) in fp32, got {cap}"
        )
    if not isinstance(block, Block):
        block.__class__, block.mlstm_layer.__class__ = Block, Layer
    block.group = block.mlstm_layer.group = group


def prepare(model: nn.Module) -> None:
    """Around each xLSTMModel: documents told to its blocks, a cache of fp32, and no pieces, each with a cache."""
    for module in model.modules():
        if isinstance(module, xLSTMModel):
            module.register_forward_pre_hook(_before, with_kwargs=True)
            module.register_forward_hook(_after, always_call=True)


def _before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kwargs = dict(kwargs)
    documents = kwargs.pop("cu_seqlens", None)
    for block in module.blocks:
        block.documents = documents
    parameters = inspect.signature(type(module).forward).parameters
    name = "cache" if "cache" in parameters else "cache_params"  # as it is called since transformers 5.24, and before
    config, use = module.config, kwargs.get("use_cache")
    use = config.use_cache and not (module.training and module.gradient_checkpointing) if use is None else use
    if use and not args[1:] and kwargs.get(name) is None:
        tokens = args[0] if args and args[0] is not None else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        wide = torch.promote_types(next(module.parameters()).dtype, torch.float32)
        kwargs[name] = xLSTMCache(config, len(tokens), dtype=wide, device=tokens.device)
    module._leetdist_pieces, config.max_inference_chunksize = config.max_inference_chunksize, sys.maxsize
    return args, kwargs


def _after(module: Any, args: Any, output: Any) -> None:
    module.config.max_inference_chunksize = module._leetdist_pieces


__all__ = ["Block", "Layer", "prepare"]
