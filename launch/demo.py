"""Train a small byte-level language model over one long text that is sharded over the ranks, and let it go on.

    bash launch/demo.sh                     makes an environment, installs leetdist, and runs this on 4 ranks
    torchrun --nproc-per-node 4 -m leetdist.launch demo

Shows the loss, the speed, the memory a rank, and whether the sharded attention of the trained model equals one device
bit for bit: its outputs, final state and every gradient.
"""

from __future__ import annotations

import argparse
import resource
import sysconfig
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import leetdist
from leetdist.launch.model import Config, LanguageModel
from leetdist.launch.runtime import Arguments, Rank, joined, one_message
from leetdist.launch.text import load_tokens
from leetdist.sequence.group import alone

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Report:
    """What the closing table says."""

    losses: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    continuation: str = ""
    unequal: list[str] = field(default_factory=list)
    compared: tuple[str, ...] = ()
    memory_gib: list[float] = field(default_factory=list)


def main(argv: list[str]) -> int:
    parser = Arguments("demo", __doc__)
    parser.add_argument("--tokens", type=int, default=131_072, help="bytes of text, over all ranks (131072)")
    parser.add_argument("--text", default=sysconfig.get_path("stdlib"), help="file or folder (Python's own library)")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps, all on the one text (8)")
    parser.add_argument("--new", type=int, default=64, help="bytes to generate (64)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the model's products (fp32)")
    parser.add_argument("--model", default="mini", help="mini (0.3M parameters), tiny, 10m or 100m (mini)")
    options = parser.parse_args(argv)
    with joined(options.device) as rank:
        report = run(options, rank)
        if rank.first:
            show(options, rank, report)
        return int(bool(report.unequal))


def run(options: argparse.Namespace, rank: Rank) -> Report:
    with one_message():
        text, vocabulary = load_tokens(options.text, limit=options.tokens + 1)
        if len(text) <= options.tokens:
            raise SystemExit(f"--tokens {options.tokens}: {options.text} has {len(text)} bytes, one more is wanted")
    text = text.long().to(rank.device)[None]
    rank.print(
        f"{options.tokens:,} bytes of {options.text} over {rank.size} ranks ({rank.device.type}, {rank.backend})"
    )
    torch.manual_seed(0)
    model = LanguageModel(Config.preset(options.model, vocabulary)).to(rank.device)
    report = Report()
    world = dist.group.WORLD
    assert world is not None
    with leetdist.sequence_parallel(world):
        inputs, labels = (leetdist.shard_sequence(x, 1, None) for x in (text[:, :-1], text[:, 1:]))
        train(model, inputs, labels, options, rank, report)
        rank.print("is the sharded attention equal to one device? ...")
        compare(model, inputs, options, rank, report)
        generate(model, text, options, rank, report)
    report.memory_gib = rank.gather(memory_gib(rank.device), "its memory")
    return report


def train(
    model: LanguageModel, inputs: Tensor, labels: Tensor, options: argparse.Namespace, rank: Rank, report: Report
) -> None:
    """Each rank computes the loss of its shard; the sum of the ranks' gradients is the gradient of the whole."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for step in range(options.steps):
        begin = time.perf_counter()
        with torch.autocast(rank.device.type, torch.bfloat16, enabled=options.dtype == "bf16"):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / options.tokens
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        report.losses.append(float(mean))
        seconds = time.perf_counter() - begin
        report.tokens_per_s.append(options.tokens / seconds)
        rank.print(
            f"step {step + 1}/{options.steps}: loss {report.losses[-1]:.4f} nats a byte, "
            f"{report.tokens_per_s[-1]:,.0f} tokens/s, {seconds:.1f} s"
        )


def compare(model: LanguageModel, inputs: Tensor, options: argparse.Namespace, rank: Rank, report: Report) -> None:
    """The operator of the first layer, on its own inputs: sharded, and gathered on the first rank's device alone."""
    block: Any = model.blocks[0]
    layer = block.attention
    with torch.no_grad():
        x = block.attention_norm(model.embedding(inputs))
        qkv = F.silu(layer.qkv_proj(x)).unflatten(-1, (layer.heads, 3 * layer.head_dim)).to(DTYPES[options.dtype])
        qkv = qkv.transpose(1, 2)
        q, k, v = (y.contiguous() for y in qkv.chunk(3, -1))
    do = torch.randn(q.shape, generator=torch.Generator().manual_seed(rank.rank)).to(q)
    sharded = operator(q, k, v, layer.log_decay(q.device), do, sharded=True)
    whole = [leetdist.gather_sequence(y, 2, None) for y in (q, k, v, do)]
    gathered = {
        name: leetdist.gather_sequence(y, 2, None) if name in ("o", "dq", "dk", "dv") else y
        for name, y in sharded.items()
    }
    dist.all_reduce(gathered["dlog_decay"])  # the ranks' shares add up to the gradient
    if rank.first:
        q, k, v, do = whole
        single = operator(q, k, v, layer.log_decay(q.device), do, sharded=False)
        report.unequal = [name for name, y in single.items() if not torch.equal(y, gathered[name])]
        report.compared = tuple(single)
    report.unequal = rank.gather(report.unequal, "what differs")[0]


def operator(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, do: Tensor, *, sharded: bool) -> dict[str, Tensor]:
    """Output, final state and all gradients, by name."""
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    leaves: dict[str, Any] = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    if sharded:
        o, state = leetdist.linear_attention(**leaves, return_state=True)
    else:
        with alone():
            o, state = leetdist.linear_attention(**leaves, return_state=True)
    o.backward(do)
    return {"o": o.detach(), "state": state.detach(), **{f"d{name}": x.grad for name, x in leaves.items()}}


def generate(model: LanguageModel, text: Tensor, options: argparse.Namespace, rank: Rank, report: Report) -> None:
    """The ranks share the prompt, the whole text; the first rank goes on alone, a byte at a time."""
    session = leetdist.Session(model, None)
    with torch.no_grad():
        logits = session.prefill(text[:, :-1])
        if not rank.first:
            return
        drawn = []
        generator = torch.Generator(rank.device).manual_seed(0)
        for _ in range(options.new):
            token = torch.multinomial((logits.float() / 0.7).softmax(-1), 1, generator=generator)
            drawn.append(int(token))
            logits = session.step(token)
    report.continuation = bytes(drawn).decode(errors="replace")


def memory_gib(device: torch.device) -> float:
    """This rank's peak: of the GPU's memory that torch allocated, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def show(options: argparse.Namespace, rank: Rank, report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    verdict = "yes, bit for bit" if not report.unequal else f"NO: {', '.join(report.unequal)}"
    table = Table(title="leetdist: one text over several ranks", show_header=False, title_justify="left")
    first_layer = "the first layer's" if options.steps else "an untrained layer's"
    rows = {
        "ranks": f"{rank.size} x {rank.device.type} ({rank.backend})",
        "tokens": f"{options.tokens:,} bytes, {options.tokens // rank.size:,} a rank",
        "loss, nats a byte": ", ".join(f"{loss:.3f}" for loss in report.losses) or "-",
        "tokens/s, median step": f"{median(report.tokens_per_s):,.0f}" if report.losses else "-",
        "peak memory a rank, GiB": ", ".join(f"{gib:.2f}" for gib in report.memory_gib),
        f"{first_layer} attention = one device": f"{verdict} ({', '.join(report.compared)})",
        "goes on with": repr(report.continuation),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=110).print(table)
