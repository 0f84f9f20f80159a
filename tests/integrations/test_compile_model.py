"""torch.compile of whole models: one graph without a break, the same loss and gradients, also over ranks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import leetdist
from helpers import run_ranks, values
from leetdist.launch.model import Config, LanguageModel

CONFIG = Config(vocab=48, dim=32, layers=2, heads=2, hidden=40, learnable_decay=True)
TOKENS = 256


def gradients(mesh: Any, *, compiled: bool, checkpointing: bool = False) -> list[Tensor]:
    """The loss and each parameter's gradient on this rank."""
    torch.manual_seed(0)
    model = leetdist.parallelize(LanguageModel(CONFIG, checkpointing=checkpointing), mesh)
    ids = torch.randint(CONFIG.vocab, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = leetdist.shard_batch({"input_ids": ids, "labels": ids}, mesh)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    logits = run(batch["input_ids"])
    total = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    loss = leetdist.reduce_loss(total, (batch["labels"] != -100).sum(), mesh)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_device(checkpointing: bool) -> None:
    same(gradients(None, compiled=True, checkpointing=checkpointing), gradients(None, compiled=False))


def test_a_compiled_layer_has_its_decays_where_it_is() -> None:
    """A copy to a GPU in the graph would wait for its stream in every call. "meta" is another device than the CPU."""
    layer = leetdist.nn.LightningAttention(32, 4).to("meta")
    found: list[Tensor] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.extend(inputs)
        return graph

    torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(1, 40, 32, device="meta"))
    assert (4,) in [x.shape for x in found]
    assert all(x.is_meta for x in found)


def losses(rank: int) -> None:
    for mesh in (dist.group.WORLD, leetdist.device_mesh()):

        def call(x: Tensor, mesh: Any = mesh) -> Tensor:
            return leetdist.reduce_loss(x.square().sum(), 3, mesh) * 2.0

        found = []
        for function in (call, torch.compile(call, backend="aot_eager")):
            x = torch.full((4,), 1.0 + rank, requires_grad=True)
            loss = function(x)
            found.append((loss, *torch.autograd.grad(loss, x)))
        assert all(map(torch.equal, *found))


def test_a_loss_over_ranks_in_what_is_compiled() -> None:
    values(run_ranks(losses, 2))


def over_ranks(rank: int) -> None:
    mesh = leetdist.device_mesh(sequence=2)
    same(gradients(mesh, compiled=True, checkpointing=True), gradients(mesh, compiled=False))


def test_over_ranks() -> None:
    values(run_ranks(over_ranks, 2, frameworks=True, timeout_s=120))


def minimax(mesh: Any, *, compiled: bool) -> list[Tensor]:
    """The same of a MiniMax, and its own loss, inside what is compiled."""
    from test_transformers import batch_of, tiny

    model = leetdist.parallelize(tiny(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]), mesh)
    run = torch.compile(model, fullgraph=mesh is None, backend="aot_eager") if compiled else model
    loss = run(**leetdist.shard_batch(batch_of(), mesh), use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def minimax_over_ranks(rank: int, ranks: int) -> None:
    from torch._dynamo.utils import counters

    mesh = leetdist.device_mesh(sequence=ranks) if ranks > 1 else None
    same(minimax(mesh, compiled=True), minimax(mesh, compiled=False))
    # Where ranks talk by more than tensors, and nowhere else.
    found = {re.findall(r"<(?:function|bound method) (\S+)", why)[0] for why in counters["graph_break"]}
    talking = {"Calls._before", "_mask_of_its_own", "softmax_attention", "ModelLoss.__call__"}
    assert found == (talking if ranks > 1 else set()), found


@pytest.mark.parametrize("ranks", [1, 2])
def test_minimax(ranks: int) -> None:
    pytest.importorskip("transformers")
    values(run_ranks(minimax_over_ranks, ranks, ranks, frameworks=True, timeout_s=120))
