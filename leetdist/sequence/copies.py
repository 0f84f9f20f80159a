"""A ProcessGroup in a copy or a pickle of the module that holds it: the same group, found by its name.

PyTorch can do neither, so a model given a group could not be copied (an average of its weights is one) or saved whole.
"""

from __future__ import annotations

import copyreg
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d


def _group_named(name: str) -> dist.ProcessGroup:
    try:
        group: dist.ProcessGroup = cast(Any, c10d)._resolve_process_group(name)
    except (RuntimeError, LookupError, ValueError) as error:
        raise ValueError(
            f"a pickled module holds the process group named {name!r}, which this process does not have: make its "
            "groups first, in the order in which they were made where it was saved, or save its state_dict instead"
        ) from error
    return group


def _by_name(group: dist.ProcessGroup) -> tuple[Any, tuple[str]]:
    return _group_named, (str(group.group_name),)


if dist.is_available():
    copyreg.pickle(dist.ProcessGroup, _by_name)
