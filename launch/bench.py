"""`leetdist bench`: the operator's time on this machine, beside that of a copy of what it reads and writes."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

import leetdist
from leetdist import reference
from leetdist.launch import commands
from leetdist.launch.progress import Bar
from leetdist.launch.runtime import choose_device, one_message
from leetdist.testing.equality import lightning_slopes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The largest relative error of a result that is right; what there is is a tenth of that and less.
BOUNDS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}
USUAL = {"tokens": (131_072, 8192), "heads": (32, 4), "dim": (128, 64), "dtype": ("bf16", "fp32")}  # on a GPU, a CPU
CHECKED = 512  # first tokens that are compared with fp64: no output depends on later ones
COPIED = 1 << 28  # bytes, more than any cache holds


@dataclass
class Row:
    """One kind of call: its relative error, and where that is small its time, also over that of a copy of what it must
    read and write."""

    call: str
    error: float
    milliseconds: float | None = None
    x_floor: float | None = None
    tokens_per_s: float | None = None


def main(argv: list[str]) -> int:
    options = commands.bench().parse_args(argv)
    with one_message():
        device = choose_device(options.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    for key, usual in USUAL.items():
        if getattr(options, key) is None:
            setattr(options, key, usual[not cuda])
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    facts = {"leetdist": leetdist.__version__, "torch": str(torch.__version__), "device": name}
    shape = {key: getattr(options, key) for key in ("batch", "heads", "tokens", "dim", "dtype")}
    copies = copied_bytes_per_s(device)
    rows = []
    with Bar(3, wanted=not options.json) as bar:
        for number, row in enumerate(measured(options, device, copies), 1):
            bar.update(number, row.call)
            rows.append(row)
    if options.json:
        found = {**facts, **shape, "copied_bytes_per_s": copies, "rows": [asdict(row) for row in rows]}
        print(json.dumps(found, indent=2))
    else:
        print(f"{name}, torch {torch.__version__}; copies {copies / 1e9:,.1f} GB/s")
        print(f"B {options.batch}, H {options.heads}, N {options.tokens:,}, D {options.dim}, {options.dtype}\n")
        print(f"{'call':<20} {'ms':>10} {'x floor':>9} {'tokens/s':>14} {'error':>9}")
        for row in rows:
            times = f"{'WRONG':>35}"
            if row.milliseconds is not None:
                times = f"{row.milliseconds:>10.4g} {row.x_floor:>9.2f} {row.tokens_per_s:>14,.0f}"
            print(f"{row.call:<20} {times} {row.error:>9.1e}")
    return int(any(row.milliseconds is None for row in rows))


def measured(options: argparse.Namespace, device: torch.device, copies: float) -> Iterator[Row]:
    """Each kind of call in turn: compared with fp64, then timed."""
    batch, heads, tokens, dim = options.batch, options.heads, options.tokens, options.dim
    dtype, generator = DTYPES[options.dtype], torch.Generator().manual_seed(0)
    size = (batch, heads, tokens, dim)
    q, k, v, do = (torch.randn(size, generator=generator).to(device, dtype) for _ in range(4))
    log_decay = lightning_slopes(heads).to(device)
    scale = dim**-0.5
    few = [x[:, :, :CHECKED].detach().double().requires_grad_() for x in (q, k, v)]
    wanted, state = reference.recurrence(few[0], few[1], few[2], log_decay, scale=scale)
    wanted.backward(do[:, :, :CHECKED].double())

    def forward() -> Tensor:
        return leetdist.linear_attention(q, k, v, log_decay, scale=scale)

    each = q.numel() * q.element_size()
    yield _row("forward", forward, 4 * each, copies, options, device, _error([forward()], [wanted]))

    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]

    def both(do: Tensor = do) -> list[Any]:
        o = leetdist.linear_attention(leaves[0], leaves[1], leaves[2], log_decay, scale=scale)
        return list(torch.autograd.grad(o, leaves, do))

    early = do.clone()
    early[:, :, CHECKED:] = 0  # so that the gradients of the first tokens know of nothing later
    error = _error(both(early), [x.grad for x in few])
    yield _row("forward + backward", both, 11 * each, copies, options, device, error)

    q1, k1, v1 = (x[:, :, :1].contiguous() for x in (q, k, v))
    kept = state.detach().float()
    after, _ = reference.recurrence(q1, k1, v1, log_decay, initial_state=kept, scale=scale)

    @torch.no_grad()
    def step() -> Tensor:
        return leetdist.linear_attention_step(q1, k1, v1, kept, log_decay, inplace=True, scale=scale)[0]

    yield _row(
        "step of decoding", step, 2 * kept.numel() * 4, copies, options, device, _error([step()], [after]), tokens=batch
    )


def _row(
    call: str,
    function: Callable[[], object],
    moved: int,
    copies: float,
    options: argparse.Namespace,
    device: torch.device,
    error: float,
    tokens: int | None = None,
) -> Row:
    """Timed where the error, relative to fp64, is a right result's; moved: bytes; tokens: of one call."""
    if not error <= BOUNDS[options.dtype]:
        return Row(call, error)
    seconds = _seconds(function, options.repeat, device)
    count = options.batch * options.tokens if tokens is None else tokens
    return Row(call, error, seconds * 1e3, seconds / (moved / copies), count / seconds)


def _error(got: list[Any], wanted: list[Any]) -> float:
    """The largest relative error of the first tokens."""
    pairs = [(x[:, :, :CHECKED].detach().double(), y.detach()) for x, y in zip(got, wanted, strict=True)]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def copied_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written a second by a copy that no cache holds."""
    source = torch.ones(COPIED // 4, device=device)
    to = torch.empty_like(source)
    return 2 * COPIED / _seconds(lambda: to.copy_(source), 9, device)


def _seconds(function: Callable[[], object], repeat: int, device: torch.device) -> float:
    """The median time of a call, after two that compile and warm up; on a GPU, of calls that follow each other."""
    function()
    function()
    if device.type != "cuda":
        spans = []
        for _ in range(repeat):
            begin = time.perf_counter()
            function()
            spans.append(time.perf_counter() - begin)
        return median(spans)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    for mark in marks[:-1]:
        mark.record()
        function()
    marks[-1].record()
    torch.cuda.synchronize()
    return median(first.elapsed_time(then) for first, then in pairwise(marks)) / 1e3
