"""What is remembered has a bound."""

from __future__ import annotations

import torch

import leetdist
from leetdist.engine import planning
from leetdist.engine.plan import Plan
from leetdist.kernels.runtime.memo import Memo


def test_one_more_than_the_most_begins_anew() -> None:
    memo: Memo[int, str] = Memo(3)
    for key in range(3):
        memo[key] = str(key)
    memo[1] = "again"
    assert memo == {0: "0", 1: "again", 2: "2"}
    memo[3] = "3"
    assert memo == {3: "3"}


def test_ever_new_calls_do_not_fill_the_memory(monkeypatch) -> None:
    kept: Memo[object, Plan] = Memo(4)
    monkeypatch.setattr(planning, "_plans", kept)
    x = torch.randn(1, 1, 9, 8)
    expected = leetdist.linear_attention(x, x, x)
    for tokens in range(1, 10):
        assert torch.equal(leetdist.linear_attention(*[x[:, :, :tokens]] * 3), expected[:, :, :tokens])
        assert 1 <= len(kept) <= 4
