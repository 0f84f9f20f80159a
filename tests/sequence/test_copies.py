"""Copies and pickles of modules that hold a ProcessGroup."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist

import leetdist
from helpers import run_ranks, values


def over_ranks(rank: int) -> None:
    torch.manual_seed(0)
    groups = [dist.group.WORLD, dist.new_group([0, 1])]
    x = torch.randn(1, 64, 32)
    for group in groups:
        layer = leetdist.nn.LightningAttention(32, 2, group=group)
        average = torch.optim.swa_utils.AveragedModel(layer)
        average.update_parameters(layer)
        saved = io.BytesIO()
        torch.save(layer, saved)
        saved.seek(0)
        copies = [copy.deepcopy(layer), average.module, torch.load(saved, weights_only=False)]
        for other in copies:
            assert other.group is group
            assert torch.equal(other(x), layer(x))
    data = pickle.dumps(groups[1])
    dist.destroy_process_group(groups[1])
    with pytest.raises(ValueError, match="does not have"):
        pickle.loads(data)


def test_copies() -> None:
    values(run_ranks(over_ranks, 2, timeout_s=60))
