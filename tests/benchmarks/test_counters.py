"""Counters: what Nsight Compute prints is read, and a row whose process fails or hangs is a line, not the end."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A program in the place of ncu, which writes what it is given as its log.
NCU = """#!{python}
import sys, time
log = sys.argv[sys.argv.index("--log-file") + 1]
open(log, "w").write({log!r})
print({said!r})
time.sleep({seconds})
"""


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("counters")


def printed(counters: ModuleType, rows: list[dict[str, str]]) -> str:
    """As ncu --csv --page raw writes rows: messages, names, units, and numbers in quotes."""
    named = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Block Size", "Grid Size"]
    named += [*counters.COUNTS.values(), *counters.PERCENT.values(), *counters.LIMITS]
    named += map(counters.STALL.format, counters.STALLS)
    lines = [named, [""] * len(named)] + [
        [str(number), "17", "python", "127.0.0.1", *(row.get(name, "0") for name in named[4:])]
        for number, row in enumerate(rows)
    ]
    quoted = [",".join(f'"{cell}"' for cell in line) for line in lines]
    return "\n".join(["==PROF== Connected to process 17", *quoted, "==PROF== Disconnected from process 17", ""])


def example(counters: ModuleType) -> str:
    ours = {
        "Kernel Name": "tile_outputs",
        "Block Size": "(128, 1, 1)",
        "Grid Size": "(1024, 1, 1)",
        counters.COUNTS["ns"]: "1,080,123",
        counters.COUNTS["hz"]: "1570000000.5",
        counters.COUNTS["read"]: "3,221,225,472",
        counters.COUNTS["written"]: "1073741824",
        counters.COUNTS["registers"]: "254",
        counters.PERCENT["tensor"]: "59.60",
        counters.PERCENT["xu"]: "n/a",
        **dict(zip(counters.LIMITS, ("32", "2", "3", "16"), strict=True)),
        counters.STALL.format("gmma"): "1.11",
        counters.STALL.format("wait"): "1.20",
    }
    torchs = {"Kernel Name": "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)"}
    return printed(counters, [ours, torchs])


def test_what_ncu_prints_is_read(counters: ModuleType) -> None:
    ours, torchs = counters.kernels(example(counters))
    assert torchs["kernel"] == "vectorized_elementwise_kernel"
    assert (ours["kernel"], ours["ns"], ours["tensor"], ours["xu"]) == ("tile_outputs", 1.080e6, 59.6, None)
    assert ours["blocks"] == 2
    assert ours["stalls"] == {"gmma": 1.11, "wait": 1.2}
    line = counters.words(ours)
    assert "1080 us 1.57 GHz  4.29 GB" in line
    assert "tensor 60 dram  0" in line
    assert "xu  ?" in line
    assert line.endswith("254 registers, 2 x 128 threads; wait 1.2, gmma 1.1")
    assert counters.kernels("==ERROR== no kernels were profiled") == []


@pytest.mark.parametrize(
    ("log", "seconds", "note"),
    [
        (None, 0, None),
        ("==ERROR== Failed to initialize the profiler\n==WARNING== No kernels were profiled\n", 0, "==ERROR== Failed"),
        ("", 0, "as it is"),
        ("", 60, "not done after 1 s"),
    ],
)
def test_a_row_that_fails_is_a_line(
    counters: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str | None, seconds: int, note: str
) -> None:
    program = tmp_path / "bin" / "ncu"
    program.parent.mkdir()
    written = example(counters) if log is None else log
    program.write_text(NCU.format(python=sys.executable, log=written, said="as it is", seconds=seconds))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    found = counters.ended(counters.begun(3, tmp_path), 3, tmp_path, 1.0 if seconds else 30.0)
    if log is None:
        assert [kernel["kernel"] for kernel in found] == ["tile_outputs", "vectorized_elementwise_kernel"]
    else:
        assert found.startswith(note)


def test_rows_are_those_of_the_map(counters: ModuleType) -> None:
    """But for Mamba-2's, which are of the suite of a decay a token, and for fp32's, which are shorter here."""
    named = {case.name for case in importlib.import_module("suites.map").SUITE[1]}
    assert {case.name for case in counters.FP32} <= named
    shorter = [replace(case, tokens=32768).name for case in counters.FP32]
    assert [case.name for case in counters.ROWS if case.name not in named] == [counters.MAMBA.name, *shorter]
