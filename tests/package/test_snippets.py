"""What README and docs show runs as it stands, and what they list is what the code has.

Python blocks of a page run one after the other in one process, as a reader would paste them; `pycon` blocks are
doctests there. A line of HTML before a block says what else to do with it:

    <!-- ranks: 2 -->     the Python block is a file of its own, which 2 processes run, as torchrun would start them
    <!-- runnable -->     the bash block runs, in a folder that has the files of the repository
"""

from __future__ import annotations

import ast
import doctest
import functools
import io
import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import leetdist
from helpers import FRAMEWORKS, free_port, serve
from leetdist.launch.commands import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))]
BLOCK = re.compile(
    r"^(?P<indent>[ ]*)(?:<!-- (?P<mark>[^\n]*?) -->\n[ ]*)?"
    r"```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)
SECONDS = 120


class Block(NamedTuple):
    page: str
    line: int
    language: str
    mark: str
    code: str

    @property
    def source(self) -> str:
        """With as many empty lines before it as the page has, so that a traceback names the page's line."""
        return "\n" * self.line + self.code


@functools.cache
def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(page, line, match["language"], match["mark"] or "", textwrap.dedent(match["code"])))
    return found


def ranks_of(block: Block) -> int:
    return int(found[1]) if (found := re.fullmatch(r"ranks: (\d+)", block.mark)) else 0


def marked(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language in languages and block.mark]


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language in ("python", "pycon") for b in blocks(p))])
def test_python_blocks_of_a_page_run(page: str, tmp_path: Path) -> None:
    mine = [block for block in blocks(page) if block.language in ("python", "pycon") and not ranks_of(block)]
    run_processes([mine], tmp_path)


@pytest.mark.parametrize("block", [b for b in marked("python") if ranks_of(b)], ids=lambda b: f"{b.page}:{b.line}")
def test_python_blocks_for_ranks_run(block: Block, tmp_path: Path) -> None:
    run_processes([[block]] * ranks_of(block), tmp_path)


@pytest.mark.parametrize("path", sorted((DOCS / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_run_on_ranks(path: Path, tmp_path: Path) -> None:
    run_processes([[Block(str(path.relative_to(ROOT)), 0, "python", "", path.read_text())]] * 2, tmp_path)


@pytest.mark.parametrize(
    "block", [b for b in marked("bash") if b.mark == "runnable"], ids=lambda b: f"{b.page}:{b.line}"
)
def test_runnable_bash_blocks_run(block: Block, tmp_path: Path) -> None:
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    command = tmp_path / ".bin" / "leetdist"  # as an installation makes it, but of this tree
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m leetdist.launch "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_quick_start_installs_what_commands_and_tutorials_import() -> None:
    (line,) = (line for line in (DOCS / "quickstart.md").read_text().splitlines() if "the tutorials use" in line)
    sources = [path.read_text() for path in (ROOT / "launch").glob("*.py")]
    sources += [
        block.code for page in PAGES if "tutorials/" in page for block in blocks(page) if block.language == "python"
    ]
    modules = {
        name.partition(".")[0]
        for source in sources
        for node in ast.parse(source).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([x.name for x in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    wanted = {EXTRAS[module] for module in modules & EXTRAS.keys()}
    assert {"accelerate", "transformers"} <= wanted <= set(re.findall(r"\w+", line))


@pytest.mark.parametrize(("language", "code"), [("python", "assert 1 == 2"), ("pycon", ">>> 1\n2\n")])
def test_a_block_that_fails_is_told(language: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"here\.md"):
        run_processes([[Block("here.md", 7, language, "", code)]], tmp_path)


def test_marks_are_known() -> None:
    """A mark with a slip of the pen would leave its block unrun, and so would an example that is in no block."""
    for page in PAGES:
        assert ">>> " not in BLOCK.sub("", (ROOT / page).read_text()), page
        for block in blocks(page):
            known = block.mark in ("", "runnable") or ranks_of(block)
            assert known, f"{page}:{block.line}: {block.mark}"
            assert block.language in ("python", "pycon", "bash", "text", "yaml"), f"{page}:{block.line}"


def run_processes(programs: list[list[Block]], folder: Path) -> None:
    """Each list of blocks in a process of its own, all at once; they are ranks of one job where there are several."""
    context = multiprocessing.get_context("forkserver")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read where it is imported
    serve(FRAMEWORKS)  # as other tests do: whoever is first pays for the imports
    port = free_port()
    running = []
    for rank, program in enumerate(programs):
        environment = {"OMP_NUM_THREADS": "1"}
        if len(programs) > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(programs))}
            environment |= {
                "LOCAL_WORLD_SIZE": str(len(programs)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(program, str(folder), environment, there, sys.path))
        process.start()
        there.close()
        running.append((process, here))
    failures = []
    for rank, (process, result) in enumerate(running):
        told = "did not end in time"
        if result.poll(SECONDS):
            try:
                told = result.recv()
            except EOFError:
                told = "ended without a word"
        process.join(SECONDS if not told else 5)
        if process.is_alive():
            process.kill()
        if told:
            failures.append(f"rank {rank}: {told}")
    assert not failures, "\n".join(failures)


def _run(program: list[Block], folder: str, environment: dict[str, str], result: Connection, path: list[str]) -> None:
    """In the process: what went wrong, in words, or "" for nothing."""
    os.environ |= environment
    os.chdir(folder)
    sys.path[:] = path
    sys.stdin = io.StringIO()
    torch.manual_seed(int(environment.get("RANK", 0)))  # torchrun's ranks do not draw alike
    names: dict[str, Any] = {"__name__": "__main__"}
    told = ""
    for block in program:
        try:
            if block.language == "python":
                exec(compile(block.source, str(ROOT / block.page), "exec"), names)
            else:
                told = _doctest(block, names)
        except BaseException:
            told = f"{block.page}, the block at line {block.line}:\n{traceback.format_exc()}"
        if told:
            break
    if torch.distributed.is_initialized() and not told:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    result.send(told)
    result.close()


def _doctest(block: Block, names: dict[str, Any]) -> str:
    examples = doctest.DocTestParser().get_doctest(block.code, names, block.page, block.page, block.line)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(examples, out=report.append, clear_globs=False)
    names.update(examples.globs)
    return "".join(report)


def test_pins_agree() -> None:
    """The docs extra pins what builds the documentation, as tests/requirements.txt does."""
    (extra,) = re.findall(r"^docs = \[(.*?)^\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    pins = re.findall(r'"([\w-]+==[^";]+)', extra)
    assert len(pins) == 3
    assert set(pins) <= set((ROOT / "tests" / "requirements.txt").read_text().splitlines())


def test_reference_has_every_public_name() -> None:
    listed = {line.split(".")[-1] for line in (DOCS / "api.md").read_text().splitlines() if line.startswith(":::")}
    public = {name for name in leetdist.__all__ if name != "nn"} | {*leetdist.nn.__all__} - {"LADDERS"}
    assert public <= listed, f"docs/api.md lacks {sorted(public - listed)}"


def source_files() -> Iterator[Path]:
    for folder in ("leetdist", "kernels", "launch", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            below = path.relative_to(ROOT).parts
            if path.suffix in (".py", ".sh") and not path.is_dir() and below[:2] not in LINKS:
                yield path


LINKS = {("leetdist", "kernels"), ("leetdist", "launch")}


def test_table_of_environment_variables_is_whole() -> None:
    """Every variable of ours that a source file reads has a row, and every row a file that reads it."""
    rows = set(re.findall(r"^\| `(LEETDIST_\w+)", (DOCS / "environment.md").read_text(), re.MULTILINE))
    read = set()
    for path in source_files():
        if path != Path(__file__):
            read |= set(re.findall(r"\bLEETDIST_[A-Z_]+\b", path.read_text()))
    assert rows == read


def messages() -> str:
    """The constant words of every error that is raised, whatever is put in between being `…`."""
    found = []
    for path in source_files():
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] not in ("tests", "benchmarks"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(re.sub(r"\s+", " ", text) for text in found)


def test_troubleshooting_quotes_what_the_code_says() -> None:
    """Each quoted message is one that the source has, `…` standing for what is put in."""
    source = messages()
    quoted = re.findall(r"^\| `([^`]+)`(?: \(a warning\))? \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    unknown = [words for words in quoted if words not in source]
    assert not unknown, "no error has these words: " + "; ".join(unknown)
