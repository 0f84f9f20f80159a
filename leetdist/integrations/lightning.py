"""Lightning layers of models whose code is remote: Ling and Ring-linear, MiniCPM-SALA, and others of their form.

Their forwards are all of one shape: they make q, k, v and slopes, hand them to an operator of flash-linear-attention's,
and gate and project what it returns. So nothing of a forward needs to be written again: while it runs, its operator is
leetdist's, over the ranks that share the sequence. All else, rotations, norms, gates and caches, is the model's own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leetdist.api import linear_attention, linear_attention_step
from leetdist.integrations.caches import ONE_DOCUMENT
from leetdist.integrations.registry import register

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

_serving: ContextVar[tuple[Any, Tensor | None] | None] = ContextVar("leetdist_serving", default=None)


def register_lightning(kind: type[nn.Module], *operators: str) -> None:
    """Teach `parallelize` a class of lightning layers by what its forward calls the operator.

    Args:
        kind: the class of the layers. Its forward takes (B, N, width) first, and calls the operator with q, k
            (B, N, H, Dk) and v (B, N, H, Dv), or fewer heads of k and v, and `g` (B, N, H) or `g_gamma` (H,), natural
            logs of decays; it may pass `scale` (Dk^-0.5 otherwise), `initial_state`, `output_final_state` and
            `cu_seqlens`, and gets (o, final state or None), as from flash-linear-attention's `chunk_simple_gla` and
            `fused_recurrent_simple_gla`. A `g` that is expanded from (H,) is one decay a head, else one a token.
        operators: names: of a layer's attribute that holds an operator or a dictionary of several, or of globals of the
            module that has the class.

    On ranks each gets the final state of the whole sequence, so that a cache that the model fills is right on all.
    Packed documents are kept apart where the model hands `cu_seqlens` on to its layers, even if these pass them no
    further, and refused where it does not.

    Raises:
        ValueError: kind is no class of modules, or no operator has such a name; when a model is called, an operator is
            asked for what leetdist's does not do.

    Source: the calls in the releases of Ling and Ring-linear 2.0 and 2.5 (arXiv 2510.19338) and of MiniCPM-SALA;
    simple_gla as in flash-linear-attention 0.6.

    >>> import torch, leetdist
    >>> from leetdist.integrations.lightning import register_lightning
    >>> def chunk(q, k, v, g_gamma):  # stands for the release's own
    ...     raise NotImplementedError
    >>> class Lightning(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.qkv, self.slope, self.ops = torch.nn.Linear(8, 24), torch.tensor([0.5, 0.1]), {"chunk": chunk}
    ...
    ...     def forward(self, x):
    ...         q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
    ...         return self.ops["chunk"](q, k, v, g_gamma=-self.slope)[0].flatten(2)
    >>> register_lightning(Lightning, "ops")
    >>> model = leetdist.parallelize(torch.nn.Sequential(Lightning()), None)
    >>> model(torch.randn(1, 100, 8)).shape
    torch.Size([1, 100, 8])
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise ValueError(f"kind must be a class of modules, got {kind!r}")
    if not operators or not all(isinstance(name, str) for name in operators):
        raise ValueError(f"operators must be one name or more, of attributes or globals, got {operators!r}")
    module = vars(sys.modules[kind.__module__])
    attributes = []
    for name in operators:
        if callable(module.get(name)):
            module[name] = _either(module[name])
        else:
            attributes.append(name)

    class Served(kind):  # type: ignore[misc, valid-type]
        joins_states = True
        group: Group | None

        def forward(
            self, *args: Any, cu_seqlens: Tensor | None = None, kept: Tensor | None = None, **kwargs: Any
        ) -> Any:
            """Theirs, which knows padding by attention_mask."""
            with _layer(self, cu_seqlens):
                return super().forward(*args, **kwargs)

    Served.__name__, Served.__qualname__, Served.__module__ = kind.__name__, kind.__qualname__, kind.__module__

    @register(kind)
    def give_group(layer: Any, group: Group | None) -> None:
        if not isinstance(layer, Served):
            for name in attributes:
                held = getattr(layer, name, None)
                if not callable(held) and not (isinstance(held, dict) and held and all(map(callable, held.values()))):
                    raise ValueError(
                        f"operators must name functions, dictionaries of them or globals of {kind.__module__}, and "
                        f"{name} of {kind.__name__} is {held!r}"
                    )
                setattr(layer, name, {key: simple_gla for key in held} if isinstance(held, dict) else simple_gla)
            layer.__class__ = Served
        layer.group = group


@contextmanager
def _layer(layer: Any, cu_seqlens: Tensor | None) -> Iterator[None]:
    token = _serving.set((layer, cu_seqlens))
    try:
        yield
    finally:
        _serving.reset(token)


def _either(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Leetdist's operator within the layers that it serves, and theirs in all others."""
    if getattr(operator, "of_leetdist", False):
        return operator

    @functools.wraps(operator)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (operator if _serving.get() is None else simple_gla)(*args, **kwargs)

    call.of_leetdist = True  # type: ignore[attr-defined]
    return call


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    cu_seqlens: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """What flash-linear-attention's operators of this name compute, over the ranks of the layer that is running."""
    unknown = [name for name, value in more.items() if value not in (None, False) and name != "cu_seqlens_cpu"]
    if unknown:
        raise ValueError(f"simple_gla of leetdist knows no {', '.join(sorted(unknown))}")
    served = _serving.get()
    assert served is not None, "simple_gla is called by the layers that leetdist serves"
    layer, told = served
    if told is not None and (initial_state is not None or output_final_state):
        raise ValueError(ONE_DOCUMENT)
    cu_seqlens = told if cu_seqlens is None else cu_seqlens
    rows, tokens = q.shape[:2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    decay = _decay(g, g_gamma)
    if cu_seqlens is not None and rows > 1:  # all rows as one, whose documents are told by offsets
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        decay = decay.transpose(0, 1).flatten(1)[None] if decay is not None and decay.ndim == 3 else decay
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if initial_state is not None:
        initial_state = initial_state.to(torch.promote_types(q.dtype, torch.float32))
        if tokens == 1 and layer.group is None and cu_seqlens is None:
            o, final = linear_attention_step(q, k, v, initial_state, decay, scale=scale)
            return o.transpose(1, 2), final
    result: Any = linear_attention(
        q, k, v, decay,
        scale=scale, initial_state=initial_state, return_state=bool(output_final_state), cu_seqlens=cu_seqlens,
        group=layer.group,
    )  # fmt: skip
    o, state = result if output_final_state else (result, None)
    return o.transpose(1, 2).reshape(rows, tokens, o.shape[1], -1), state


def _decay(g: Tensor | None, g_gamma: Tensor | None) -> Tensor | None:
    """(H,), or (B, H, N) where the tokens' decays are not one that was expanded."""
    if g is None or g_gamma is not None:
        if g is not None:
            raise ValueError("g and g_gamma are both given, and either is the decay")
        return None if g_gamma is None else g_gamma.float()
    same = all(length == 1 or stride == 0 for length, stride in zip(g.shape[:2], g.stride()[:2], strict=True))
    return g[0, 0].float() if same else g.transpose(1, 2).float()


__all__ = ["register_lightning", "simple_gla"]
