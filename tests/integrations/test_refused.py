"""What the calls of training refuse: each is a ValueError that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import leetdist

Row = tuple[str, Callable[[], Any], str]


def rows() -> Iterator[Row]:
    model, batch = nn.Linear(2, 2), {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    for value in (3, None, "x", nn.Linear):
        yield f"model {value!r}", lambda v=value: leetdist.parallelize(v, None), "model must be a module"
    for value in (3, None, "x", [3], nn.Linear, [model]):
        yield f"allow {value!r}", lambda v=value: leetdist.parallelize(model, None, allow=v), "allow must be"
    yield "mesh", lambda: leetdist.shard_batch(batch, torch.zeros(2)), "group must be"
    for value in (3, None, "x", [batch]):
        yield f"batch {value!r}", lambda v=value: leetdist.shard_batch(v, None), "batch must be a mapping"
    for value in (1.5, "x", None, True):
        yield (
            f"ignore_index {value!r}",
            lambda v=value: leetdist.shard_batch(batch, None, ignore_index=v),
            "ignore_index",
        )
        yield f"seed {value!r}", lambda v=value: leetdist.ShardedLoader([], None, seed=v), "seed must be"
    for value in (1, "x", None):
        yield f"check {value!r}", lambda v=value: leetdist.shard_batch(batch, None, check=v), "check must be True or"
    for value in (3, None, "x"):
        yield f"loader {value!r}", lambda v=value: leetdist.ShardedLoader(v, None), "loader must be an iterable"
    for value in (torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 0, dtype=torch.int64)):
        ids = {"input_ids": value}
        yield f"input_ids {value.dtype} {value.numel()}", partial(leetdist.shard_batch, ids, None), "input_ids must"
    labels = batch | {"labels": torch.ones(1, 4)}
    yield "float labels", lambda: leetdist.shard_batch(labels, None), "labels must be whole"
    for value in ("tpu", 3.5, [1], True):
        yield f"device {value!r}", lambda v=value: leetdist.ShardedLoader([], None, device=v), "device must be"
    yield "rows", lambda: list(leetdist.ShardedLoader([torch.ones(2)], None)), "loader must give mappings"
    for value in (
        torch.ones((), dtype=torch.int64),
        torch.ones((), dtype=torch.complex64),
        torch.ones((), device="meta"),
    ):
        shown = f"loss_sum {value.dtype} {value.device}"
        yield shown, lambda v=value: leetdist.reduce_loss(v, 1, None), "loss_sum must be a floating"
    bad = torch.tensor(-1), torch.tensor(math.nan), torch.ones((), device="meta"), torch.tensor(True)
    for value in (-1, "x", True, float("nan"), 10**400, torch.ones(2), *bad):
        shown = str(value)[:9]
        yield f"n_tokens {shown}", lambda v=value: leetdist.reduce_loss(torch.ones(()), v, None), "n_tokens must be"
        total = partial(leetdist.reduce_loss, torch.ones(()), 1, None, total_tokens=value)
        yield f"total_tokens {shown}", total, "total_tokens must be"


@pytest.mark.parametrize("row", list(rows()), ids=lambda row: row[0])
def test_is_refused_in_words(row: Row) -> None:
    with pytest.raises(ValueError, match=row[2]):
        row[1]()
