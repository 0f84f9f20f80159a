"""Every bad argument is a ValueError that names the argument, what it got and what it wants."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import leetdist
from leetdist.reference import relative_error


def call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {name: torch.randn(1, 2, 64, 16) for name in "qkv"}
    arguments |= changes
    return leetdist.linear_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.randn(2, 64, 16)}, r"q must have shape \(B, H, N, D\), got \(2, 64, 16\)"),
        ({"q": [1.0]}, "q must be a tensor, got list"),
        ({"k": torch.randn(1, 2, 64, 8)}, "k must have q's head dimension Dk = 16, got 8"),
        ({"k": torch.randn(1, 2, 63, 16)}, "k must have q's batch and tokens"),
        ({"v": torch.randn(2, 2, 64, 16)}, "v must have q's batch and tokens"),
        ({"k": torch.randn(1, 3, 64, 16)}, "q must have a number of heads that divides k's 3, got 2"),
        ({"v": torch.randn(1, 3, 64, 16)}, "q must have a number of heads that divides v's 3, got 2"),
        ({"v": torch.randn(1, 2, 64, 0)}, "v must have no empty dimension"),
        ({"v": torch.randn(1, 2, 64, 16).half()}, "v must have q's dtype, torch.float32, got torch.float16"),
        ({"q": torch.zeros(1, 2, 64, 16, dtype=torch.int32)}, "q must be float32, bfloat16, float16 or float64"),
        ({name: torch.randn(1, 2, 0, 16) for name in "qkv"}, "N is 0"),
        ({"log_decay": torch.tensor([0.1, -1.0])}, "log_decay must be <= 0 .* got 0.1.* for head 0"),
        ({"log_decay": torch.tensor([-1.0, float("nan")])}, "log_decay must be <= 0 .* got nan for head 1"),
        (
            {"log_decay": torch.zeros(3)},
            r"log_decay must have shape \(H,\) = \(2,\), or \(B, H, N\) = \(1, 2, 64\), got \(3,\)",
        ),
        ({"log_decay": torch.zeros(2).half()}, "log_decay must be float32 .* got torch.float16"),
        ({"log_decay": -1.0}, "log_decay must be a tensor or None, got float"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
        ({"scale": "1"}, "scale must be a finite number, got '1'"),
        ({"method": "magic"}, "method must be one of auto, vanilla, .* got 'magic'"),
        ({"precision": "fp8"}, """precision must be None, "tf32" or "high", got 'fp8'"""),
        ({n: torch.ones(1, 2, 64, 16).half() for n in "qkv"} | {"precision": "tf32"}, '"tf32" is for float32 inputs'),
        ({"tile": 48}, "tile must be a power of two of at least 16 tokens, or None, got 48"),
        ({"tile": 8}, "tile must be a power of two"),
        ({"group": 3}, "group must be a ProcessGroup, a 1-D DeviceMesh or a virtual group, got int"),
        ({"initial_state": torch.zeros(1, 2, 16, 8)}, r"initial_state must have shape .* = \(1, 2, 16, 16\)"),
        ({"initial_state": torch.zeros(1, 2, 16, 16).half()}, "initial_state must be torch.float32, got torch.float16"),
        ({"cu_seqlens": torch.tensor([0, 32])}, "cu_seqlens must end at the number of tokens, 64, got 32"),
        ({"cu_seqlens": torch.tensor([1, 64])}, "cu_seqlens must start at 0 and not decrease"),
        ({"cu_seqlens": torch.tensor([0, 40, 20, 64])}, "cu_seqlens must start at 0 and not decrease"),
        ({"cu_seqlens": torch.tensor([0.0, 64.0])}, "cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": [0, 64]}, "cu_seqlens must be a tensor or None, got list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_linear_attention(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(**changes)


def test_packed_documents_lie_in_one_row() -> None:
    q, k, v = (torch.randn(2, 2, 64, 16) for _ in range(3))
    with pytest.raises(ValueError, match="B must be 1, got 2"):
        leetdist.linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 64]))


def test_a_decay_that_turned_bad_is_read_again() -> None:
    log_decay = torch.zeros(2)
    call(log_decay=log_decay)
    log_decay[1] = 1.0
    with pytest.raises(ValueError, match="for head 1"):
        call(log_decay=log_decay)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": torch.zeros(1, 2, 16, 8)}, "state must have shape"),
        ({"state": torch.zeros(1, 2, 16, 16).double()}, "state must be torch.float32"),
        ({"q": torch.randn(1, 2, 2, 16), "k": torch.randn(1, 2, 2, 16), "v": torch.randn(1, 2, 2, 16)}, "one token"),
        ({"log_decay": torch.ones(2)}, "log_decay must be <= 0"),
    ],
)
def test_linear_attention_step(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {name: torch.randn(1, 2, 1, 16) for name in "qkv"}
    arguments["state"] = torch.zeros(1, 2, 16, 16)
    with pytest.raises(ValueError, match=words):
        leetdist.linear_attention_step(**(arguments | changes))


@pytest.mark.parametrize("function", [leetdist.shard_sequence, leetdist.gather_sequence])
def test_dimension_out_of_range(function: Any) -> None:
    with pytest.raises(ValueError, match=r"dim must be in \[-2, 2\)"):
        function(torch.zeros(3, 3), 2, None)


def test_a_failing_virtual_rank_stops_the_others() -> None:
    def rank(group):
        if group.rank == 1:
            raise KeyError("rank 1 has its own trouble")
        x = torch.randn(1, 1, 32, 16)
        return leetdist.linear_attention(x, x, x, group=group)

    with pytest.raises(KeyError, match="its own trouble"):
        leetdist.virtual_ranks(rank, 3)


def test_no_ranks() -> None:
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        leetdist.virtual_ranks(lambda group: None, 0)


def test_errors_of_other_shapes_are_not_compared() -> None:
    """Broadcasting would compare every entry of a batch with its first."""
    with pytest.raises(ValueError, match=r"reference's shape, \(1, 4\), got \(3, 4\)"):
        relative_error(torch.ones(3, 4), torch.ones(1, 4))
