"""From what a caller names as a group to the transport that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakKeyDictionary

import torch.distributed as dist

from leetdist.sequence.transport import PointToPoint, Transport

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | Transport"

_current: ContextVar[Transport | None] = ContextVar("leetdist_group", default=None)
_transports: WeakKeyDictionary[dist.ProcessGroup, PointToPoint] = WeakKeyDictionary()


@contextmanager
def sequence_parallel(group: Group) -> Iterator[None]:
    """Calls inside use this group where none is passed.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, or a virtual group; its ranks hold consecutive shards in rank order.

    Raises:
        ValueError: `group` is of another type, a mesh of more dimensions, or does not hold this rank.

    Shapes and dtypes are those of the calls inside (`linear_attention`: (B, H, N, D)). Source: sequence parallelism of
    linear attention as in LASP, arXiv 2404.02882.

    >>> import torch, leetdist
    >>> x = torch.randn(1, 1, 64, 16)
    >>> def rank(group):
    ...     with leetdist.sequence_parallel(group):
    ...         local = leetdist.shard_sequence(x, 2, group)
    ...         return leetdist.linear_attention(local, local, local).shape
    >>> leetdist.virtual_ranks(rank, ranks=2)
    [torch.Size([1, 1, 32, 16]), torch.Size([1, 1, 32, 16])]
    """
    token = _current.set(resolve(group))
    try:
        yield
    finally:
        _current.reset(token)


def resolve(group: Group | None) -> Transport | None:
    """The transport of a group; of the surrounding `sequence_parallel` for None; None for neither."""
    if group is None:
        return _current.get()
    if isinstance(group, Transport):
        return group
    if not dist.is_available():
        raise ValueError("group: this build of torch has no torch.distributed")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a 1-D DeviceMesh, got one of shape {tuple(group.mesh.shape)}; pick a dimension, as in "
                f"mesh[{(group.mesh_dim_names or ('sp',))[-1]!r}]"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a ProcessGroup, a 1-D DeviceMesh or a virtual group, got {type(group).__name__}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(f"group does not hold this rank (global rank {dist.get_rank()})")
    if group not in _transports:
        _transports[group] = PointToPoint(group)
    return _transports[group]
