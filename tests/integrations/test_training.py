"""Every way of training, sharded, against one process on whole sequences: gradients, losses, and three steps.

Two jobs, of 2 and of 4 processes, go through all settings; a test a setting looks at what they found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import leetdist
from helpers import Outcome, run_ranks
from leetdist.launch.model import Config, LanguageModel

CONFIG = Config(vocab=48, dim=32, layers=2, heads=2, hidden=40, learnable_decay=True)
ROWS, TOKENS, STEPS = 4, 150, 3
MESHES = {"sp 2": (2, 2), "dp 2 x sp 2": (4, 2)}  # ranks, ranks a sequence


def data() -> list[dict[str, Tensor]]:
    """Rows whose labels are masked unevenly: over half of one shard, little of another, all of a document."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(ROWS * STEPS):
        ids = torch.randint(CONFIG.vocab, (TOKENS,), generator=generator)
        labels = ids.clone()
        labels[: 11 * (number % 7)] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def model_of(*, checkpointing: bool) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(CONFIG, checkpointing=checkpointing)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


@dataclass
class Engine:
    """What differs between the frameworks; the training loop below is the same for all."""

    model: Any
    backward: Callable[[Tensor], Any]
    step: Callable[[], Any]
    grad: Callable[[Any], Tensor]
    value: Callable[[Any], Tensor]
    optimizer: Any = None
    mesh: Any = None  # where it has one of its own
    micro_batches: int = 1
    scale: float = 1.0


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=dict)


def loader_of(mesh: Any) -> leetdist.ShardedLoader:
    return leetdist.ShardedLoader(DataLoader(data(), batch_size=ROWS), mesh)  # type: ignore[arg-type]


def forward_backward(engine: Engine, batch: dict[str, Tensor], mesh: Any) -> float:
    """Gradients of the mean loss over all ranks, and that loss."""
    counted = (batch["labels"] != -100).sum()
    total = leetdist.reduce_loss(counted.double(), 1, mesh, total_tokens=1).long()
    mean = 0.0
    parts = (batch[name].chunk(engine.micro_batches) for name in ("input_ids", "labels"))
    for ids, labels in zip(*parts, strict=True):
        logits = engine.model(ids)
        loss_sum = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = leetdist.reduce_loss(loss_sum, (labels != -100).sum(), mesh, total_tokens=total)
        mean += loss.item()
        engine.backward(loss * engine.scale)
    return mean


def train(engine: Engine, mesh: Any) -> Run:
    """Three steps; gradients are those of the first."""
    run = Run()
    mesh = engine.mesh or mesh
    module = engine.model.module if hasattr(engine.model, "module") else engine.model
    for batch in loader_of(mesh):
        run.losses.append(forward_backward(engine, batch, mesh))
        if len(run.losses) == 1:
            run.grads = {name: engine.grad(p).clone() for name, p in module.named_parameters()}
        engine.step()
    run.params = {name: engine.value(p).detach().clone() for name, p in module.named_parameters()}
    return run


def plain(model: Any, optimizer: torch.optim.Optimizer, **changes: Any) -> Engine:
    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    whole = {"grad": lambda p: p.grad, "value": lambda p: p.data, "optimizer": optimizer}
    return Engine(model, lambda loss: loss.backward(), step, **{**whole, **changes})


def ddp(mesh: Any) -> Engine:
    model = leetdist.parallelize(model_of(checkpointing=True), mesh)
    model = nn.parallel.DistributedDataParallel(model)
    return plain(model, optimizer_of(model))


def ddp_on_accelerates_mesh(mesh: Any) -> Engine:
    """A mesh that accelerate's ParallelismConfig made; its dimensions have other names."""
    from accelerate.parallelism_config import ParallelismConfig

    data, sequence = mesh["dp"].size(), mesh["sp"].size()
    theirs = ParallelismConfig(dp_shard_size=data, cp_size=sequence).build_device_mesh("cpu")
    assert theirs.mesh_dim_names == (("dp_shard", "cp") if data > 1 else ("cp",))
    engine = ddp(theirs)
    engine.mesh = theirs
    return engine


def restarting(mesh: Any) -> Engine:
    """Wrong on purpose: the layers do not hear of the other ranks."""
    model = nn.parallel.DistributedDataParallel(model_of(checkpointing=True))
    return plain(model, optimizer_of(model))


def fsdp2(mesh: Any) -> Engine:
    from torch.distributed.fsdp import fully_shard

    model = leetdist.parallelize(model_of(checkpointing=True), mesh)
    # Parameters are sharded, and gradients averaged, over every rank: those of a sequence too.
    ranks = mesh["dp", "sp"]._flatten("dp_sp")
    for block in model.blocks:
        fully_shard(block, mesh=ranks)
    fully_shard(model, mesh=ranks)
    return plain(
        model,
        optimizer_of(model),
        grad=lambda p: p.grad.full_tensor(),
        value=lambda p: p.full_tensor(),
    )


def zero(stage: int) -> Callable[[Any], Engine]:
    def build(mesh: Any) -> Engine:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        # Or it compiles a kernel for ranks that share memory, for two minutes, which nothing here is about.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        model = leetdist.parallelize(model_of(checkpointing=True), mesh)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # its default clips at 1
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
        return Engine(engine, engine.backward, engine.step, safe_get_full_grad, safe_get_full_fp32_param)

    return build


def accelerated(*, fsdp: bool) -> Callable[[Any], Engine]:
    """accelerate, with two micro-batches a step; it divides each loss by their number."""

    def build(mesh: Any) -> Engine:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType

        AcceleratorState._reset_state(reset_partial_state=True)
        if fsdp:  # on the CPU, accelerate takes DDP instead and says nothing: let it think that this is a GPU
            PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
            PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
        )
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin if fsdp else None)
        assert accelerator.num_processes == mesh.size()
        model = leetdist.parallelize(model_of(checkpointing=True), mesh)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        assert all(hasattr(p, "full_tensor") == fsdp for p in model.parameters())

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad()

        def whole(x: Any) -> Tensor:
            return x.full_tensor() if hasattr(x, "full_tensor") else x

        return Engine(model, accelerator.backward, step, lambda p: whole(p.grad), whole, micro_batches=2, scale=2.0)

    return build


SETTINGS: dict[str, Callable[[Any], Engine]] = {
    "DDP": ddp,
    "FSDP2": fsdp2,
    "ZeRO-1": zero(1),
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3),
    "accelerate": accelerated(fsdp=False),
    "accelerate FSDP2": accelerated(fsdp=True),
    "accelerate's mesh": ddp_on_accelerates_mesh,
}


def everything(rank: int, sequence: int) -> dict[str, Any]:
    """On one rank: for each setting its largest relative errors against one process, or what it raised."""
    torch.set_num_threads(1)
    mesh = leetdist.device_mesh(sequence=sequence)
    reference = model_of(checkpointing=False)
    expected = train(plain(reference, optimizer_of(reference)), None)
    found: dict[str, Any] = {"falls": expected.losses}
    for name, build in {**SETTINGS, "restarting": restarting}.items():
        run = train(build(mesh), mesh)
        found[name] = {
            "losses": relative(torch.tensor(run.losses), torch.tensor(expected.losses)),
            "gradients": worst(run.grads, expected.grads),
            "parameters": worst(run.params, expected.params),
        }
    return found


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).abs().max() / expected.abs().max())


def worst(out: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert out.keys() == expected.keys()
    return max(relative(out[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    pytest.importorskip("deepspeed")
    pytest.importorskip("accelerate")
    return {
        name: run_ranks(everything, ranks, sequence, frameworks=True, timeout_s=120)
        for name, (ranks, sequence) in MESHES.items()
    }


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_one_process(setting: str, mesh: str, outcomes: dict[str, list[Outcome]]) -> None:
    for rank, outcome in enumerate(outcomes[mesh]):
        assert outcome.error is None, f"rank {rank}: {outcome.error}"
        assert outcome.ended, f"rank {rank} was killed"
        for what, error in outcome.value[setting].items():
            assert error < 2e-5, f"rank {rank}: {what} are off by {error:.1e}"


@pytest.mark.parametrize("mesh", MESHES)
def test_a_restarting_state_shows_in_gradients_and_not_in_the_loss(
    mesh: str, outcomes: dict[str, list[Outcome]]
) -> None:
    for outcome in outcomes[mesh]:
        assert outcome.value["restarting"]["gradients"] > 0.1
        assert outcome.value["restarting"]["losses"] < 0.02
