"""`parallelize`: find the layers that mix tokens, and make each work on a shard; refuse what is not known."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from torch import nn

from leetdist.mesh import sequence_group
from leetdist.nn.attention import _DecayAttention

if TYPE_CHECKING:
    from leetdist.mesh import Mesh
    from leetdist.sequence.group import Group

M = TypeVar("M", bound=nn.Module)
Handler: TypeAlias = "Callable[[Any, Group | None], None]"

_handlers: dict[type[nn.Module], Handler] = {}

# Layers through which one token reaches another, by the names that people give them. A class that is named like this
# and has no handler would restart its state, or see its own shard only, on every rank: without any error.
_MIXES_TOKENS = re.compile(
    r"atten|attn|mamba|ssm|ssd|rwkv|lstm|gru|rnn|recurr|delta|kda|gla(?![a-z])|hgrn|hyena|retention|lightning|conv|mixer"
    r"|scan|state_?space|^s[45]|lru(?![a-z])|time_?mix|token_?shift|fourier|toeplitz|cumul|cumsum",
    re.IGNORECASE,
)
_MIXING_TYPES = (nn.RNNBase, nn.MultiheadAttention, nn.Conv1d, nn.AvgPool1d, nn.MaxPool1d)
# Named like one of those, but each token keeps to itself.
_POINTWISE = ("transformers.pytorch_utils.Conv1D",)


def register(kind: type[nn.Module]) -> Callable[[Handler], Handler]:
    """Decorator: how `parallelize` treats modules of this class (and of its subclasses).

    The handler gets the module and the group of its sequence (None: this process alone), and makes the module's
    forward right for a shard: contiguous, in rank order, on the tile grid.

    >>> class Mixer(nn.Module):
    ...     group = None
    >>> @register(Mixer)
    ... def _(module, group):
    ...     module.group = group
    """

    def add(handler: Handler) -> Handler:
        _handlers[kind] = handler
        return handler

    return add


@register(_DecayAttention)
def _ours(module: _DecayAttention, group: Group | None) -> None:
    module.group = group


def parallelize(model: M, mesh: Mesh | None, *, allow: Iterable[type[nn.Module]] = ()) -> M:
    """Make a model work on shards of its sequences: the layers it knows get `mesh`'s sequence ranks. In place.

    Knows `leetdist.nn`'s layers; transformers' MiniMax and its softmax layers, and other transformers models that have
    softmax attention only (docs of `leetdist.integrations.transformers`); and what `register` adds. Call it before
    DDP, `fully_shard`, `accelerator.prepare` or `deepspeed.initialize`. The model then takes what `shard_batch` makes.

    A transformers model's own `loss` becomes the mean over all ranks, as `reduce_loss` computes it, and
    `generate` takes the whole prompt on every rank, shards it inside, and returns the same tokens on all.

    Args:
        model: any module.
        mesh: a (dp, sp) mesh, or the group that shares a sequence; None, or one rank, is a drop-in that computes the
            same on one device, faster.
        allow: classes that look as if they mixed tokens and do not.

    Layers are told by their class and its name. What hides behind a harmless name (a cumsum in a forward of your own)
    it cannot see: compare a sharded loss and its gradients with one process's, once.

    Returns:
        the model.

    Raises:
        ValueError: a layer carries a state, or mixes tokens in another way, and leetdist does not know it; or there is
            no layer that it knows. The model is then unchanged.

    Shapes: (B, N_local, ...) in and out, any dtype. Source: LASP-2H, arXiv 2502.07563, for models that have both linear
    and softmax attention.

    >>> import torch, leetdist
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), leetdist.nn.LightningAttention(32, heads=2))
    >>> model = leetdist.parallelize(model, leetdist.device_mesh(sequence=1))
    >>> leetdist.parallelize(torch.nn.LSTM(8, 8), None)
    Traceback (most recent call last):
    ...
    ValueError: leetdist does not know how to shard these layers of LSTM: ...
    """
    group = sequence_group(mesh)
    finish = None
    if any(base.__module__.startswith("transformers.") for base in type(model).__mro__):
        from leetdist.integrations import transformers

        finish = transformers.prepare(model, mesh, group)

    known: list[tuple[nn.Module, Handler]] = []
    containers: set[str] = set()
    unknown: dict[str, str] = {}
    harmless = tuple(allow)
    for name, module in model.named_modules():
        handler = handler_of(module)
        if handler is not None:
            known.append((module, handler))
            containers.update(_parents(name))
        elif _mixes_tokens(module) and not isinstance(module, harmless):
            unknown[name] = type(module).__name__
    # Something that holds known layers is a stack of them; of the rest, the outermost names are enough to tell.
    unknown = {name: kind for name, kind in unknown.items() if name not in containers}
    refused = {name: kind for name, kind in unknown.items() if not _parents(name) & unknown.keys()}
    if refused:
        shown = ", ".join(f"{name or 'itself'} ({kind})" for name, kind in list(refused.items())[:4])
        raise ValueError(
            f"leetdist does not know how to shard these layers of {type(model).__name__}: {shown}"
            f"{' and more' if len(refused) > 4 else ''}. Their state would silently restart on every rank. Teach it "
            "with leetdist.integrations.parallelize.register, or pass allow=[...] if no token reaches another in them"
        )
    if not known:
        raise ValueError(f"{type(model).__name__} has no layer that leetdist knows: nothing in it would be sharded")
    for module, handler in known:
        handler(module, group)
    if finish is not None:
        finish()
    return model


def handler_of(module: nn.Module) -> Handler | None:
    """The handler of the module's class, or of the nearest base class that has one."""
    return next((_handlers[kind] for kind in type(module).__mro__ if kind in _handlers), None)


def _mixes_tokens(module: nn.Module) -> bool:
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" in _POINTWISE:
        return False
    if isinstance(module, nn.Conv1d | nn.AvgPool1d | nn.MaxPool1d):
        return module.kernel_size not in (1, (1,))
    return isinstance(module, _MIXING_TYPES) or bool(_MIXES_TOKENS.search(kind.__name__))


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(len(parts))} if name else set()


__all__ = ["handler_of", "parallelize", "register"]
