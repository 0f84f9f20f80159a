"""`leetdist demo`: train a small byte-level language model over one text that is sharded over the ranks, and let it go
on.

Shows the loss, the speed, the memory a rank, and whether the sharded attention of the trained model equals one device
bit for bit: its outputs, final state and every gradient.
"""

from __future__ import annotations

import argparse
import re
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import leetdist
from leetdist.integrations import checkpoint
from leetdist.launch import commands
from leetdist.launch.model import Config, LanguageModel
from leetdist.launch.progress import Bar, memory_gib
from leetdist.launch.ranks import is_launched, start, usual_ranks
from leetdist.launch.runtime import Rank, joined, one_message
from leetdist.launch.text import load_tokens
from leetdist.nn import Mamba2
from leetdist.sequence.group import alone

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass
class Report:
    """What the closing table says."""

    lengths: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    continuation: str = ""
    unequal: list[str] = field(default_factory=list)
    compared: tuple[str, ...] = ()
    memory_gib: list[float] = field(default_factory=list)
    saved: Path | None = None
    word: str = ""
    """One of the text's."""


def main(argv: list[str]) -> int:
    options = commands.demo().parse_args(argv)
    if not is_launched():
        return start(options.processes or usual_ranks(options.device), ["demo", *argv])
    with joined(options.device) as rank:
        report = run(options, rank)
        if rank.first:
            show(options, rank, report)
        return int(bool(report.unequal))


def run(options: argparse.Namespace, rank: Rank) -> Report:
    """Trains, compares, generates and keeps the model: what there is to tell."""
    with one_message():
        import safetensors.torch  # noqa: F401  the end needs it: a demo of minutes should not be in vain

        text, vocabulary = load_tokens(options.text, limit=options.tokens + 1)
        if len(text) <= options.tokens:
            raise SystemExit(f"--tokens {options.tokens}: {options.text} has {len(text)} bytes, one more is wanted")
        options.out.mkdir(parents=True, exist_ok=True)
    word = re.search(rb"[A-Za-z]{3,}", bytes(text.tolist()))
    report = Report(word="import" if word is None else word[0].decode())
    text = text.long().to(rank.device)[None]
    rank.print(f"{options.tokens:,} bytes of {options.text}, {rank.size} ranks ({rank.device.type}, {rank.backend})")
    torch.manual_seed(0)
    model = LanguageModel(Config.preset(options.model, vocabulary, options.operator)).to(rank.device)
    world = dist.group.WORLD
    assert world is not None
    with leetdist.sequence_parallel(world):
        inputs, labels = (leetdist.shard_sequence(x, 1, None) for x in (text[:, :-1], text[:, 1:]))
        report.lengths = rank.gather(inputs.shape[1], "its shard's length")
        rank.print(f"tokens on each rank: {', '.join(f'{count:,}' for count in report.lengths)}")
        train(model, inputs, labels, options, rank, report)
        rank.print("is the sharded attention equal to one device? ...")
        compare(model, inputs, options, rank, report)
        generate(model, text, options, rank, report)
    with one_message():
        report.saved = checkpoint.write_atomically(
            options.out, options.steps, lambda folder: save(model, folder, rank), keep=1
        )
    report.memory_gib = rank.gather(memory_gib(rank.device), "its memory")
    return report


def save(model: LanguageModel, folder: Path, rank: Rank) -> None:
    """What `leetdist generate` reads."""
    from safetensors.torch import save_file

    if rank.first:
        save_file(model.state_dict(), folder / "model.safetensors")


def train(
    model: LanguageModel, inputs: Tensor, labels: Tensor, options: argparse.Namespace, rank: Rank, report: Report
) -> None:
    """Each rank computes the loss of its shard; the sum of the ranks' gradients is the gradient of the whole."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    with Bar(options.steps, wanted=rank.first) as bar:
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
            line = f"loss {report.losses[-1]:.4f} nats a byte, {report.tokens_per_s[-1]:,.0f} tokens/s"
            bar.update(step + 1, line)
            if not bar.shown and (step + 1) % max(1, options.steps // 10) == 0:
                rank.print(f"step {step + 1}/{options.steps}: {line}")


@dataclass
class Operator:
    """The operator of a layer, on the layer's own inputs: `tokens` have a place along `dim`, `others` none, and only
    for those in `exact` is the sum over the ranks of their gradients a matter of bits."""

    call: Callable[..., Any]
    dim: int
    tokens: dict[str, Tensor]
    others: dict[str, Tensor]
    exact: tuple[str, ...] = ()


def operator_of(model: LanguageModel, inputs: Tensor, dtype: torch.dtype) -> Operator:
    """The first layer's."""
    block: Any = model.blocks[0]
    layer = block.attention
    x = block.attention_norm(model.embedding(inputs))
    if isinstance(layer, Mamba2):
        given = layer.scan_inputs(x)[1]
        others = {name: given.pop(name) for name in ("A", "D", "dt_bias")}
        call = partial(leetdist.mamba_chunk_scan_combined, dt_softplus=True, return_final_states=True)
        return Operator(call, 1, {name: y.to(dtype) for name, y in given.items()}, others)
    qkv = F.silu(layer.qkv_proj(x)).unflatten(-1, (layer.heads, 3 * layer.head_dim)).to(dtype).transpose(1, 2)
    tokens = {name: y.contiguous() for name, y in zip("qkv", qkv.chunk(3, -1), strict=True)}
    others = {"log_decay": layer.log_decay(qkv.device)}
    return Operator(partial(leetdist.linear_attention, return_state=True), 2, tokens, others, ("log_decay",))


def compare(model: LanguageModel, inputs: Tensor, options: argparse.Namespace, rank: Rank, report: Report) -> None:
    """The operator of the first layer, on its own inputs: sharded, and gathered on the first rank's device alone."""
    with torch.no_grad():
        operator = operator_of(model, inputs, DTYPES[options.dtype])
    like = operator.tokens["v" if "v" in operator.tokens else "x"]  # as wide as the outputs
    do = torch.randn(like.shape, generator=torch.Generator().manual_seed(rank.rank)).to(like)
    sharded = compute(operator, operator.tokens, do)
    *whole, whole_do = (leetdist.gather_sequence(y, operator.dim, None) for y in (*operator.tokens.values(), do))
    for name in ("o", *(f"d{name}" for name in operator.tokens)):
        sharded[name] = leetdist.gather_sequence(sharded[name], operator.dim, None)
    for name in operator.exact:
        dist.all_reduce(sharded[f"d{name}"])  # the ranks' shares add up to the gradient
    if rank.first:
        with alone():
            single = compute(operator, dict(zip(operator.tokens, whole, strict=True)), whole_do)
        report.unequal = [name for name, y in single.items() if not torch.equal(y, sharded[name])]
        report.compared = tuple(single)
    report.unequal = rank.gather(report.unequal, "what differs")[0]


def compute(operator: Operator, tokens: dict[str, Tensor], do: Tensor) -> dict[str, Tensor]:
    """Output, final state and gradients, by name."""
    leaves: dict[str, Any] = {
        name: x.detach().clone().requires_grad_() for name, x in (tokens | operator.others).items()
    }
    o, state = operator.call(**leaves)
    o.backward(do)
    grads = {f"d{name}": leaves[name].grad for name in (*tokens, *operator.exact)}
    return {"o": o.detach(), "state": state.detach(), **grads}


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


def drawn(values: list[float], width: int = 40) -> str:
    """The values over time as a row of blocks, from 0 to the largest."""
    most = max(values)
    picked = [values[i * len(values) // width] for i in range(width)] if len(values) > width else values
    return "".join(BLOCKS[round(value / most * (len(BLOCKS) - 1))] for value in picked)


def show(options: argparse.Namespace, rank: Rank, report: Report) -> None:
    losses, holding = report.losses, sum(length > 0 for length in report.lengths)
    verdict = "yes, bit for bit" if not report.unequal else f"NO: {', '.join(report.unequal)}"
    verdict += f" ({', '.join(report.compared)}; {holding} of {rank.size} ranks hold tokens)"
    rows = {
        "ranks": f"{rank.size} x {rank.device.type} ({rank.backend})",
        "tokens": f"{options.tokens:,}; on each rank {', '.join(f'{count:,}' for count in report.lengths)}",
        "loss, nats a byte": f"{losses[0]:.3f} {drawn(losses)} {losses[-1]:.3f}" if losses else "not trained",
        "tokens/s, median": f"{median(report.tokens_per_s):,.0f}" if losses else "-",
        "memory a rank, GiB": ", ".join(f"{gib:.2f}" for gib in report.memory_gib),
        "equal to one device": verdict,
        "goes on with": repr(report.continuation),
    }
    print()
    for name, value in rows.items():
        first, *rest = textwrap.wrap(value, 88) or [""]
        print("\n".join([f"  {name:<20} {first}", *(" " * 23 + line for line in rest)]))
    further = commands.command("generate", "--model", options.out, "--prompt", f"{report.word} ", "--temperature", 0.7)
    print(
        f"\n  Trained on {options.tokens:,} bytes for {options.steps} steps, it can spell a little of them and knows "
        f"nothing else.\n  Kept in {report.saved}; it goes on with\n\n"
        f"    {further}\n\n"
        f"  It knows more of it after --steps 500. To train on a text of your own: {commands.command()} train "
        f"--text FILE --ranks {rank.size}"
    )
