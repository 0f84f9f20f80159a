"""Batches and the loss: what reaches each rank, and what the ranks make of it together."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import leetdist


def batch_of(tokens: int, rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(50, (rows, tokens))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [64, 100, 1000])
def test_shards_join_to_the_whole(ranks: int, tokens: int) -> None:
    batch = batch_of(tokens)
    parts = leetdist.virtual_ranks(lambda group: leetdist.shard_batch(batch, group), ranks)
    joined = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    assert torch.equal(joined["input_ids"], batch["input_ids"])
    assert torch.equal(joined["attention_mask"], batch["attention_mask"])
    assert torch.equal(joined["position_ids"], torch.arange(tokens)[None])
    # Across the borders too, each token learns the next one.
    assert torch.equal(joined["labels"][:, :-1], batch["input_ids"][:, 1:])
    assert bool((joined["labels"][:, -1] == -100).all())
    assert torch.equal(joined["labels"], joined["shift_labels"])


def test_shards_lie_on_the_grid_of_the_operator() -> None:
    """Uneven shards of odd lengths are taken by linear_attention as they come."""
    batch = batch_of(1000)

    def rank(group: Any) -> int:
        ids = leetdist.shard_batch(batch, group)["input_ids"]
        q = torch.randn(2, 1, ids.shape[1], 8)
        leetdist.linear_attention(q, q, q, group=group)
        return ids.shape[1]

    lengths = leetdist.virtual_ranks(rank, 3)
    assert len(set(lengths)) > 1


def test_documents_keep_their_ends_and_positions() -> None:
    ids = torch.arange(48)[None]
    batch = {"input_ids": ids, "labels": ids, "cu_seqlens": torch.tensor([0, 20, 48])}
    parts = leetdist.virtual_ranks(lambda group: leetdist.shard_batch(batch, group), 2)
    labels = torch.cat([part["labels"] for part in parts], 1)[0]
    assert labels[[19, 47]].tolist() == [-100, -100]
    assert labels[20] == 21
    positions = torch.cat([part["position_ids"] for part in parts], 1)[0]
    assert positions.tolist() == [*range(20), *range(28)]
    assert all(torch.equal(part["cu_seqlens"], batch["cu_seqlens"]) for part in parts)


def test_labels_are_contiguous_without_a_mesh_too() -> None:
    """transformers' own loss, which one process keeps, views them as one row."""
    batch = leetdist.shard_batch(batch_of(64), None)
    assert all(x.is_contiguous() for x in batch.values())


def test_the_callers_batch_is_left_alone() -> None:
    batch = batch_of(64, rows=1)
    before = {name: x.clone() for name, x in batch.items()}
    leetdist.shard_batch({**batch, "cu_seqlens": torch.tensor([0, 64])}, None)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_different_rows_on_the_ranks_of_a_sequence_are_an_error() -> None:
    def rank(group: Any) -> None:
        leetdist.shard_batch({"input_ids": torch.full((1, 64), group.rank)}, group)

    with pytest.raises(ValueError, match=r"rank 1 and rank 0 differ in input_ids.*ShardedLoader"):
        leetdist.virtual_ranks(rank, 2)


IDS = torch.zeros(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, r"input_ids of shape \(B, N\), got None"),
        ({"input_ids": torch.zeros(4)}, r"got shape \(4,\)"),
        ({"input_ids": IDS, "labels": torch.zeros(1, 3)}, r"labels must have .*\(1, 4\).*\(1, 3\)"),
        (
            {"input_ids": IDS, "cu_seqlens": torch.tensor([0, 5])},
            r"end at the number of tokens, 4, got 5",
        ),
        (
            {"input_ids": IDS, "cu_seqlens": torch.tensor([0, 3, 1, 4])},
            r"not decrease, got \[0, 3, 1, 4\]",
        ),
        ({"input_ids": IDS, "cu_seqlens": torch.tensor([0.0, 4.0])}, "must be int32 or int64"),
        ({"input_ids": IDS.expand(2, 4), "cu_seqlens": torch.tensor([0, 4])}, r"one row, so B must be 1, got 2"),
    ],
)
def test_bad_batches_are_errors(batch: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leetdist.shard_batch(batch, None)


def test_loss_is_the_mean_over_labels_not_over_ranks() -> None:
    """Uneven shards, most labels of one rank masked, one rank without any: value and gradients of one process."""
    tokens = 1000
    logits, labels = torch.randn(tokens, 10, dtype=torch.float64), torch.randint(10, (tokens,))
    labels[300:] = -100
    expected_logits = logits.clone().requires_grad_()
    expected = F.cross_entropy(expected_logits, labels)
    expected.backward()

    def rank(group: Any, gradients: Any) -> tuple[torch.Tensor, torch.Tensor]:
        mine = leetdist.shard_sequence(logits, 0, group).clone().requires_grad_()
        target = leetdist.shard_sequence(labels, 0, group)
        total = F.cross_entropy(mine, target, reduction="sum")
        loss = leetdist.reduce_loss(total, (target != -100).sum(), group, gradients=gradients)
        loss.backward()
        assert mine.grad is not None
        return loss.detach(), mine.grad

    for gradients, divided in (("mean", 3), ("sum", 1)):
        results = leetdist.virtual_ranks(lambda group, how=gradients: rank(group, how), 3)
        for loss, _ in results:
            torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(torch.cat([grad for _, grad in results]) / divided, expected_logits.grad)

    means = [F.cross_entropy(logits[part], labels[part]) for part in (slice(0, 312), slice(312, 640))]
    assert means[1].isnan(), "a mean of local means must be wrong here, or this test shows nothing"


def test_micro_batches_add_up() -> None:
    losses = torch.rand(3, 50)
    counts = (50, 10, 1)
    shares = [
        leetdist.reduce_loss(row[:count].sum(), count, None, total_tokens=sum(counts))
        for row, count in zip(losses, counts, strict=True)
    ]
    mean = torch.cat([row[:count] for row, count in zip(losses, counts, strict=True)]).mean()
    torch.testing.assert_close(sum(shares), mean)


def test_no_label_at_all_is_a_loss_of_zero() -> None:
    x = torch.ones((), requires_grad=True)
    loss = leetdist.reduce_loss(x * 0, 0, None)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert x.grad.item() == 0


def test_bad_losses_are_errors() -> None:
    with pytest.raises(ValueError, match="loss_sum must be a scalar"):
        leetdist.reduce_loss(torch.zeros(2), 2, None)
    with pytest.raises(ValueError, match="gradients must be"):
        leetdist.reduce_loss(torch.zeros(()), 2, None, gradients="median")  # type: ignore[arg-type]


def test_what_is_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="got str"):
        leetdist.shard_batch(batch_of(64), "sp")  # type: ignore[arg-type]


def test_a_mesh_without_a_sequence_dimension_is_refused() -> None:
    class Mesh:
        mesh_dim_names = ("dp", "tp")

        def __getitem__(self, name: str) -> Mesh:
            return self

    with pytest.raises(ValueError, match="one dimension named sp or cp"):
        leetdist.shard_batch(batch_of(64), Mesh())  # type: ignore[arg-type]


class Meshed:
    """What ShardedLoader asks of a (dp, sp) mesh, or of a dimension, with data ranks only."""

    mesh_dim_names = ("dp", "sp")

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def __getitem__(self, name: str) -> Meshed:
        return self if name == "dp" else Meshed(0, 1)

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return self.rank


def rows_of(loader: leetdist.ShardedLoader, steps: int | None = None) -> list[list[int]]:
    rows = []
    for batch in loader:
        rows.append(batch["input_ids"][:, 0].tolist())
        if len(rows) == steps:
            break
    return rows


def loader_of(kind: str, rank: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> leetdist.ShardedLoader:
    data = [{"input_ids": torch.full((16,), i)} for i in range(24)]
    source: Any = DataLoader(data, batch_size=4, shuffle=True)  # type: ignore[arg-type]
    if kind == "iterable":
        source = [{"input_ids": torch.arange(4 * i, 4 * i + 4)[:, None].expand(4, 16)} for i in range(6)]
    return leetdist.ShardedLoader(source, Meshed(rank, ranks), seed=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["shuffled", "iterable"])
def test_data_ranks_share_the_rows_of_each_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)  # no rank's generator matters, nor what was drawn from it before
    whole = rows_of(loader_of(kind, 0, 1, monkeypatch))
    torch.manual_seed(2)
    halves = [rows_of(loader_of(kind, rank, 2, monkeypatch)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert sorted(row for batch in whole for row in batch) == list(range(24))


@pytest.mark.parametrize("kind", ["shuffled", "iterable"])
def test_resumed_loader_goes_on_where_it_stood(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on another number of ranks, in a later epoch, and with an order of its own in each epoch."""
    straight = loader_of(kind, 0, 1, monkeypatch)
    epochs = [rows_of(straight), rows_of(straight)]
    assert (epochs[0] != epochs[1]) == (kind == "shuffled")

    stopped = loader_of(kind, 0, 1, monkeypatch)
    rows_of(stopped)
    assert rows_of(stopped, steps=4) == epochs[1][:4]
    assert stopped.progress == "epoch 1, step 4 of 6"
    resumed = [loader_of(kind, rank, 2, monkeypatch) for rank in (0, 1)]
    for loader in resumed:
        loader.load_state_dict(stopped.state_dict())
    halves = [rows_of(loader) for loader in resumed]
    assert [a + b for a, b in zip(*halves, strict=True)] == epochs[1][4:]


def test_rows_that_do_not_divide_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="multiple of the 3 data-parallel ranks, got 4"):
        rows_of(loader_of("shuffled", 0, 3, monkeypatch))


# --- documents, by the names that they come under


def joined(batch: dict[str, Any], ranks: int = 2) -> dict[str, torch.Tensor]:
    parts = leetdist.virtual_ranks(lambda group: leetdist.shard_batch(batch, group), ranks)
    cut = {name: torch.cat([part[name] for part in parts], 1) for name in ("input_ids", "position_ids", "labels")}
    assert all(torch.equal(part["cu_seqlens"], parts[0]["cu_seqlens"]) for part in parts)
    return cut | {"cu_seqlens": parts[0]["cu_seqlens"], "names": sorted(parts[0])}  # type: ignore[dict-item]


ENDS = torch.tensor([0, 20, 48])
PLACES = torch.cat([torch.arange(20), torch.arange(28)])[None]
TOLD: dict[str, dict[str, Any]] = {
    "cu_seqlens": {"cu_seqlens": ENDS},
    "positions": {"position_ids": PLACES},
    "positions and a mask": {"position_ids": PLACES, "attention_mask": torch.ones(1, 48)},
    "seq_idx": {"seq_idx": torch.tensor([0] * 20 + [1] * 28)[None]},
    "transformers' collator": {
        "position_ids": PLACES, "seq_idx": torch.tensor([0] * 20 + [1] * 28)[None],
        "cu_seq_lens_q": ENDS.int(), "cu_seq_lens_k": ENDS.int(), "max_length_q": 28, "max_length_k": 28,
    },
    "offsets with an empty document": {"cu_seq_lens_q": torch.tensor([0, 20, 20, 48])},
}  # fmt: skip


@pytest.mark.parametrize("told", TOLD)
def test_documents_by_any_name(told: str) -> None:
    ids = torch.arange(48)[None]
    out = joined({"input_ids": ids, "labels": ids.clone(), **TOLD[told]})
    assert out["labels"][0, [19, 47]].tolist() == [-100, -100]
    assert out["position_ids"].tolist() == PLACES.tolist()
    assert sorted(set(out["cu_seqlens"].tolist())) == ENDS.tolist()
    assert not {"seq_idx", "cu_seq_lens_q", "max_length_q"} & set(out["names"])


def test_left_padding_is_no_document() -> None:
    ids, mask = torch.arange(96).view(2, 48), torch.ones(2, 48, dtype=torch.long)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert "cu_seqlens" not in leetdist.shard_batch(
        {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, None
    )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"cu_seqlens": ENDS, "cu_seq_lens_q": torch.tensor([0, 21, 48])}, "tell of other documents"),
        ({"cu_seqlens": torch.tensor([0, 48]), "position_ids": PLACES}, "start anew elsewhere than cu_seqlens"),
        ({"position_ids": PLACES[0]}, r"position_ids must be \(B or 1, N\)"),
        ({"position_ids": PLACES.expand(3, 1, 48)}, r"position_ids must be \(B or 1, N\)"),
        ({"cu_seq_lens_q": [0, 48]}, "must be a tensor"),
    ],
)
def test_contradictions_about_documents_are_errors(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leetdist.shard_batch({"input_ids": torch.arange(48)[None], **told}, None)


def test_documents_in_several_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="packed documents lie in one row"):
        leetdist.shard_batch(
            {"input_ids": torch.zeros(2, 48, dtype=torch.long), "position_ids": PLACES.expand(2, 48)}, None
        )


# --- loaders of any kind


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return ({"input_ids": torch.full((16,), i)} for i in range(8))


def sharded(source: Any, rank: int, ranks: int, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    return leetdist.ShardedLoader(source, Meshed(rank, ranks), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_iterable_datasets(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = []
    for rank in (0, 1):
        loader = sharded(DataLoader(Stream(), batch_size=4, num_workers=workers), rank, 2, monkeypatch)
        assert rows_of(loader, steps=1) == [[0, 1] if rank == 0 else [2, 3]]
        halves.append(rows_of(loader))  # goes on
        assert loader.progress.startswith("epoch 1, step 0")
    assert halves == [[[4, 5]], [[6, 7]]]


def test_a_data_loaders_options_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Any = [{"input_ids": torch.full((16,), i)} for i in range(8)]
    options: dict[str, Any] = {
        "num_workers": 1, "prefetch_factor": 3, "persistent_workers": True, "multiprocessing_context": "forkserver",
        "timeout": 30, "in_order": True, "generator": torch.Generator(), "pin_memory": False,
        "worker_init_fn": print, "collate_fn": torch.utils.data.default_collate,
    }  # fmt: skip
    source = DataLoader(rows, batch_size=4, shuffle=True, **options)
    copied: Any = sharded(source, 0, 2, monkeypatch).source
    for name in options:
        assert getattr(copied, name) == getattr(source, name), name


def test_a_samplers_own_generator_and_epoch_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shuffled(torch.utils.data.Sampler):  # type: ignore[type-arg]
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            return iter(torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch)).tolist())

        def __len__(self) -> int:
            return 24

    rows: Any = [{"input_ids": torch.full((16,), i)} for i in range(24)]

    def loader(kind: str) -> Any:
        if kind == "set_epoch":
            return DataLoader(rows, batch_size=4, sampler=Shuffled())
        return DataLoader(rows, batch_size=4, sampler=torch.utils.data.RandomSampler(rows, generator=torch.Generator()))

    for kind in ("set_epoch", "generator"):
        straight = sharded(loader(kind), 0, 1, monkeypatch)
        epochs = [rows_of(straight), rows_of(straight)]
        assert epochs[0] != epochs[1]
        resumed = sharded(loader(kind), 0, 1, monkeypatch)
        resumed.load_state_dict({"epoch": 1, "step": 2, "seed": 0})
        assert rows_of(resumed) == epochs[1][2:], kind


def test_rows_that_are_dealt_already_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Any = [{"input_ids": torch.full((16,), i)} for i in range(8)]
    dealt = torch.utils.data.DistributedSampler(rows, 2, 1)
    by_batch = torch.utils.data.BatchSampler(dealt, 4, False)
    sources: list[Any] = [DataLoader(rows, batch_size=4, sampler=dealt), DataLoader(rows, batch_sampler=by_batch)]
    with contextlib.suppress(ImportError):
        from accelerate.data_loader import prepare_data_loader

        sources.append(prepare_data_loader(DataLoader(rows, batch_size=4), num_processes=2, process_index=1))
        sources.append(prepare_data_loader(DataLoader(Stream(), batch_size=4), num_processes=2, process_index=1))
    for source in sources:
        with pytest.raises(ValueError, match="deals rows to ranks already"):
            sharded(source, 0, 2, monkeypatch)
    sharded(DataLoader(rows, batch_size=4, sampler=torch.utils.data.DistributedSampler(rows, 1, 0)), 0, 2, monkeypatch)
    with pytest.raises(ValueError, match="started again"):
        sharded(iter(rows), 0, 2, monkeypatch)
