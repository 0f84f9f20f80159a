"""Every command's parser, in one place. Nothing here needs an extra, so `--help` and a wrong argument cost an import of
leetdist at most, whatever is installed."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import shutil
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PRESETS = ("mini", "tiny", "10m", "100m")
OPERATORS = ("lightning", "mamba2")
DTYPES = ("fp32", "bf16", "fp16")
# A module that is not installed -> the extra of leetdist that has it.
EXTRAS = {
    "accelerate": "accelerate", "deepspeed": "deepspeed", "matplotlib": "plot", "numpy": "launch",
    "safetensors": "launch", "transformers": "transformers",
}  # fmt: skip
# How long a host's other ranks leave it to the first to say what is wrong; its launcher then ends them.
LATER_SECONDS = 3.0
MOST_HOURS = 100_000  # that ranks wait: eleven years, which sockets' milliseconds take
MOST = 2**62  # of a whole number: what sizes are made of fits into 64 bits


def after_the_first() -> None:
    """What is wrong with the arguments is wrong on all ranks; one message is enough."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(LATER_SECONDS)


def in_words(error: Exception) -> str:
    """An error's text; for a module that is missing, what to install."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in EXTRAS:
        return str(error)
    return (
        f"{name} is needed and not installed: pip install 'leetdist[{EXTRAS[name]}]' (in a clone '.[{EXTRAS[name]}]')"
    )


def command(*arguments: object) -> str:
    """What a person types to get this leetdist: its name where the shell finds it, else this Python and the module; and
    the arguments, as the shell reads them."""
    python = Path(sys.executable)
    found = shutil.which("leetdist")
    if found is not None and Path(found).parent == python.parent:
        return shlex.join(["leetdist", *map(str, arguments)])
    with contextlib.suppress(ValueError):
        python = python.relative_to(Path.cwd())
    return shlex.join([str(python), "-m", "leetdist.launch", *map(str, arguments)])


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The texts around the options as they are, and each option's default where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Arguments(argparse.ArgumentParser):
    """A parser whose complaints, one line each, and whose help come from one rank of a host."""

    def __init__(self, name: str, description: str, examples: str) -> None:
        paragraphs = [textwrap.fill(" ".join(part.split()), 110) for part in description.split("\n\n")]
        super().__init__(
            f"leetdist {name}",
            description="\n\n".join(paragraphs),
            epilog="\n".join(["examples:", *(f"  {line.strip()}" for line in examples.strip().splitlines())]),
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        after_the_first()
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists all options)\n")

    def print_help(self, file: Any = None) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(self.format_help(), end="", file=file, flush=True)  # argparse passes over a reader that is gone


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """An argument's type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            number = int(text.replace("_", "").replace(",", ""))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        if number > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return number

    return parse


_seed = whole(0, 2**32 - 1)  # numpy's, the narrowest of those that are set


def number(text: str) -> float:
    """An argument's type: a finite number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def positive(text: str) -> float:
    """An argument's type: a finite number that is more than 0."""
    value = number(text)
    if not value:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text!r}")
    return value


def hours(text: str) -> float:
    """An argument's type: hours that processes can wait."""
    value = positive(text)
    if value > MOST_HOURS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_HOURS:,}, got {text!r}")
    return value


def device(text: str) -> str:
    """An argument's type: auto, cpu, cuda or cuda:N; whether there is one is asked later."""
    kind, _, index = text.partition(":")
    if text not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def _ranks(parser: Any, about: str = "start this many processes") -> None:
    parser.add_argument("--ranks", dest="processes", type=whole(1), metavar="P", help=about)


def _device(parser: Arguments) -> None:
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N")


def _json(parser: Arguments) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def verify() -> Arguments:
    parser = Arguments(
        "verify",
        """Is the operator on P ranks equal to one device, bit for bit, forward and backward?

        Goes through a table of shapes, dtypes and decays, computes each on the ranks and on one device, and compares
        outputs, states and gradients with torch.equal. Exit code 1 where anything differs.""",
        """
        leetdist verify                                          4 virtual ranks, threads of this process
        leetdist verify --ranks 4                                4 processes: gloo on a CPU, NCCL on GPUs
        torchrun --nproc-per-node 4 -m leetdist.launch verify    the same, by torchrun
        """,
    )
    _device(parser)
    where = parser.add_mutually_exclusive_group()
    _ranks(where)
    where.add_argument(
        "--virtual", type=whole(1), metavar="P", help="virtual ranks in this process (4 without --ranks)"
    )
    parser.add_argument(
        "--decode", action="store_true",
        help="instead: one call's outputs on the ranks against prefill in pieces, decoding and drafts, token by token",
    )  # fmt: skip
    parser.add_argument("--long", type=whole(1), metavar="N", help="add a case of N tokens, 8 heads, 128 x 128, bf16")
    parser.add_argument("--seed", type=_seed, default=0, help="of the random inputs")
    _json(parser)
    return parser


def plan() -> Arguments:
    parser = Arguments(
        "plan",
        """What a sharded call will cost on P ranks, before anybody buys them.

        Predicts time on the GPUs, exposed communication, bytes on the wire and memory a rank, prints a table, and draws
        strong and weak scaling beside LASP's, LASP-2's and ZeCO's formulas. The constants are H200s' as measured, or
        measured here (--measure), or given (--set).""",
        """
        leetdist plan --ranks 64 --tokens 4194304
        leetdist plan --ranks 1024 --tokens 16777216 --slopes --plot plan.png
        leetdist plan --ranks 8 --tokens 1048576 --set hop=2e-5 link=4e10 --json
        """,
    )
    add = parser.add_argument
    add("--ranks", type=whole(1, 65536), required=True, help="the largest number of ranks")
    add("--tokens", type=whole(1), required=True, help="of the whole sequence")
    add("--heads", type=whole(1), default=32, help="of q")
    add("--dim", type=whole(1), default=128, help="numbers in a head")
    add("--batch", type=whole(1), default=1, help="sequences")
    add("--layers", type=whole(1), default=1, help="times, bytes and memory are for so many layers")
    add("--bytes", type=whole(1), default=2, help="of an element of q")
    add("--slopes", action="store_true", help="decays of Lightning Attention instead of none")
    add("--measure", action="store_true", help="measure the kernels on this machine first")
    add("--set", nargs="*", default=[], metavar="NAME=VALUE", help="constants of the machine")
    add("--plot", type=Path, metavar="FILE", help="draw strong and weak scaling into this file")
    _json(parser)
    return parser


def doctor() -> Arguments:
    parser = Arguments(
        "doctor",
        """What this machine has, and what will run on it for a few typical calls.

        For each call: the kernels by name, version and configuration; for each faster one, why not; and what to install
        for it. On a GPU the kernels are compiled first, as a call would.""",
        """
        leetdist doctor
        leetdist doctor --device cpu --json
        """,
    )
    _device(parser)
    _json(parser)
    return parser


def bench() -> Arguments:
    parser = Arguments(
        "bench",
        """How fast is the operator here?

        Forward, forward and backward, and a step of decoding, beside the time in which this machine copies what must be
        read and written. Every result is compared with fp64 first; none that is wrong is timed. (The comparisons with
        other libraries are in the repository: benchmarks/run.py.)""",
        """
        leetdist bench
        leetdist bench --tokens 131072 --heads 32 --dim 128 --dtype bf16 --json
        """,
    )
    _device(parser)
    add = parser.add_argument
    add("--tokens", type=whole(1), help="of the sequence (131072 on a GPU, 8192 on a CPU)")
    add("--heads", type=whole(1), help="32 on a GPU, 4 on a CPU")
    add("--dim", type=whole(1), help="numbers in a head (128 on a GPU, 64 on a CPU)")
    add("--batch", type=whole(1), default=1, help="sequences")
    add("--dtype", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    add("--repeat", type=whole(3), default=15, help="timed calls of each kind; their median counts")
    _json(parser)
    return parser


def demo() -> Arguments:
    parser = Arguments(
        "demo",
        """Train a small byte-level language model on one text that is sharded over several processes, compare the
        trained model's attention with one device bit for bit, and let it go on.

        It memorises, it does not learn to write: that takes more text, and hours. `leetdist generate` goes on from what
        is kept in --out.""",
        """
        bash launch/demo.sh                              makes an environment first
        leetdist demo --ranks 2 --steps 200
        leetdist demo --tokens 1048576 --device cuda --model 10m
        """,
    )
    add = parser.add_argument
    _ranks(parser, "processes that share the text (4; with one GPU 2, with more one a GPU)")
    add("--tokens", type=whole(1), default=8192, help="bytes of text, over all ranks")
    add("--text", default=sysconfig.get_path("stdlib"), help="file or folder")
    add("--steps", type=whole(0), default=150, help="optimiser steps, all on the one text")
    add("--new", type=whole(1), default=160, help="bytes to generate")
    _device(parser)
    add("--dtype", choices=DTYPES[:2], default="fp32", help="of the model's products")
    add("--operator", choices=OPERATORS, default="lightning", help="what mixes tokens")
    add("--model", choices=PRESETS, default="mini", help="mini (0.3M parameters), tiny (0.9M), 10m or 100m")
    add("--out", type=Path, default=Path("runs/demo"), help="folder of the trained model")
    return parser


def generate() -> Arguments:
    parser = Arguments(
        "generate",
        """Continue a text: the prompt over all ranks, then token by token. Prints the text as it comes, then the
        figures.

        The model is a checkpoint of `leetdist train` or `leetdist demo`, or a Hugging Face folder. The ranks share the
        prompt: each computes its shard of every piece, and all end with the state of the whole. The first goes on
        alone; with --everywhere all do, each with a draw of its own. Memory does not grow with the prompt (but for the
        softmax layers of a Hugging Face model).""",
        """
        leetdist generate --model runs/demo --prompt "import "
        leetdist generate --ranks 4 --model runs/train --prompt-file book.txt --save-state book.state
        leetdist generate --model runs/train --load-state book.state --prompt "Chapter 2" --temperature 0.8
        accelerate launch --multi_gpu --num_processes 4 -m leetdist.launch generate --model FOLDER --prompt-file F
        """,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="a checkpoint of leetdist train or demo, or of Hugging Face")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="the text to continue (a line break)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file with the text to continue")
    _ranks(parser, "start this many processes, which share the prompt")
    add("--tokens", type=whole(1), default=200, help="how many to produce")
    add("--temperature", type=number, default=0.0, help="of the draw; 0 takes the likeliest token")
    add("--top-k", type=whole(0), default=0, help="draw from the k likeliest tokens only; 0: from all")
    add("--seed", type=_seed, default=0, help="of the draw")
    add("--everywhere", action="store_true", help="every rank goes on from the prompt, with a draw of its own")
    add("--save-state", metavar="FILE", help="keep the state after the prompt in this file")
    add("--load-state", metavar="FILE", help="go on from a state kept with --save-state, before the prompt")
    add("--piece", type=whole(1), default=65_536, help="tokens a rank takes in at a time")
    add("--tokenizer", help="of a checkpoint that was trained with one; else tokens are bytes")
    add("--trust", nargs="+", default=[], metavar="NAME", help="let the checkpoint unpickle this: module.name ...")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    _device(parser)
    add("--timeout-hours", type=hours, default=24.0, help="how long ranks wait for each other")
    _json(parser)
    return parser


def train() -> Arguments:
    parser = Arguments(
        "train",
        """Train a language model on sequences that no single GPU holds; under torchrun, accelerate or deepspeed, or
        by --ranks. The script to copy is launch/train.py.""",
        """
        leetdist train --text book.txt
        leetdist train --ranks 2 --text books/ --tokens 32768 --steps 100
        torchrun --nproc-per-node 8 -m leetdist.launch.train --text books/ --sequence-parallel 4 --tokens 1048576 --fsdp
        accelerate launch --config_file launch/configs/fsdp2.yaml launch/train.py --text books/ --sequence-parallel 4
        deepspeed --num_gpus 8 launch/train.py --deepspeed-config launch/configs/zero3.json --text books/
        """,
    )
    add = parser.add_argument
    add("--text", default=sysconfig.get_path("stdlib"), help="file, folder, or a data set's name")
    add("--tokenizer", help="name or folder of a transformers tokenizer; else tokens are bytes")
    add("--model", default="tiny", help=f"{', '.join(PRESETS)}, or a transformers model's name or folder")
    _ranks(parser)
    add("--tokens", type=whole(1), default=8192, help="in a sequence, over all its ranks")
    add("--batch", type=whole(1), help="sequences a step, over all ranks (one for each data-parallel rank)")
    add("--micro-batch", type=whole(1), default=1, help="sequences at once on a data-parallel rank; others add up")
    add("--sequence-parallel", type=whole(0), default=0, metavar="P", help="ranks that share a sequence; 0: all")
    add("--steps", type=whole(1), default=200, help="optimiser steps")
    add("--seconds", type=number, help="stop, and save, after the first step that ends later than this")
    add("--lr", type=number, default=3e-4, help="learning rate after the warm-up")
    add("--warmup", type=whole(0), default=20, help="steps")
    add("--clip", type=number, default=1.0, help="largest norm of the gradient")
    add("--precision", choices=("no", "bf16"), help="the launcher's own setting, else bf16 on GPUs")
    add("--checkpointing", action="store_true", help="recompute activations in the backward")
    add("--compile", action="store_true", help="torch.compile, block by block")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--fsdp", action="store_true", help="FSDP2 without an accelerate config, as under torchrun")
    one("--deepspeed-config", "--deepspeed_config", metavar="FILE", help="JSON; DeepSpeed instead of DDP or FSDP2")
    add("--out", type=Path, default=Path("runs/train"), help="checkpoints, metrics.jsonl and TensorBoard logs")
    add("--save-every", type=whole(-1), default=100, help="steps; 0 saves at the end only, -1 never")
    add("--resume", action="store_true", help="go on from the newest whole checkpoint in --out, if there is one")
    add("--changed", nargs="+", default=[], metavar="OPTION", help="resume although these options are others: text ...")
    add("--trust", nargs="+", default=[], metavar="NAME", help="let the checkpoint unpickle this: module.name ...")
    add("--seed", type=_seed, default=0, help="of the model and of the order of the text")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # of the deepspeed launcher
    return parser


class Command(NamedTuple):
    about: str
    parser: Callable[[], Arguments]


COMMANDS = {
    "verify": Command("is the operator on these ranks equal to one device, bit for bit?", verify),
    "doctor": Command("what has this machine, what will run on it, and what to install for the faster", doctor),
    "bench": Command("how fast is the operator here, beside a copy of what it reads and writes", bench),
    "plan": Command("what will a sharded call cost on P ranks: time, bytes, memory; with a plot", plan),
    "demo": Command("train and run a small language model over one sharded text", demo),
    "train": Command("train on long sharded sequences, under torchrun, accelerate or deepspeed", train),
    "generate": Command("continue a text: prompt over all ranks, then token by token", generate),
}

__all__ = ["COMMANDS", "PRESETS", "Arguments", "after_the_first", "command", "in_words"]
