"""Power: what nvidia-smi prints is read, and a row says what a call draws."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

SMI = """#!/bin/sh
# nvidia-smi's place: {line} every 50 ms, until somebody ends it
echo "$@" > {asked}
while true; do echo "{line}"; sleep 0.05; done
"""


@pytest.fixture
def power(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("power")


@pytest.fixture
def smi(power: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """A program in nvidia-smi's place, which says a line again and again; where it writes how it was asked."""

    def says(line: str) -> Path:
        program, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
        program.write_text(SMI.format(line=line, asked=asked))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"of-{number}"))
        monkeypatch.setattr(power, "SETTLE", 0.05)
        return asked

    return says


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1385, 692.10, 0x0000000000000004", (1385, 692.1, True)),
        ("1980, 463.00, 0x0000000000000000", (1980, 463, False)),
        ("345, 75.9, 0x0000000000000001", (345, 75.9, False)),  # idle: no reason of power
        ("1100, 700.2, 0x0000000000000024", (1100, 700.2, True)),  # heat as well
        ("1385, [N/A], 0x0000000000000004", None),
        ("", None),
    ],
)
def test_a_line_is_read(power: ModuleType, line: str, expected: tuple[float, float, bool] | None) -> None:
    assert power.sample(line) == (expected and power.Sample(*expected))


def test_a_row_is_the_time_and_energy_of_a_call(
    power: ModuleType, smi: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, calls = smi("1400, 600.0, 0x4"), 0

    def milliseconds(call: Callable[[], object], repeats: int, *, warm: int) -> list[float]:
        nonlocal calls
        calls += 1
        time.sleep(0.01)
        return [2.0 if calls == 1 else 3.0] * repeats

    monkeypatch.setattr(power, "milliseconds", milliseconds)
    told = power.row("plain", "forward", lambda: None, 0.5)
    assert told == {
        "case": "plain",
        "which": "forward",
        "mhz": 1400,
        "watts": 600,
        "capped": 1,
        "rested_ms": 2,
        "ms": 3,
        "joules": pytest.approx(1.8),
    }
    assert "-i GPU-of-3 " in asked.read_text()
    assert "1400 MHz  600 W, held by power 100 %;   2.000 ms rested,   3.000 under load, 1.80 J" in power.words(told)


def test_a_gpu_that_does_not_tell_is_an_error(power: ModuleType, smi: Callable[[str], Path]) -> None:
    smi("1385, [N/A], 0x0")
    with pytest.raises(RuntimeError, match=r"nvidia-smi gave 0 samples of clocks.sm,power.draw.*1385, \[N/A\]"):
        power.row("nothing", "", None, 0.3)
