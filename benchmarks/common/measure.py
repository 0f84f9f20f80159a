"""Correctness first, then time: contestants take turns, so that a change in clocks meets all of them."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from common.cases import DTYPES, Case, checked_rows
from common.contestants import Contestant, Inputs
from common.quiet import no_collection
from torch import Tensor

from leetdist.reference import quadratic, recurrence, relative_error

# A result further than this from fp64 is wrong, and gets no time. bf16's rounding alone is 1.7e-3.
WRONG = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 4e-3}
CHECKED_HEADS = 2
# Input sets are rotated until they exceed this, so that no contestant finds its inputs in the cache.
CACHE_BYTES = 256 * 2**20
LARGE_BYTES = 8 * 2**30
# Milliseconds of a turn that are not counted, and that are.
SETTLE, TIMED = 4.0, 4.0


@dataclass
class Result:
    """One contestant on one case and pass. Times in ms; memory in bytes beyond inputs and outputs, and over those
    of the inputs; `vs_peer`: the time of the fastest that is not leetdist and computes the same operator, over ours."""

    suite: str
    case: str
    which: str
    contestant: str
    error: float | None = None
    milliseconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    floor_ms: float | None = None
    x_floor: float | None = None
    vs_peer: float | None = None
    tflops: float | None = None
    gbytes: float | None = None
    peak_bytes: int | None = None
    peak_share: float | None = None
    note: str = ""
    details: dict[str, object] = field(default_factory=dict)


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    elements = 2**29 if device == "cuda" else 2**26
    source = torch.randn(elements, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    times = [_milliseconds(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * source.nbytes / (statistics.median(times[2:]) * 1e-3)


def draw(case: Case, device: str, seed: int) -> Inputs:
    """Fresh random inputs, laid out (B, N, H, D)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        x = torch.empty(shape, device=device, dtype=DTYPES[case.dtype])
        return x.normal_(generator=generator)

    def laid_out(heads: int, columns: int) -> Tensor:
        if case.layout == "heads first":
            return normal(case.batch, heads, case.tokens, columns).transpose(1, 2)
        return normal(case.batch, case.tokens, heads, columns)

    tokens = (case.batch, case.tokens, case.heads)
    state = cu_seqlens = None
    if case.passes == ("step",) or case.states:
        state = torch.empty(case.documents or case.batch, case.heads, case.dk, case.dv, device=device)
        state.normal_(generator=generator)
    if case.documents:
        cuts = torch.randperm(case.tokens - 1, generator=torch.Generator().manual_seed(seed))[: case.documents - 1] + 1
        cu_seqlens = torch.tensor([0, *sorted(cuts.tolist()), case.tokens], dtype=torch.int32, device=device)
    of_q, of_k, of_v = case.head_counts()
    if case.layout == "fused":
        q, k, v = normal(*tokens[:2], 3, case.heads, case.dk).unbind(2)
    else:
        v, q, k = laid_out(of_v, case.dv), laid_out(of_q, case.dk), laid_out(of_k, case.dk)
    do = laid_out(case.heads, case.dv)
    if case.decay != "token":
        return Inputs(case, q, k, v, do, case.log_decay(device), case.scale, state, cu_seqlens=cu_seqlens)
    # As Mamba-2 begins: dt from 0.001 to 0.1, each as likely by its logarithm, times A from -1 to -16.
    dt = torch.empty(tokens, device=device).uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
    gate = -dt * torch.linspace(1, 16, case.heads, device=device)
    log_decay = gate.transpose(1, 2).contiguous()
    return Inputs(case, q, k, v, do, log_decay, case.scale, state, gate, cu_seqlens)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(contestant: Contestant, case: Case, which: str, inputs: Inputs) -> float:
    """The largest relative error of the outputs, or of the gradients, against fp64 on a few rows and heads."""
    if which == "step":
        o, state = contestant.step(inputs)
        expected, end = _step_reference(inputs)
        return max(relative_error(o[:1], expected), relative_error(state[:1], end))
    device = inputs.q.device
    rows = torch.tensor(checked_rows(case.tokens), device=device)
    fewest = min(case.head_counts())
    groups = torch.linspace(0, fewest - 1, min(CHECKED_HEADS, fewest), device=device).long()
    share = case.heads // fewest
    heads = (groups[:, None] * share + torch.arange(share, device=device)).flatten()

    def chosen(x: Tensor) -> Tensor:
        """A head's or group's tokens of the first batch entry; or of decays a head."""
        if x.ndim == 1:
            return x[heads]
        return x[:1, :, heads if x.shape[2] == case.heads else groups].transpose(1, 2)

    def exact() -> list[Tensor]:
        """q, k, v and decays."""
        decay = inputs.log_decay if inputs.gate is None else inputs.gate
        return [chosen(x).double() for x in (inputs.q, inputs.k, inputs.v, decay)]

    def expected(parts: list[Tensor]) -> Tensor:
        """Of the chosen rows, document by document."""
        *qkv, decay = parts
        found = []
        for number, begin, end, own in _documents(inputs, rows):
            within = [x[:, :, begin:end] for x in qkv]
            gates = decay if decay.ndim == 1 else decay[:, :, begin:end]
            found.append(contestant.reference(*within, gates, inputs.scale, own - begin))
            if case.states:
                assert inputs.state is not None
                faded = quadratic(
                    within[0], 0 * within[1], 0 * within[2], gates, scale=inputs.scale, rows=own - begin,
                    initial_state=inputs.state[number : number + 1, heads].double(),
                )  # fmt: skip
                found[-1] = found[-1] + faded
        return torch.cat(found, 2)

    if which == "forward":
        with torch.no_grad(), poisoned():
            o = contestant.forward(inputs)
        with torch.no_grad():
            return relative_error(chosen(o[:, rows]), expected(exact()))
    # The gradient of the checked rows alone reaches every token, and is affordable in fp64.
    do = torch.zeros_like(inputs.do)
    do[:, rows] = inputs.do[:, rows]
    if case.learnt:  # of a head's decay, whose gradient is of all batch entries
        do[1:] = 0
    with poisoned():  # whole gradients and fp64 are not held together: a million tokens fit into 80 GB
        grads = [chosen(x) for x in contestant.comparable(inputs, contestant.gradients(inputs, do))]
    parts = [x.requires_grad_() for x in exact()]
    wanted = torch.autograd.grad(expected(parts), parts, chosen(do[:, rows]).double())
    return max(relative_error(x, y) for x, y in zip(grads, wanted, strict=False))  # of decays only where they are data


def _documents(inputs: Inputs, rows: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """Number, first token and end of each document with any of the rows, and which."""
    ends = [0, inputs.q.shape[1]] if inputs.cu_seqlens is None else inputs.cu_seqlens.tolist()
    for number, (begin, end) in enumerate(pairwise(ends)):
        own = rows[(rows >= begin) & (rows < end)]
        if len(own):
            yield number, begin, end, own


def _step_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.state is not None
    q, k, v = (x[:1].transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    decay = inputs.log_decay if inputs.gate is None else inputs.log_decay[:1]
    o, state = recurrence(q, k, v, decay, scale=inputs.scale, initial_state=inputs.state[:1])
    return o.transpose(1, 2), state


def _milliseconds(function: Callable[[], object], device: str) -> float:
    return _each([function], device)[0]


def _each(functions: list[Callable[[], object]], device: str) -> list[float]:
    """What each adds to the time, one after the other."""
    if device == "cpu":
        marks = [time.perf_counter()]
        for function in functions:
            function()
            marks.append(time.perf_counter())
        return [(end - begin) * 1e3 for begin, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(functions) + 1)]
    events[0].record()
    for function, event in zip(functions, events[1:], strict=True):
        function()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]


def one_turn(
    calls: list[Callable[[], object]], once: float, device: str, wait: Callable[[], None] | None = None
) -> list[float]:
    """Times (ms) of calls that follow each other, on inputs in turn, as a model's layers would: the larger of what the
    host and the device take. The first ones, which find the device idle or at a neighbour's clock, do not count. Of
    calls that are over when `wait` returns, their mean."""
    if device == "cpu" and wait is None:
        return _each(calls[:1], device)
    before, counted = (max(1, min(most, int(span / once))) for most, span in ((40, SETTLE), (20, TIMED)))
    turns = [calls[i % len(calls)] for i in range(before + counted)]
    if wait is None:
        return _each(turns, device)[before:]
    for call in turns[:before]:
        call()
    wait()
    begin = time.perf_counter()
    for call in turns[before:]:
        call()
    wait()
    return [(time.perf_counter() - begin) * 1e3 / counted]


def call_of(contestant: Contestant, which: str, inputs: Inputs) -> Callable[[], object]:
    return partial(contestant.launch, which, inputs)


def _graphed(function: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def run_case(
    suite: str,
    case: Case,
    which: str,
    contestants: list[Contestant],
    device: str,
    bandwidth: float,
    rounds: int,
    say: Callable[[str], None],
) -> list[Result]:
    """Check every contestant, then time those that are right, in turns."""
    results = {c.name: Result(suite, case.name, which, c.name) for c in contestants}
    sets = max(1, min(8, CACHE_BYTES // max(1, case.floor_bytes("forward"))))
    if device == "cpu":
        sets = 1
    inputs = [draw(case, device, seed) for seed in range(sets)]
    ready: dict[str, list[Callable[[], object]]] = {}
    for contestant in contestants:
        result = results[contestant.name]
        say(f"checking {contestant.name}")
        begin = time.monotonic()
        try:
            with contestant.active():
                # Other inputs than the timed ones, where there is room for them.
                large = case.floor_bytes("forward") > LARGE_BYTES
                result.error = check(contestant, case, which, inputs[0] if large else draw(case, device, 1000))
                bound = WRONG[case.dtype]
                if not result.error <= bound:
                    result.note = f"wrong: relative error {result.error:.1e}, bound {bound:.0e}"
                    continue
                calls = [call_of(contestant, which, x) for x in inputs]
                for call in calls:
                    call()
                contestant.wait()
                if device == "cuda" and not contestant.waits:
                    result.peak_bytes = _peak(calls[0]) - case.output_bytes(which) - contestant.more(case, which)[1]
                    result.peak_share = result.peak_bytes / case.input_bytes(which)
                ready[contestant.name] = [_graphed(f) for f in calls] if case.graph else calls
        except Exception as error:  # one contestant's failure is a line in the table
            result.note = f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:80]}"
        finally:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
            result.details["checked_in_seconds"] = round(time.monotonic() - begin, 2)

    times: dict[str, list[float]] = {name: [] for name in ready}
    once: dict[str, float] = {}
    with no_collection():
        for turn in range(rounds + 1):
            say(f"round {turn} of {rounds}")
            for contestant in contestants:
                if contestant.name in ready:
                    calls = ready[contestant.name]
                    with contestant.active():
                        wait = contestant.wait if contestant.waits else None
                        measured = one_turn(calls, once.get(contestant.name, TIMED), device, wait)
                    once[contestant.name] = statistics.median(measured)
                    if turn:  # the first round warms up
                        times[contestant.name].append(once[contestant.name])
    for contestant in contestants:
        if contestant.name not in times:
            continue
        result, medians = results[contestant.name], times[contestant.name]
        moved = case.floor_bytes(which) + contestant.more(case, which)[0]
        floor, middle = moved / bandwidth * 1e3, statistics.median(medians)
        result.milliseconds, result.fastest, result.slowest = middle, min(medians), max(medians)
        result.floor_ms, result.x_floor = floor, middle / floor
        result.tflops = case.flops(which) / middle / 1e9
        result.gbytes = moved / middle / 1e6
    for contestant in contestants:
        own = results[contestant.name].milliseconds
        peers = [
            peer
            for c in contestants
            if c.operator == contestant.operator and not c.ours and (peer := results[c.name].milliseconds) is not None
        ]
        if contestant.ours and peers and own is not None:
            results[contestant.name].vs_peer = min(peers) / own
    return list(results.values())


def _peak(call: Callable[[], object]) -> int:
    """Memory beyond inputs at the worst moment of a call."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
