"""The job's ranks as a mesh: data parallel x sequence parallel."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from leetdist.arguments import as_int
from leetdist.sequence.agreement import gathered
from leetdist.sequence.group import resolve, untraced
from leetdist.sequence.timeouts import timeout_of
from leetdist.sequence.transport import Transport

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from leetdist.sequence.group import Group

    Mesh: TypeAlias = "DeviceMesh | Group"

# The names that torch, accelerate and torchtitan give to these dimensions.
SEQUENCE_NAMES = ("sp", "cp")
DATA_NAMES = ("dp", "dp_replicate", "dp_shard")


def device_mesh(sequence: int | None = None, *, device_type: str | None = None) -> DeviceMesh:
    """All ranks of the job as a ("dp", "sp") mesh: neighbours share a sequence.

    Joins the process group that torchrun, `accelerate launch` or `deepspeed` prepared, if nothing did so yet; without
    a launcher, the job is this process alone. Wherever a `mesh` is asked for, a mesh of the launcher's own does as
    well, if it names its dimensions "sp" or "cp" and "dp", "dp_replicate" or "dp_shard".

    Args:
        sequence: ranks that share one sequence; the rest is data parallel. None takes all ranks.
        device_type: "cuda" or "cpu"; None takes GPUs where there are any.

    Returns:
        DeviceMesh of shape (ranks / sequence, sequence); `mesh["sp"]` is a group for `linear_attention`.

    Raises:
        ValueError: `sequence` does not divide the number of ranks, or `device_type` is unknown or not there.

    Works with inputs of any shape and dtype. Source: LASP's data-sequence hybrid parallelism, arXiv 2404.02882.

    >>> import leetdist
    >>> leetdist.device_mesh(sequence=1).mesh_dim_names
    ('dp', 'sp')
    """
    from torch.distributed.device_mesh import init_device_mesh

    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device_type, str) or device_type not in ("cuda", "cpu"):
        raise ValueError(f'device_type must be "cuda", "cpu" or None, got {device_type!r}')
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError('device_type is "cuda", and torch.cuda is not available')
    if sequence is not None:
        sequence = as_int("sequence", sequence, "a number of ranks, or None")
        if sequence < 1:
            raise ValueError(f"sequence must be a positive number of ranks, got {sequence}")
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not dist.is_initialized():
        # gloo beside NCCL: what the hosts must agree on does not stop the GPU's stream.
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    ranks = dist.get_world_size()
    sequence = ranks if sequence is None else sequence
    if ranks % sequence:
        raise ValueError(f"sequence must divide the number of ranks in the job, {ranks}, got {sequence}")
    mesh = init_device_mesh(device_type, (ranks // sequence, sequence), mesh_dim_names=("dp", "sp"))
    for name in ("dp", "sp"):
        _wait_as_the_job_does(mesh[name].get_group(), device_type)
    return mesh


def _wait_as_the_job_does(group: Any, device_type: str) -> None:
    """init_process_group's timeout, which torch gives to no group of a mesh."""
    for device in {"cpu", device_type}:
        with suppress(RuntimeError):  # no backend for tensors there
            group._get_backend(torch.device(device))._set_default_timeout(timeout_of(dist.group.WORLD, device))


def _ranks(group: Any) -> int:
    """How many ranks a group has; nothing is set up to serve it yet."""
    if not hasattr(group, "size") or isinstance(group, Tensor):
        resolve(group)  # says what a group has to be
    return int(group.size if isinstance(group, Transport) else group.size())


def dimensions_of(mesh: Any) -> dict[str, Any]:
    """Name -> 1-D mesh, for each dimension of a DeviceMesh with names; nothing for what else serves as a group."""
    names = getattr(mesh, "mesh_dim_names", None) or ()
    return {name: mesh[name] if len(names) > 1 else mesh for name in names}


def sequence_group(mesh: Mesh | None) -> Group | None:
    """The ranks of `mesh` that share a sequence with this one; None where that is this one alone."""
    if mesh is None:
        return None
    group: Any = mesh
    if dimensions := dimensions_of(mesh):
        found = [dimension for name, dimension in dimensions.items() if name in SEQUENCE_NAMES]
        if len(found) != 1:
            raise ValueError(f"mesh must have one dimension named sp or cp, got the dimensions {tuple(dimensions)}")
        (group,) = found
    return group if _ranks(group) > 1 else None


def data_rank(mesh: Mesh | None) -> tuple[int, int]:
    """(index, count) of this rank's sequences among the data-parallel ones."""
    index, count = 0, 1
    for name, dimension in dimensions_of(mesh).items():
        if name in DATA_NAMES:
            index = index * dimension.size() + dimension.get_local_rank()
            count *= dimension.size()
    return index, count


@untraced
def all_transports(mesh: Mesh | None) -> list[Transport]:
    """One transport for each dimension over which tokens are spread: a sum over all of them is the sum over the job."""
    dimensions = dimensions_of(mesh)
    for name, dimension in dimensions.items():
        if name not in SEQUENCE_NAMES + DATA_NAMES and dimension.size() > 1:
            raise ValueError(
                f"mesh has a dimension {name!r}, whose part in the mean of gradients is unknown; known are "
                f"{', '.join(SEQUENCE_NAMES + DATA_NAMES)}"
            )
    groups = list(dimensions.values()) or ([] if mesh is None else [mesh])
    found = [resolve(group) for group in groups if _ranks(group) > 1]
    return [transport for transport in found if transport is not None]


def process_group(transport: Transport) -> dist.ProcessGroup | None:
    """The process group that a transport serves; None for virtual ranks."""
    group = getattr(transport, "group", None)
    return group if isinstance(group, dist.ProcessGroup) else None


def all_sum(x: Tensor, transports: list[Transport]) -> Tensor:
    """`x` summed over all ranks of the transports; a new tensor, not differentiable."""
    x = x.detach().clone()
    for transport in transports:
        if (group := process_group(transport)) is not None:
            with transport.collective("a sum over the ranks"):
                dist.all_reduce(x, group=group)
        else:
            x = torch.stack(gathered(x, transport, "numbers to sum")).sum(0)
    return x


__all__ = ["all_sum", "all_transports", "data_rank", "device_mesh", "dimensions_of", "process_group", "sequence_group"]
