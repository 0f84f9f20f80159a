"""Do two revisions compute the same bits? Some 60 calls in both, compared with torch.equal.

    python benchmarks/compare_revisions.py --base PATH [--device cpu] [--only WORD ...] [--except NAME ...]
    python benchmarks/compare_revisions.py --base PATH --time [--turns 41] [--device cpu] [--only WORD ...] [--out FILE]

PATH: a checkout of the other revision; each computes in a process of its own. Methods, dtypes, head sizes, layouts,
packed documents, states, gradients, virtual ranks and decoding; with a GPU, the sizes that its kernels are written for.
`--except` names calls whose value changed on purpose; a call that raises in both is no call.
`--time` compares the host's time for short calls that both have made before instead (suites/compare/turns.py), and
fails where one takes more than 3 % longer than in the other revision.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.revision import commit
from suites.compare import turns

ROOT = Path(__file__).parents[1]
SLOWER = 1.03  # of a ratio of times: what a shared machine tells apart


@dataclass(frozen=True)
class Call:
    """One call, by what `linear_attention` takes. ranks: over virtual ranks; step: of decoding instead."""

    method: str = "block"
    dtype: str = "float32"
    dk: int = 64
    dv: int = 64
    tokens: int = 300
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    decay: str = "mixed"
    documents: tuple[int, ...] | None = None
    initial: bool = False
    model_layout: bool = False
    tile: int | None = None
    precision: str | None = None
    grads: bool = True
    ranks: int = 1
    step: str = ""

    def __str__(self) -> str:
        plain = Call()
        given = {name: value for name, value in vars(self).items() if value != getattr(plain, name)}
        return " ".join(f"{name}={str(value).replace(' ', '')}" for name, value in given.items()) or "plain"


def calls(cuda: bool) -> list[Call]:
    dtypes = ("float32", "bfloat16", "float16") + (() if cuda else ("float64",))
    methods = ("auto", "block", "lightning", "fleet", "causal_dot_product", "vanilla", "recursion")
    found = [Call(method, dtype) for method in methods for dtype in dtypes]
    sizes = [(128, 128), (256, 256), (100, 128), (64, 192), (40, 24), (16, 16)]
    if cuda:
        sizes += [(128, 64), (256, 64), (128, 256), (72, 40)]
    found += [Call("block", dtype, dk, dv, 600) for dk, dv in sizes for dtype in dtypes[:2]]
    packed = (0, 1, 1, 65, 200, 300)
    for dtype in dtypes[:2]:
        found += [
            Call(dtype=dtype, documents=packed, initial=True),
            Call("lightning", dtype, tokens=1300, tile=512, initial=True),
            Call("fleet", dtype, tokens=1100, tile=1024),
            Call(dtype=dtype, batch=2, kv_heads=2, model_layout=True),
            Call(dtype=dtype, heads=4, kv_heads=1, initial=True, decay="none"),
            Call(dtype=dtype, decay="slow", tile=32),
            Call(dtype=dtype, tile=64, grads=False, initial=True),
            Call(dtype=dtype, tokens=700, tile=64, ranks=3, initial=True),
            Call(dtype=dtype, tokens=300, tile=32, ranks=2, documents=packed, kv_heads=2),
            Call("fleet", dtype, tokens=500, tile=128, ranks=5),
            Call(dtype=dtype, step="step", tokens=1),
            Call(dtype=dtype, step="steps", tokens=4, batch=3, kv_heads=2),
        ]
    found += [Call(precision="tf32", dk=128, dv=128), Call(dtype="bfloat16", precision="high", dk=128, dv=128)]
    return list(dict.fromkeys(found))


def inputs(call: Call, device: str) -> dict[str, Any]:
    """The same in every process and revision."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(str(call).encode()))
    dtype = getattr(torch, call.dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(heads: int, dim: int) -> Any:
        if call.model_layout:
            x = torch.randn(call.batch, call.tokens, heads, dim, generator=generator, dtype=exact).transpose(1, 2)
        else:
            x = torch.randn(call.batch, heads, call.tokens, dim, generator=generator, dtype=exact)
        return x.to(device, dtype)

    decays = {"mixed": [-1e-3, -0.05, -0.7, 0.0], "slow": [-1e-4] * 4, "none": None}[call.decay]
    rows = call.batch if call.documents is None else len(call.documents) - 1
    states = torch.randn(rows, call.heads, call.dk, call.dv, generator=generator, dtype=exact).to(device)
    return {
        "q": draw(call.heads, call.dk), "k": draw(call.kv_heads, call.dk), "v": draw(call.kv_heads, call.dv),
        "do": draw(call.heads, call.dv), "state": states,
        "log_decay": None if decays is None else torch.tensor(decays, dtype=torch.float32, device=device),
    }  # fmt: skip


def results(call: Call, device: str) -> dict[str, Any]:
    import torch

    import leetdist

    x = inputs(call, device)
    if call.step:
        tensors, state = (x["q"], x["k"], x["v"]), x["state"]
        if call.step == "step":
            o, state = leetdist.linear_attention_step(*tensors, state, x["log_decay"], scale=0.3)
        else:
            o = leetdist.linear_attention_steps(*tensors, state, x["log_decay"], scale=0.3)
        return {"o": o, "state": state}
    options: dict[str, Any] = {"scale": 0.3, "method": call.method, "tile": call.tile, "return_state": True}
    if call.precision is not None:
        options["precision"] = call.precision
    if call.documents is not None:
        options["cu_seqlens"] = torch.tensor(call.documents, device=device)

    def compute(group: Any = None) -> dict[str, Any]:
        """On one device, or this rank's share."""
        cut = slice(None)
        if group is not None:
            tile = call.tile or 64
            if call.documents is not None:  # documents may be cut anywhere
                edges = [call.tokens * rank // call.ranks for rank in range(call.ranks + 1)]
            else:
                tiles = -(-call.tokens // tile)
                edges = [min(call.tokens, tiles * rank // call.ranks * tile) for rank in range(call.ranks + 1)]
            cut = slice(edges[group.rank], edges[group.rank + 1])
        leaves = {name: x[name][:, :, cut].detach().requires_grad_(call.grads) for name in "qkv"}
        given = dict(options)
        if call.initial and (group is None or group.rank == 0):
            leaves["state"] = given["initial_state"] = x["state"].clone().requires_grad_(call.grads)
        if x["log_decay"] is not None:
            leaves["log_decay"] = x["log_decay"].clone().requires_grad_(call.grads)
        o, end = leetdist.linear_attention(
            leaves["q"], leaves["k"], leaves["v"], leaves.get("log_decay"), **given, group=group
        )
        found = {"o": o.detach(), "end": end.detach()}
        if call.grads:
            torch.autograd.backward([o, end], [x["do"][:, :, cut], torch.ones_like(end)])
            found |= {f"d{name}": leaf.grad for name, leaf in leaves.items()}
        return found

    if call.ranks == 1:
        return compute()
    shares = leetdist.virtual_ranks(compute, call.ranks)
    return {f"{name} of rank {rank}": value for rank, share in enumerate(shares) for name, value in share.items()}


def work(file: Path, device: str, names: list[str]) -> None:
    """In a process of one revision: all results into a file."""
    import torch

    tree = Path.cwd().resolve()
    found: dict[str, Any] = {}
    for call in calls(device != "cpu"):
        if str(call) in names:
            try:
                computed = results(call, device)
                found[str(call)] = {name: None if x is None else x.cpu() for name, x in computed.items()}
            except Exception as error:
                found[str(call)] = f"{type(error).__name__}: {error}"
    turns.check_own(tree)
    torch.save(found, file)


def run(tree: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, cwd=tree).stdout


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a checkout of the other revision")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="calls whose names hold one of these")
    parser.add_argument("--except", dest="changed", nargs="*", default=[], metavar="NAME", help="changed on purpose")
    parser.add_argument("--time", action="store_true", help="the host's time of short calls, not their bits")
    parser.add_argument("--turns", type=int, default=41, help="of both revisions, a call of --time")
    parser.add_argument("--out", type=Path, help="JSON of --time")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        work(args.work, args.device, args.only)
        return 0
    if args.serve:
        turns.serve(args.device)
        return 0
    if args.base is None or not (args.base / "leetdist").is_dir():
        parser.error(f"--base must be a checkout of leetdist, got {args.base}")
    trees = {"here": ROOT, "base": args.base.resolve()}
    if args.time:
        return time(trees, args)
    names = [str(call) for call in calls(args.device != "cpu")]
    names = [name for name in names if not args.only or any(word in name for word in args.only)]
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for where, tree in trees.items():
            file = Path(folder) / where
            run(tree, "--work", str(file), "--device", args.device, "--only", *names)
            found[where] = torch.load(file, weights_only=True)
    bad = 0
    for name in names:
        said = compared(found["here"][name], found["base"][name])
        if said and name in args.changed:
            said = f"{said} (on purpose)"
        else:
            bad += bool(said)
        print(f"{'differs' if said else 'equal  '}  {name}{': ' + said if said else ''}")
    print(f"{len(names) - bad} of {len(names)} calls as they were, on {args.device}")
    return 1 if bad else 0


def time(trees: dict[str, Path], args: argparse.Namespace) -> int:
    """Short calls of both revisions in turns."""
    rows = turns.compare(Path(__file__).resolve(), trees, args.device, args.turns, args.only)
    slower = [row for row in rows if row["ratio"] > SLOWER]
    for row in slower:
        print(f"slower: {row['call']}, {row['ratio']} times the base's")
    print(f"{len(rows) - len(slower)} of {len(rows)} calls as fast as they were, on {args.device}")
    if args.out is not None:
        command = (
            f"python benchmarks/compare_revisions.py --base PATH --time --turns {args.turns} --device {args.device}"
        )
        result = {
            "commit": commit(), "base": commit(trees["base"]), "command": command, "torch": version("torch"),
            "turns": args.turns, "rows": rows,
        }  # fmt: skip
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if slower else 0


def compared(here: Any, base: Any) -> str:
    """Which results differ, and by how much; nothing if none."""
    import torch

    if isinstance(here, str) or isinstance(base, str):
        said = {where: x if isinstance(x, str) else "computes" for where, x in (("here", here), ("base", base))}
        return ", ".join(f"{where} {x}" for where, x in said.items())
    if here.keys() != base.keys():
        return f"results {sorted(here)} and {sorted(base)}"
    differing = []
    for name, x in here.items():
        y = base[name]
        if x is None or y is None:
            differing += [] if x is y else [f"{name} is missing"]
        elif not torch.equal(x, y) and not torch.equal(x.nan_to_num(), y.nan_to_num()):
            error = (x.double() - y.double()).norm() / y.double().norm()
            differing.append(f"{name} by {float(error):.1e}")
    return ", ".join(differing)


if __name__ == "__main__":
    sys.exit(main())
