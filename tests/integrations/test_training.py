"""Every way of training, sharded, against one process on whole sequences: gradients, losses, and three steps.

Jobs of 2 and of 4 processes go through all settings, with a model of our own, one of `leetdist.nn.Mamba2` layers and a
hybrid of transformers; a test a setting looks at what they found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from families import enlarged, tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import leetdist
from helpers import Outcome, run_ranks
from leetdist.launch.model import Config, LanguageModel

CONFIG = Config(vocab=48, dim=32, layers=2, heads=2, hidden=40, learnable_decay=True)
ROWS, TOKENS, STEPS = 4, 150, 3
MESHES = {"sp 2": (2, 2), "dp 2 x sp 2": (4, 2)}  # ranks, ranks a sequence


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(32), leetdist.nn.Mamba2(32, head_dim=8, state=16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class MambaModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(CONFIG.vocab, 32), nn.Linear(32, CONFIG.vocab)
        self.blocks = nn.ModuleList([Block(), Block()])
        enlarged(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        logits: Tensor = self.head(x)
        return logits


class Hybrid(nn.Module):
    """transformers' Bamba: Mamba-2 and softmax layers, these with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("Bamba")
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def blocks(self) -> Any:
        return self.model.model.layers

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits


# Over two ranks, and a step each.
KINDS: dict[str, Callable[[], nn.Module]] = {"Mamba-2": MambaModel, "Bamba": Hybrid}


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


def model_of(kind: str, *, checkpointing: bool) -> Any:
    torch.manual_seed(0)
    if kind in KINDS:
        return KINDS[kind]().train(checkpointing)
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


Build: TypeAlias = Callable[..., Any]  # a model, with its activations recomputed or not
Setting: TypeAlias = Callable[[Build, Any], Engine]


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=dict)


def loader_of(mesh: Any) -> leetdist.ShardedLoader:
    return leetdist.ShardedLoader(DataLoader(data(), batch_size=ROWS), mesh)  # type: ignore[arg-type]


def forward_backward(engine: Engine, batch: dict[str, Tensor], mesh: Any) -> float:
    """Gradients of the mean loss over all ranks, and that loss."""
    positions = (batch["position_ids"],) if isinstance(inner(engine), Hybrid) else ()
    counted = (batch["labels"] != -100).sum()
    total = leetdist.reduce_loss(counted.double(), 1, mesh, total_tokens=1).long()
    mean = 0.0
    parts = (batch[name].chunk(engine.micro_batches) for name in ("input_ids", "labels"))
    for ids, labels in zip(*parts, strict=True):
        logits = engine.model(ids, *positions)
        loss_sum = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = leetdist.reduce_loss(loss_sum, (labels != -100).sum(), mesh, total_tokens=total)
        mean += loss.item()
        engine.backward(loss * engine.scale)
    return mean


def inner(engine: Engine) -> Any:
    return engine.model.module if hasattr(engine.model, "module") else engine.model


def train(engine: Engine, mesh: Any, steps: int = STEPS) -> Run:
    """Some steps; gradients are those of the first."""
    run = Run()
    mesh = engine.mesh or mesh
    module = inner(engine)
    for batch in islice(loader_of(mesh), steps):
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


def ddp(build: Build, mesh: Any) -> Engine:
    model = leetdist.parallelize(build(checkpointing=True), mesh)
    model = nn.parallel.DistributedDataParallel(model)
    return plain(model, optimizer_of(model))


def ddp_on_accelerates_mesh(build: Build, mesh: Any) -> Engine:
    """A mesh that accelerate's ParallelismConfig made; its dimensions have other names."""
    from accelerate.parallelism_config import ParallelismConfig

    data, sequence = mesh["dp"].size(), mesh["sp"].size()
    theirs = ParallelismConfig(dp_shard_size=data, cp_size=sequence).build_device_mesh("cpu")
    assert theirs.mesh_dim_names == (("dp_shard", "cp") if data > 1 else ("cp",))
    engine = ddp(build, theirs)
    engine.mesh = theirs
    return engine


def restarting(build: Build, mesh: Any) -> Engine:
    """Wrong on purpose: the layers do not hear of the other ranks."""
    model = nn.parallel.DistributedDataParallel(build(checkpointing=True))
    return plain(model, optimizer_of(model))


def fsdp2(build: Build, mesh: Any) -> Engine:
    from torch.distributed.fsdp import fully_shard

    model = leetdist.parallelize(build(checkpointing=True), mesh)
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


def zero(stage: int) -> Setting:
    def setting(build: Build, mesh: Any) -> Engine:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

        # Or it compiles a kernel for ranks that share memory, for two minutes, which nothing here is about.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        model = leetdist.parallelize(build(checkpointing=True), mesh)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # its default clips at 1
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=config)
        return Engine(engine, engine.backward, engine.step, safe_get_full_grad, safe_get_full_fp32_param)

    return setting


def accelerated(*, fsdp: bool) -> Setting:
    """accelerate, with two micro-batches a step; it divides each loss by their number."""

    def setting(build: Build, mesh: Any) -> Engine:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType

        AcceleratorState._reset_state(reset_partial_state=True)
        if fsdp:  # on the CPU, accelerate takes DDP instead and says nothing: let it think that this is a GPU
            PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
            PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
        model = leetdist.parallelize(build(checkpointing=True), mesh)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(model.blocks[0]).__name__],
        )
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin if fsdp else None)
        assert accelerator.num_processes == mesh.size()
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        assert all(hasattr(p, "full_tensor") == fsdp for p in model.parameters())

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad()

        def whole(x: Any) -> Tensor:
            return x.full_tensor() if hasattr(x, "full_tensor") else x

        return Engine(model, accelerator.backward, step, lambda p: whole(p.grad), whole, micro_batches=2, scale=2.0)

    return setting


SETTINGS: dict[str, Setting] = {
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
    found: dict[str, Any] = {}
    steps = {"own": STEPS, **dict.fromkeys(KINDS if mesh.size() == sequence else (), 1)}
    expected = {}
    for kind, count in steps.items():
        reference = model_of(kind, checkpointing=False)
        expected[kind] = train(plain(reference, optimizer_of(reference)), None, count)
    # All models by each setting, and not the other way round: accelerate's FSDP2 stays in the process' environment.
    for name, setting in {**SETTINGS, "restarting": restarting}.items():
        for kind, count in steps.items():
            run = train(setting(partial(model_of, kind), mesh), mesh, count)
            found[f"{kind}, {name}"] = {
                "losses": relative(torch.tensor(run.losses), torch.tensor(expected[kind].losses)),
                "gradients": worst(run.grads, expected[kind].grads),
                "parameters": worst(run.params, expected[kind].params),
            }
    return found


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).abs().max() / expected.abs().max())


def worst(out: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert out.keys() == expected.keys(), sorted(out.keys() ^ expected.keys())
    return max(relative(out[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    pytest.importorskip("deepspeed")
    pytest.importorskip("accelerate")
    return {
        name: run_ranks(everything, ranks, sequence, frameworks=True, timeout_s=120)
        for name, (ranks, sequence) in MESHES.items()
    }


CASES = [("own", mesh) for mesh in MESHES] + [(kind, "sp 2") for kind in KINDS]


@pytest.mark.parametrize(("kind", "mesh"), CASES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_one_process(setting: str, kind: str, mesh: str, outcomes: dict[str, list[Outcome]]) -> None:
    for rank, outcome in enumerate(outcomes[mesh]):
        assert outcome.error is None, f"rank {rank}: {outcome.error}"
        assert outcome.ended, f"rank {rank} was killed"
        for what, error in outcome.value[f"{kind}, {setting}"].items():
            assert error < 2e-5, f"rank {rank}: {what} are off by {error:.1e}"


@pytest.mark.parametrize(("kind", "mesh"), CASES)
def test_a_restarting_state_shows_in_gradients_and_not_in_the_loss(
    kind: str, mesh: str, outcomes: dict[str, list[Outcome]]
) -> None:
    for outcome in outcomes[mesh]:
        assert outcome.value[f"{kind}, restarting"]["gradients"] > 0.1
        assert outcome.value[f"{kind}, restarting"]["losses"] < (0.02 if kind == "own" else 1)
