"""Which layers `parallelize` knows: a handler for each class, that makes a layer right for a shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from leetdist.nn.attention import DecayAttention
from leetdist.nn.gated import SimpleGLA
from leetdist.nn.mamba2 import Mamba2

if TYPE_CHECKING:
    from leetdist.sequence.group import Group

Handler: TypeAlias = "Callable[[Any, Group | None], None]"

_handlers: dict[type[nn.Module], Handler] = {}
_exact: set[Handler] = set()


def register(kind: type[nn.Module], *, exact: bool = False) -> Callable[[Handler], Handler]:
    """Decorator: how `parallelize` treats modules of this class (and of its subclasses).

    The handler gets the module and the group of its sequence (None: this process alone), and makes the module's
    forward right for a shard: contiguous, in rank order, on the tile grid. It may be called again with another group.
    exact: whether the module then has `tile` and `exact`, as leetdist.nn's layers.

    >>> class Mixer(nn.Module):
    ...     group = None
    >>> @register(Mixer)
    ... def _(module, group):
    ...     module.group = group
    """

    def add(handler: Handler) -> Handler:
        _handlers[kind] = handler
        if exact:
            _exact.add(handler)
        return handler

    return add


def becomes_exact(module: nn.Module) -> bool:
    """Whether the module, with its handler's help, has `tile` and `exact`."""
    return hasattr(module, "exact") or handler_of(module) in _exact


def handler_of(module: nn.Module) -> Handler | None:
    """The handler of the module's class, or of the nearest base class that has one."""
    return next((_handlers[kind] for kind in type(module).__mro__ if kind in _handlers), None)


@register(DecayAttention)
@register(SimpleGLA)
@register(Mamba2)
def _ours(module: DecayAttention | SimpleGLA | Mamba2, group: Group | None) -> None:
    module.group = group


__all__ = ["Handler", "handler_of", "register"]
