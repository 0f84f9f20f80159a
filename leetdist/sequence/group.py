"""From what a caller names as a group to the transport that serves it."""

from __future__ import annotations

import atexit
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet, finalize

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._compile import _disable_dynamo

from leetdist.arguments import as_float, as_int
from leetdist.kernels.runtime.memo import Memo
from leetdist.sequence import copies as _copies  # noqa: F401  groups in copied and pickled modules
from leetdist.sequence.p2p import PointToPoint
from leetdist.sequence.site import calling_site, warn
from leetdist.sequence.symmetric import connect
from leetdist.sequence.transport import Transport, check_seconds
from leetdist.sequence.virtual import by_name as virtual_by_name

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | Transport"

Result = TypeVar("Result")


def untraced(function: Callable[..., Result]) -> Callable[..., Result]:
    """The same: what hosts tell each other, of which torch.compile traces nothing. Its graph breaks there."""
    outside = _disable_dynamo(function)

    @wraps(function)
    def called(*args: Any, **options: Any) -> Result:  # only where it compiles: Dynamo takes seconds to import
        return outside(*args, **options) if torch.compiler.is_compiling() else function(*args, **options)

    return called


class _Scope(threading.local):
    """The innermost `sequence_parallel` of this thread (a virtual rank is a thread).

    torch.compile guards its graphs by the name, which is all that it reads: of a process group 2.9's Dynamo makes no
    guard. And no value here may be the class's own: Dynamo would take that for every thread's, whatever was set since.
    """

    def __init__(self) -> None:
        self.transport: Transport | None = None
        self.lengths: tuple[int, ...] | None = None
        self.name = ""


_scope = _Scope()
# Whether this process has shared calls by a `sequence_parallel` so far, in any thread; from then on, whether a line of
# the program (leetdist.sequence.site) has.
_surrounded = False
_shared: Memo[int, bool] = Memo(4096)
# What serves a process group lives as long as the group; a compiled graph knows it by name.
_of_group: WeakKeyDictionary[dist.ProcessGroup, Transport] = WeakKeyDictionary()
_making: WeakKeyDictionary[dist.ProcessGroup, threading.Lock] = WeakKeyDictionary()
_lock = threading.Lock()
# Groups that this process has from its parent, by a fork: their connections are the parent's.
_inherited: WeakSet[dist.ProcessGroup] = WeakSet()


def _forked() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent's may have held it
    if dist.is_available():
        _inherited.update(c10d._world.pg_map)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


@atexit.register
def _let_go() -> None:
    """Nothing of ours keeps a group past Python's end: a thread of gloo's that then lets go of a message ends the
    process with signal 6 (one exit in 20 of three ranks on two cores), where the group's own end waits for it."""
    for transport in list(_of_group.values()):
        transport.close()
    _of_group.clear()


@contextmanager
def sequence_parallel(
    group: Group,
    *,
    lengths: Sequence[int] | None = None,
    timeout: float | None = None,
    transport: str | None = None,
) -> Iterator[None]:
    """Calls inside use this group where none is passed.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, or a virtual group; its ranks hold consecutive shards in rank order.
        lengths: tokens on each rank, in rank order: a promise that they hold for all calls inside. What the ranks have
            agreed on for a shape is then not waited for again, which spares each call its messages between the hosts.
            A rank that breaks the promise gets a ValueError. So do the other ranks of its host, some of them in their
            next call only; a rank that already waits for it, or is on another host, gets a timeout.
        timeout: seconds that a rank of this group waits for another, from now on; None keeps what the group has (its
            own, or LEETDIST_TIMEOUT). With NCCL, a timeout makes the host wait for every receive. In symmetric memory
            it is the GPU that waits: it prints which rank waited for which, and the program ends with a CUDA error.
        transport: how states travel: "p2p" (send and receive), "symmetric" (one-sided copies within a node, p2p between
            nodes) or "auto" (symmetric where the GPUs have it); None takes LEETDIST_TRANSPORT, or "auto". Decided when
            the group is first used.

    Raises:
        ValueError: `group` is of another type, a mesh of more dimensions, or does not hold this rank; `lengths` are not
            one number a rank; `timeout` is not positive; `transport` is unknown, or cannot serve this group.

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
    served = None if group is None else resolve(group, transport)
    if served is None:
        hint = f": {_unjoined()}" if _unjoined() else ""
        raise ValueError(f"group must be a ProcessGroup, a 1-D DeviceMesh or a virtual group, got None{hint}")
    if lengths is not None:
        wanted = f"{served.size} numbers of tokens, one a rank"
        if not isinstance(cast(Any, lengths), (list, tuple)):
            raise ValueError(f"lengths must be {wanted}, got {lengths!r}")
        lengths = tuple(as_int("lengths", n, wanted) for n in lengths)
        if len(lengths) != served.size or min(lengths) < 0:
            raise ValueError(f"lengths must be {wanted}, got {list(lengths)}")
    if timeout is not None:
        seconds = as_float("timeout", timeout)
        if not 0 < seconds < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        served.seconds = check_seconds("timeout", seconds)
    if served.size > 1 and not torch.compiler.is_compiling():
        global _surrounded
        _surrounded = True
    with _inside(served, lengths):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Calls inside are this rank's own, whatever `sequence_parallel` surrounds them."""
    with _inside(None, None):
        yield


@contextmanager
def _inside(served: Transport | None, lengths: tuple[int, ...] | None) -> Iterator[None]:
    before = (_scope.transport, _scope.lengths, _scope.name)
    _scope.transport, _scope.lengths = served, lengths
    _scope.name = "" if served is None else served.name
    try:
        yield
    finally:
        _scope.transport, _scope.lengths, _scope.name = before


def is_alone(group: Group | None) -> bool:
    """Whether a call with this group, or without one in its surroundings, is this rank's own: nobody shares its
    tokens."""
    transport = resolve(group)
    return transport is None or transport.size == 1


def check_alone(call: str) -> None:
    """A call that works on this rank by itself is not under a `sequence_parallel` of several ranks."""
    if _scope.transport is not None and _scope.transport.size > 1:
        raise ValueError(
            f"{call} knows no group: it decodes on this rank by itself, and a sequence_parallel of "
            f"{_scope.transport.size} ranks surrounds the call. Every rank has the whole state after linear_attention "
            "or stream; decode outside of sequence_parallel"
        )


def _unjoined() -> str:
    """In words, that a launcher started several processes and this one has joined no process group; "" elsewhere."""
    ranks = os.environ.get("WORLD_SIZE", "")
    if not ranks.isdecimal() or int(ranks) < 2 or not dist.is_available() or dist.is_initialized():
        return ""
    return (
        f"WORLD_SIZE is {ranks}, and this process has not joined its process group, so that dist.group.WORLD is None; "
        "call torch.distributed.init_process_group, or leetdist.device_mesh, first"
    )


def warn_where_unjoined() -> None:
    """A call without a group, in one of a launcher's processes: each of them would compute everything."""
    if os.environ.get("RANK", "0") == "0" and (words := _unjoined()):
        warn(f"leetdist: nothing is sharded, group is None. {words}")


def _note_line() -> None:
    """Where a call comes from that names no group; a warning where it has none in a backward pass: activation
    checkpointing recomputes it after its `sequence_parallel`, or on a GPU in another thread. But not if its line of the
    program has made calls of this rank's own only."""
    site = calling_site()
    number = 0 if site is None else site.number
    if _scope.transport is not None:
        _shared[number] = _scope.transport.size > 1 or _shared.get(number, False)
    elif torch._C._current_graph_task_id() == -1:
        _shared.setdefault(number, False)
    elif not number or _shared.get(number, True):
        warn(
            "leetdist: this call, recomputed in a backward pass, has no group, while a sequence_parallel surrounded "
            "others: if it was one of them, its gradients are those of this rank's tokens alone. Pass group= to the "
            "call or the layer"
        )


def resolve(group: Group | None, transport: str | None = None) -> Transport | None:
    """The transport of a group; of the surrounding `sequence_parallel` for None; None for neither."""
    if group is None:
        if _surrounded and not torch.compiler.is_compiling():
            _note_line()
        return _scope.transport
    if isinstance(group, Transport):
        return _served_by(group, transport)
    process_group = _process_group(group)
    known = _of_group.get(process_group)
    if known is None or process_group not in c10d._world.pg_map:  # get_rank is several times this
        _check_member(process_group)
    return _served_by(known or _first_use(process_group, transport), transport)


@untraced
def _first_use(group: dist.ProcessGroup, wanted: str | None) -> Transport:
    with _lock:
        making = _making.setdefault(group, threading.Lock())
    with making:  # two threads that use a group first at the same time
        return _of_group.get(group) or _make(group, wanted)


def _make(group: dist.ProcessGroup, wanted: str | None) -> Transport:
    """The transport of a group that has none yet; what served groups that have been destroyed is let go of."""
    if group in _inherited:
        raise RuntimeError(
            "leetdist: the group was made by the process that this one was forked from, and its connections are its "
            "parent's: set up a process group of the children's own, or start them by spawn"
        )
    for old, transport in list(_of_group.items()):
        if old not in c10d._world.pg_map:  # somebody still holds it
            transport.close()
            del _of_group[old]
    under = PointToPoint(group)
    try:
        made = connect(under, wanted)
        if made is under:  # it carries the states
            under.take_nccl()
    except BaseException:
        under.close()
        raise
    _of_group[group] = made
    finalize(group, made.close).atexit = False
    return made


def _served_by(served: Transport, wanted: str | None) -> Transport:
    if wanted not in (None, "auto", served.kind):
        raise ValueError(f"transport: the group is served by {served.kind!r} already, got {wanted!r}")
    return served


def declared_lengths(transport: Transport) -> tuple[int, ...] | None:
    """The lengths that the surrounding `sequence_parallel` of this transport promises."""
    return _scope.lengths if _scope.transport is transport else None


def name_of(group: Group | None) -> str:
    """What `by_name` finds the group by, "" for none; torch.compile traces this."""
    if group is None:
        return _scope.name
    if isinstance(group, Transport):
        return group.name
    if isinstance(group, dist.ProcessGroup):
        return str(group.group_name)
    return str(group.get_group().group_name)


def by_name(name: str) -> Transport | None:
    """The transport of a name from `name_of`; None for ""."""
    if not name:
        return None
    return virtual_by_name(name) or resolve(cast(Any, c10d)._resolve_process_group(name))


def _process_group(group: Group) -> dist.ProcessGroup:
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
    given: Any = group
    if given is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group returns to who is not in it
        raise ValueError(f"group does not hold this rank (global rank {dist.get_rank()})")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group must be a ProcessGroup, a 1-D DeviceMesh or a virtual group, got {type(group).__name__}"
        )
    return group


def _check_member(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) < 0:
        raise ValueError(f"group does not hold this rank (global rank {dist.get_rank()})")
