"""Inference measured: prompts of a million tokens, and decoding beside fla and beside softmax attention with a cache.

    python benchmarks/inference.py                        # a GPU; writes runs/benchmarks/inference/inference-<gpu>.*
    python benchmarks/inference.py --device cpu --quick   # small sizes, to see that everything works
    python benchmarks/inference.py --warm                 # compiles the full run's kernels, and times nothing of use

Each section checks before it times, prints no time for a wrong result, and goes on when another one fails. Decoding is
timed as servers run it, from CUDA graphs, over so many states in turn that none stays in the cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common.place import RUNS, needs_gpu
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import leetdist
from leetdist.inference.session import Session
from leetdist.launch.model import Config, LanguageModel
from leetdist.reference import recurrence, relative_error
from leetdist.sequence.grid import default_tile

HEADS, DIM = 32, 128
Row = dict[str, Any]


class Bench:
    """Sizes, clock and memory of one machine."""

    def __init__(self, device: str, quick: bool = False, warm: bool = False) -> None:
        self.device, self.quick = torch.device(device), quick
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.heads, self.dim = (4, 32) if quick else (HEADS, DIM)
        self.long, self.longest = (4096, 16384) if quick else (131_072, 1_048_576)
        self.pieces = (2, 8) if quick else (8, 80)
        self.contexts = [1 << n for n in ((10, 12) if quick else (10, 12, 14, 16, 17, 18, 19, 20))]
        self.batches = (1, 4) if quick else (1, 32, 256)
        self.preset = "tiny" if quick else "100m"
        if warm:  # the head sizes of the full run, which the kernels are compiled for
            self.long, self.longest, self.pieces, self.contexts, self.batches = 16384, 32768, (2,), [1024], (2,)
        heads = torch.arange(1, self.heads + 1, device=self.device, dtype=torch.float32)
        self.log_decay = -torch.exp2(-8 * heads / self.heads)  # Lightning Attention's slopes

    def model(self) -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(Config.preset(self.preset)).to(self.device, self.dtype).eval()

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "CPU"

    def tensors(self, batch: int, tokens: int, count: int = 3) -> list[Tensor]:
        """(B, H, N, D) views of (B, N, H, D), as models have them."""
        shape = (batch, tokens, self.heads, self.dim)
        return [torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2) for _ in range(count)]

    @cache  # noqa: B019 (one bench; pinning memory takes longer than what is measured)
    def both(self) -> tuple[list[Tensor], list[Tensor]]:
        """q, k and v of `long` tokens on the device, and in host memory that it can copy from by itself."""
        here = self.tensors(1, self.long)
        held = [torch.empty(x.transpose(1, 2).shape, dtype=x.dtype, pin_memory=self.cuda) for x in here]
        return here, [to.copy_(x.transpose(1, 2)).transpose(1, 2) for to, x in zip(held, here, strict=True)]

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], repeats: int = 5) -> float:
        """Median of single calls, after one that warms up; the host waits for each."""
        call()
        return statistics.median(self.once(call) for _ in range(repeats))

    def once(self, call: Callable[[], Any]) -> float:
        self.sync()
        begin = time.perf_counter()
        call()
        self.sync()
        return time.perf_counter() - begin

    def graph_seconds(self, calls: list[Callable[[], Any]], replays: int = 20) -> float:
        """Median time of one of the calls, all of them captured in one CUDA graph (plain calls without a GPU)."""
        if not self.cuda:
            return self.seconds(lambda: [call() for call in calls]) / len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times) / len(calls)

    def peak(self, call: Callable[[], Any]) -> float:
        """Device memory in GiB that the call takes at most, beyond what was there."""
        if not self.cuda:
            call()
            return float("nan")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.sync()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def rotations(self, size: int) -> int:
        """So many sets of `size` bytes that none is still in the cache when its turn comes."""
        return max(1, min(128, (256 << 20) // size)) if self.cuda else 2


def operator_prefill(bench: Bench, tokens: int) -> Row:
    """One call over the whole prompt."""
    q, k, v = bench.tensors(1, tokens)
    tile, half = default_tile(tokens), tokens // 2

    def run(part: slice = slice(None), state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return leetdist.linear_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], bench.log_decay,
            initial_state=state, return_state=True, tile=tile,
        )  # fmt: skip

    o, last = run()
    again, end = run(slice(half, None), run(slice(half))[1])
    _must(torch.equal(again, o[:, :, half:]) and torch.equal(end, last), "two halves differ from one call")
    del o, again
    seconds = bench.seconds(run)
    return {
        "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "peak_gib_with_output": bench.peak(run)
    }  # fmt: skip


def streamed(bench: Bench, pieces: int) -> Row:
    """A prompt in host memory, piece after piece: copies in, compute and copies out at the same time."""
    here, host = bench.both()

    tile = default_tile(pieces * bench.long)

    def run(source: list[Tensor]) -> None:
        stream = leetdist.stream(bench.log_decay, device=bench.device, tile=tile)
        for o in stream.map((source[0], source[1], source[2]) for _ in range(pieces)):
            del o

    if pieces == bench.pieces[0]:  # the outputs and the state of one call, from pieces that end inside of tiles
        o, last = leetdist.linear_attention(*here, bench.log_decay, tile=tile, method="block", return_state=True)
        stream, cuts = leetdist.stream(bench.log_decay, device=bench.device, tile=tile), (7, bench.long // 3)
        parts = stream.map((q, k, v) for q, k, v in zip(*(x.tensor_split(cuts, 2) for x in host), strict=True))
        same = torch.equal(torch.cat(list(parts), 2).to(o.device), o) and torch.equal(stream.state.now, last)
        _must(same, "the stream differs from one call")
        del o
    tokens = pieces * bench.long
    row: Row = {"tokens": tokens}
    row["copies_in_alone_s"] = bench.seconds(lambda: [x.to(bench.device, copy=True) for x in host], 1) * pieces
    for name, source in (("device", here), ("host", host)):
        times: list[float] = []
        row[f"{name}_peak_gib"] = bench.peak(lambda: times.append(bench.once(partial(run, source))))  # noqa: B023
        row |= {f"{name}_s": times[0], f"{name}_tokens_per_s": tokens / times[0]}
    return row


def model_prefill(bench: Bench, tokens: int) -> Row:
    """A language model of 100 million parameters takes in a prompt, in pieces of 131,072 tokens."""
    model = bench.model()
    prompt = torch.randint(256, (1, tokens), device=bench.device)

    sessions: list[Session] = []

    def run() -> None:
        sessions[:] = [Session(model, piece=bench.long)]
        sessions[0].prefill(prompt)

    times: list[float] = []
    peak = bench.peak(lambda: times.append(bench.seconds(run, repeats=2)))
    (seconds,), (session,) = times, sessions
    step = bench.seconds(partial(session.step, prompt[:, :1]), repeats=30)
    return {
        "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "peak_gib": peak,
        "then_ms_per_token": step * 1e3,
    }  # fmt: skip


def model_decode(bench: Bench, batch: int) -> Row:
    """The same model, one token a step for B requests."""
    model = bench.model()
    prompt = torch.randint(256, (batch, 64), device=bench.device)
    session, eager = Session(model), Session(model)
    token = session.prefill(prompt).argmax(-1, keepdim=True)
    eager.prefill(prompt)
    with torch.no_grad():
        last, _ = eager._run(token, eager.states)
        error = relative_error(session.step(token), eager._logits(last))
    _must(error < 1e-3, f"the captured step differs from the eager one by {error:.1e}")
    seconds = bench.seconds(partial(session.step, token), repeats=50)
    return {"batch": batch, "ms": seconds * 1e3, "tokens_per_s": batch / seconds}


def operator_decode(bench: Bench, batch: int) -> Row:
    """The operator, one token for B requests: a state of (B, 32, 128, 128) read and written; us a call."""
    g, device = bench.log_decay, bench.device
    sets = bench.rotations(batch * bench.heads * bench.dim**2 * 4)
    states = torch.randn(sets, batch, bench.heads, bench.dim, bench.dim, device=device)
    token, draft = bench.tensors(batch, 1), bench.tensors(batch, 4)
    slots = [torch.randperm(batch, device=device) for _ in range(sets)]
    keep = {n: torch.full((batch,), n, device=device) for n in (0, 1, 4)}
    expected, _ = recurrence(*token, g, initial_state=states[0])

    def step(n: int) -> Tensor:
        return leetdist.linear_attention_step(*token, states[n], g, inplace=True)[0]

    def steps(n: int, tokens: list[Tensor], kept: int) -> Tensor:
        return leetdist.linear_attention_steps(*tokens, states[n], g, index=slots[n], lengths=keep[kept])

    contestants: dict[str, Callable[[int], Any]] = {
        "step": step,
        "pooled, by index": partial(steps, tokens=token, kept=1),
        "verify 4 tokens": partial(steps, tokens=draft, kept=0),
        "accept 4 tokens": partial(steps, tokens=draft, kept=4),
    }
    checks = {
        "step": lambda: step(0),
        "steps": lambda: leetdist.linear_attention_steps(*token, states[0], g),
    }
    if bench.cuda and importlib.util.find_spec("fla"):
        from fla.ops.simple_gla import fused_recurrent_simple_gla as fla

        theirs = [x.transpose(1, 2) for x in token]

        def recurrent(n: int) -> Tensor:
            return fla(*theirs, g_gamma=g, scale=1.0, initial_state=states[n], output_final_state=True)[0]

        contestants["fla fused_recurrent"] = recurrent
        checks["fla fused_recurrent"] = lambda: recurrent(0).transpose(1, 2)
    start = states[0].clone()
    after = [start.clone() for _ in range(2)]
    leetdist.linear_attention_steps(*draft, after[0], g)
    for t in range(4):
        leetdist.linear_attention_step(*(x[:, :, t : t + 1] for x in draft), after[1], g, inplace=True)
    _must(torch.equal(*after), "four tokens at once differ from four steps")
    for name, check in checks.items():
        states[0] = start
        error = relative_error(check(), expected)
        _must(error < (1e-2 if bench.cuda else 1e-5), f"{name}: relative error {error:.1e}")

    row: Row = {"batch": batch, "states_in_turn": sets}
    if bench.cuda:  # what reading and writing the state takes, whoever does it
        other = torch.empty_like(states)
        row["copy"] = bench.graph_seconds([partial(other.copy_, states)]) * 1e6 / sets
        del other
    for name, call in contestants.items():
        states.normal_()
        row[name] = bench.graph_seconds([partial(call, n) for n in range(sets)]) * 1e6
    states = states.bfloat16()
    row["bf16 states"] = bench.graph_seconds([partial(steps, n, token, 1) for n in range(sets)]) * 1e6
    row["tokens_per_s"] = batch / min(row["step"], row["pooled, by index"]) * 1e6
    return row


def contexts(bench: Bench, batch: int, tokens: int) -> Row:
    """Latency of a token against the length of what came before: SDPA with a cache of keys and values."""
    size = 2 * batch * bench.heads * tokens * bench.dim * bench.dtype.itemsize
    row: Row = {"batch": batch, "context": tokens, "cache_gib": size / 2**30, "sdpa_us": None}
    free = torch.cuda.mem_get_info()[0] - (4 << 30) if bench.cuda else 4 << 30
    if size > free:
        return row | {"why": f"the cache does not fit into {free / 2**30:,.0f} GiB"}
    sets = bench.rotations(size)
    shape = (sets, batch, bench.heads, tokens, bench.dim)
    k, v = (torch.empty(shape, device=bench.device, dtype=bench.dtype).normal_() for _ in range(2))
    q = torch.randn(batch, bench.heads, 1, bench.dim, device=bench.device, dtype=bench.dtype)

    def attend(n: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k[n], v[n])

    times: dict[str, float] = {}
    # The memory-efficient one took 20 times as long as cuDNN's with one query.
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for backend in fast if bench.cuda else [SDPBackend.MATH]:
        try:
            with sdpa_kernel(backend):
                times[backend.name] = bench.graph_seconds([partial(attend, n) for n in range(sets)], replays=5) * 1e6
        except RuntimeError as error:
            print(f"    SDPA {backend.name}: {str(error).splitlines()[0][:100]}", flush=True)
    if times:
        row |= {"sdpa_us": min(times.values()), "backend": min(times, key=times.__getitem__), "all_us": times}
    return row


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(f"wrong result, no time: {otherwise}")


def cases(bench: Bench) -> dict[Callable[..., Row], list[tuple[int, ...]]]:
    """The sections, and what each is called with."""
    lengths = [(bench.long,), (bench.longest,)]
    batches = [(batch,) for batch in bench.batches]
    return {
        operator_decode: batches,
        operator_prefill: lengths,
        contexts: [(1, tokens) for tokens in bench.contexts] + [(batch, bench.long) for batch in bench.batches[1:]],
        model_prefill: lengths,
        model_decode: batches,
        streamed: [(pieces,) for pieces in bench.pieces],
    }


def _shown(row: Row) -> str:
    parts = []
    for name, value in row.items():
        if isinstance(value, float):
            value = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        elif isinstance(value, int):
            value = f"{value:,}"
        parts.append(f"{name} {value}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, or cpu (cuda)")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--warm", action="store_true", help="the full run's kernels on small sizes, to compile them")
    parser.add_argument("--only", nargs="*", default=[], help="names of sections; default: all")
    parser.add_argument("--out", type=Path, default=RUNS / "inference", help="folder of the results")
    options = parser.parse_args()
    if options.device is None:
        needs_gpu(parser, "--device cpu --quick runs small ones on a CPU")
    bench = Bench(options.device or "cuda", options.quick, options.warm)
    results: Row = {
        "device": bench.name, "torch": torch.__version__, "heads": bench.heads, "dim": bench.dim,
        "dtype": str(bench.dtype), "command": "python benchmarks/inference.py" + (" --quick" if bench.quick else ""),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"inference-{bench.name.split()[-1].lower()}.json"
    for section, sizes in cases(bench).items():
        name = section.__name__
        if options.only and name not in options.only:
            continue
        print(f"\n{name}: {section.__doc__}", flush=True)
        results[name] = []
        for size in sizes:
            begin = time.perf_counter()
            try:
                row = section(bench, *size)
            except Exception:
                traceback.print_exc()
                continue
            finally:
                if bench.cuda:
                    torch.cuda.empty_cache()
            results[name].append(row)
            print(f"  {_shown(row)}  [{time.perf_counter() - begin:.0f} s]", flush=True)
            path.write_text(json.dumps(results, indent=1))
    print(f"\n{path}")
    if results.get("contexts") and results.get("operator_decode"):
        try:
            from suites.inference.plot import plot  # needs matplotlib

            plot(path)
        except ImportError as error:
            print(f"no plot: {error}")


if __name__ == "__main__":
    main()
