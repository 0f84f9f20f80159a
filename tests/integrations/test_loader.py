"""ShardedLoader around loaders that are more than torch's: with states of their own, or dealing rows already."""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

import pytest
import torch
from test_batches import Meshed, Stream
from torch.utils.data import DataLoader

import leetdist


def rows_of(loader: Any, steps: int | None = None) -> list[list[int]]:
    rows = []
    for batch in loader:
        rows.append(batch["input_ids"][:, 0].tolist())
        if len(rows) == steps:
            break
    return rows


class Counting(Stream):
    """A stream that says how many rows were drawn from it, and goes on from its state."""

    drawn = start = 0

    def __iter__(self) -> Any:
        for number in range(self.start, 8):
            self.drawn, self.start = self.drawn + 1, number + 1
            yield {"input_ids": torch.full((16,), number)}
        self.start = 0

    def state_dict(self) -> dict[str, int]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["start"]


class Stateful:
    """A loader of batches with a state, in torchdata's form."""

    def __init__(self) -> None:
        self.rows = Counting()

    def __iter__(self) -> Any:
        for row in self.rows:
            yield {"input_ids": torch.stack([row["input_ids"], row["input_ids"] + 10])}

    def state_dict(self) -> dict[str, int]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rows.load_state_dict(state)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_state_of_a_loader_is_kept_and_nothing_is_drawn_twice(steps: int) -> None:
    straight = rows_of(leetdist.ShardedLoader(Stateful(), None))
    stopped = leetdist.ShardedLoader(Stateful(), None)
    assert rows_of(stopped, steps) == straight[:steps]
    halves = []
    for rank in (0, 1):
        resumed = leetdist.ShardedLoader(Stateful(), Meshed(rank, 2))  # type: ignore[arg-type]
        resumed.load_state_dict(stopped.state_dict())
        halves.append(rows_of(resumed))
        assert resumed.given.rows.drawn == 8 - steps  # type: ignore[attr-defined]
        assert (resumed.epoch, resumed.step) == (1, 0)
        assert len(rows_of(resumed)) == 8  # the next epoch is a whole one
    assert [a + b for a, b in zip(*halves, strict=True)] == straight[steps:]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["shuffled", "stream"])
def test_torchdatas_stateful_loader(kind: str, workers: int) -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> leetdist.ShardedLoader:
        rows = [{"input_ids": torch.full((16,), i)} for i in range(8)]
        more: dict[str, Any] = {"shuffle": True} if kind == "shuffled" else {}
        data = rows if kind == "shuffled" else Counting()
        return leetdist.ShardedLoader(
            torchdata.StatefulDataLoader(data, batch_size=2, num_workers=workers, **more), None, seed=3
        )

    straight = loader()
    epochs = [rows_of(straight), rows_of(straight)]
    assert sorted(chain.from_iterable(epochs[0])) == list(range(8))
    assert (epochs[0] != epochs[1]) == (kind == "shuffled")
    stopped = loader()
    rows_of(stopped)
    assert rows_of(stopped, 2) == epochs[1][:2]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    assert rows_of(resumed) == epochs[1][2:]
    assert resumed.progress.startswith("epoch 2, step 0")


def dealing(names: tuple[str, str]) -> Any:
    """A sampler that says in these words that it deals rows."""
    return type("Sampler", (list,), {names[0]: 2, names[1]: 1})([0, 1])


@pytest.mark.parametrize(
    "names",
    [
        ("num_replicas", "rank"),
        ("dp_size", "rank"),
        ("data_parallel_size", "data_parallel_rank"),
        ("world_size", "rank"),
    ],
)
def test_dealers_are_known_by_what_they_say(names: tuple[str, str]) -> None:
    rows: Any = [{"input_ids": torch.full((16,), i)} for i in range(4)]
    with pytest.raises(ValueError, match="deals rows to ranks already, by its Sampler"):
        leetdist.ShardedLoader(DataLoader(rows, sampler=dealing(names)), None)


def test_a_loader_that_sends_rows_from_one_rank_is_refused() -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    source = data_loader.DataLoaderDispatcher(Stream(), batch_size=4)
    leetdist.ShardedLoader(source, None)  # alone it deals nothing
    source.state = type("State", (), {"num_processes": 2, "process_index": 1})()
    with pytest.raises(ValueError, match="deals rows to ranks already, by its State"):
        leetdist.ShardedLoader(source, None)


def test_the_mesh_is_looked_at_when_the_loader_is_built() -> None:
    class Mesh:
        mesh_dim_names = ("dp", "tp")

        def __getitem__(self, name: str) -> Meshed:
            return Meshed(0, 2)

    with pytest.raises(ValueError, match="one dimension named sp or cp"):
        leetdist.ShardedLoader([], Mesh())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got str"):
        leetdist.ShardedLoader([], "sp")  # type: ignore[arg-type]


def test_a_loader_that_ends_before_those_of_other_ranks() -> None:
    batches = [{"input_ids": torch.full((1, 64), number)} for number in range(3)]

    def rank(group: Any) -> int:
        assert len(list(leetdist.ShardedLoader(batches, group))) == 3
        begin = time.monotonic()
        with pytest.raises(ValueError, match="makes another call of the group: it asks for"):
            list(leetdist.ShardedLoader(batches[: 2 if group.rank == 1 else 3], group))
        assert time.monotonic() - begin < 30
        return group.rank

    assert leetdist.virtual_ranks(rank, 3) == [0, 1, 2]
