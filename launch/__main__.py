"""`leetdist NAME ...`, or `python -m leetdist.launch NAME ...`, also under torchrun: calls that module's `main`."""

from __future__ import annotations

import difflib
import importlib
import os
import select
import sys

import leetdist
from leetdist.launch.commands import COMMANDS, after_the_first, in_words
from leetdist.launch.ranks import is_launched, start
from leetdist.launch.runtime import check_environment, one_message


def usage() -> str:
    lines = [f"  {name:<10} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"leetdist {leetdist.__version__}: exponentially decaying causal linear attention over sharded sequences",
            "\nusage: leetdist COMMAND [options]      (python -m leetdist.launch COMMAND does the same)\n",
            *lines,
            "\nleetdist COMMAND --help shows its options, their defaults and examples",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """The exit code of the command that the arguments name; 1, and no traceback, where what reads its output, as `head`
    does, has ended before it."""
    try:
        code = _main(argv)
        print(end="", flush=True)  # also where there is no standard output
    except BrokenPipeError:
        if not _unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        code = 1
    return code


def _unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    end = select.poll()
    end.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in end.poll(0))


def _main(argv: list[str] | None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(usage())
        return 0
    if name == "--version":
        print(f"leetdist {leetdist.__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        after_the_first()
        print(
            f"leetdist: there is no command {name!r}{f', but {near[0]}' if near else ''}; the commands are "
            f"{', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    parser = COMMANDS[name].parser()
    processes = getattr(parser.parse_args(rest), "processes", None)
    with one_message():
        check_environment()
    if processes is not None and not is_launched():
        return start(processes, [name, *rest])
    if processes not in (None, int(os.environ.get("WORLD_SIZE", "1"))):
        parser.error(f"argument --ranks: {processes}, and the launcher started {os.environ['WORLD_SIZE']} processes")
    try:
        result: int = importlib.import_module(f"leetdist.launch.{name}").main(rest)
    except ModuleNotFoundError as error:
        if in_words(error) == str(error):  # none of ours to install: a fault
            raise
        after_the_first()
        raise SystemExit(f"leetdist {name}: {in_words(error)}") from None
    return result


if __name__ == "__main__":
    sys.exit(main())
