"""Inference measured: prompts of a million tokens, and decoding beside fla and beside softmax attention with a cache.

    python benchmarks/inference.py                        # a GPU; writes benchmarks/results/inference-<gpu>.{json,png}
    python benchmarks/inference.py --device cpu --quick   # small sizes, to see that everything works
    python benchmarks/inference.py --plot benchmarks/results/inference-h200.json

Each section checks before it times, prints no time for a wrong result, and goes on when another one fails. Decoding is
timed as servers run it, from CUDA graphs, over so many states in turn that none stays in the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import leetdist
from leetdist.inference.session import Session
from leetdist.launch.model import Config, LanguageModel
from leetdist.reference import recurrence, relative_error
from leetdist.sequence.grid import default_tile

ROOT = Path(__file__).resolve().parent
HEADS, DIM = 32, 128
Row = dict[str, Any]


class Bench:
    """Sizes, clock and memory of one machine."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = torch.device(device), quick
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.heads, self.dim = (4, 32) if quick else (HEADS, DIM)
        self.long, self.longest = (4096, 16384) if quick else (131_072, 1_048_576)
        self.pieces = (2, 8) if quick else (8, 80)
        self.contexts = [1 << n for n in ((10, 12) if quick else (10, 12, 14, 16, 17, 18, 19, 20))]
        self.batches = (1, 4) if quick else (1, 32, 256)
        self.preset = "tiny" if quick else "100m"
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

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], repeats: int = 5) -> float:
        """Median of single calls, after one that warms up; the host waits for each."""
        call()
        times = []
        for _ in range(repeats):
            self.sync()
            begin = time.perf_counter()
            call()
            self.sync()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

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
    host = [x.transpose(1, 2).cpu() for x in bench.tensors(1, bench.long)]
    host = [(x.pin_memory() if bench.cuda else x).transpose(1, 2) for x in host]
    here = [x.to(bench.device) for x in host]

    def run(source: list[Tensor], count: int = pieces) -> Tensor:
        stream = leetdist.stream(bench.log_decay, device=bench.device, tile=default_tile(2 * bench.long))
        for o in stream.map((source[0], source[1], source[2]) for _ in range(count)):
            del o
        return stream.state.now

    twice = [torch.cat((x, x), 2) for x in here]
    _, expected = leetdist.linear_attention(*twice, bench.log_decay, return_state=True)
    _must(torch.equal(run(host, 2), expected), "the stream's state differs from one call's")
    del twice
    tokens = pieces * bench.long
    row: Row = {"tokens": tokens}
    row["copies_in_alone_s"] = bench.seconds(lambda: [x.to(bench.device, copy=True) for x in host]) * pieces
    for name, source in (("device", here), ("host", host)):
        seconds = bench.seconds(partial(run, source), repeats=1)
        row |= {
            f"{name}_s": seconds,
            f"{name}_tokens_per_s": tokens / seconds,
            f"{name}_peak_gib": bench.peak(partial(run, source)),
        }
    return row


def model_prefill(bench: Bench, tokens: int) -> Row:
    """A language model of 100 million parameters takes in a prompt, in pieces of 131,072 tokens."""
    model = bench.model()
    prompt = torch.randint(256, (1, tokens), device=bench.device)

    def run() -> Session:
        session = Session(model, piece=bench.long)
        session.prefill(prompt)
        return session

    seconds, peak, session = bench.seconds(run, repeats=3), bench.peak(run), run()
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
    if bench.cuda and (fla := _fla()) is not None:
        theirs = [x.transpose(1, 2) for x in token]

        def recurrent(n: int) -> Tensor:
            return fla(*theirs, g_gamma=g, scale=1.0, initial_state=states[n], output_final_state=True)[0]

        contestants["fla fused_recurrent"] = recurrent
        checks["fla fused_recurrent"] = lambda: recurrent(0).transpose(1, 2)
    start = states[0].clone()
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
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for backend in fast if bench.cuda else [SDPBackend.MATH]:
        try:
            with sdpa_kernel(backend):
                times[backend.name] = bench.graph_seconds([partial(attend, n) for n in range(sets)], replays=5) * 1e6
        except RuntimeError as error:
            print(f"    SDPA {backend.name}: {str(error).splitlines()[0][:100]}", flush=True)
    if times:
        row |= {"sdpa_us": min(times.values()), "backend": min(times, key=times.__getitem__), "all_us": times}
    return row


def _fla() -> Callable[..., Any] | None:
    try:
        from fla.ops.simple_gla import fused_recurrent_simple_gla
    except ImportError:
        return None
    call: Callable[..., Any] = fused_recurrent_simple_gla
    return call


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(f"wrong result, no time: {otherwise}")


def cases(bench: Bench) -> dict[Callable[..., Row], list[tuple[int, ...]]]:
    """The sections, and what each is called with."""
    lengths = [(bench.long,), (bench.longest,)]
    batches = [(batch,) for batch in bench.batches]
    return {
        operator_prefill: lengths,
        operator_decode: batches,
        contexts: [(1, tokens) for tokens in bench.contexts] + [(batch, bench.long) for batch in bench.batches[1:]],
        model_prefill: lengths,
        model_decode: batches,
        streamed: [(pieces,) for pieces in bench.pieces],
    }


def plot(results: Row, path: Path) -> None:
    """Latency of a token against context, and memory against the length of the prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    alone = [r for r in results["contexts"] if r["batch"] == 1 and r.get("sdpa_us")]
    x = [r["context"] for r in alone]
    left.loglog(x, [r["sdpa_us"] for r in alone], "s-", label="SDPA with a KV cache")
    (ours,) = [r for r in results["operator_decode"] if r["batch"] == 1]
    left.loglog(x, [min(ours["step"], ours["pooled, by index"])] * len(x), "o-", label="leetdist")
    if ours.get("fla fused_recurrent"):
        left.loglog(x, [ours["fla fused_recurrent"]] * len(x), "^--", label="fla fused_recurrent")
    left.set(xlabel="tokens of context", ylabel="us a token and layer, batch 1", title="Decoding")
    right.loglog(x, [r["cache_gib"] for r in alone], "s-", label="KV cache of one layer")
    held = results["heads"] * results["dim"] ** 2 * 4 / 2**30
    right.loglog(x, [held] * len(x), "o-", label="leetdist: state of one layer")
    for key, label in (("streamed", "operator, streamed from the host"), ("model_prefill", "100M model, prompt")):
        rows = results.get(key, [])
        peak = "host_peak_gib" if key == "streamed" else "peak_gib"
        if rows:
            right.loglog([r["tokens"] for r in rows], [r[peak] for r in rows], "d-", label=f"{label}: peak")
    right.set(xlabel="tokens", ylabel="GiB of GPU memory", title="Memory")
    for axis in (left, right):
        axis.grid(True, which="major", alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{results['device']}, {results['heads']} heads of {results['dim']}, bf16", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="*", default=[], help="names of sections; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--plot", type=Path, help="draw these results again, measure nothing")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return
    bench = Bench(options.device, options.quick)
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
    try:
        plot(results, path.with_suffix(".png"))
    except Exception:
        traceback.print_exc()


if __name__ == "__main__":
    main()
