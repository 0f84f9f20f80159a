"""What a run shows and writes down: a progress bar or lines, metrics.jsonl, and accelerate's trackers."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Bar:
    """rich's progress bar, on a terminal and where rich is installed; elsewhere nothing."""

    def __init__(self, total: int, done: int = 0, *, wanted: bool = True) -> None:
        self._bar: Any = None
        if not wanted or not sys.stdout.isatty():
            return
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Rich
        except ImportError:
            return
        self._bar = Rich(MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[line]}"))
        self._bar.add_task("", total=total, completed=done, line="")
        self._bar.start()

    @property
    def shown(self) -> bool:
        return self._bar is not None

    def update(self, done: int, line: str = "") -> None:
        if self._bar is not None:
            self._bar.update(0, completed=done, line=line)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Progress:
    """Counts the steps; the first rank shows and logs loss, gradient norm, tokens/s and memory of each."""

    def __init__(self, options: Namespace, accelerator: Any) -> None:
        self.options, self.accelerator = options, accelerator
        self.step = 0
        self.first: bool = accelerator.is_main_process
        self.file: Path = options.out / "metrics.jsonl"
        self.bar = Bar(0, wanted=False)
        self.then = 0.0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def begin(self, headline: str) -> None:
        if self.first:
            print(headline, flush=True)
            self.options.out.mkdir(parents=True, exist_ok=True)
            old = self.file.read_text(errors="replace").splitlines() if self.file.exists() else []
            steps = [_step_of(line) for line in old]
            if None in steps:
                print(
                    f"{self.file}: {steps.count(None)} of its lines are cut short or damaged, and left out", flush=True
                )
            # A resumed run writes again what came after its checkpoint.
            kept = [
                line + "\n" for line, step in zip(old, steps, strict=True) if step is not None and step <= self.step
            ]
            new = self.file.with_suffix(".part")
            new.write_text("".join(kept))
            os.replace(new, self.file)
            self.bar = Bar(self.options.steps, self.step)
        if self.accelerator.log_with:
            plain = {k: v for k, v in vars(self.options).items() if isinstance(v, bool | int | float | str)}
            self.accelerator.init_trackers("tensorboard", config=plain)
        self.then = time.perf_counter()

    def advance(self, loss: Tensor, norm: Tensor | float | None) -> None:
        """The end of a step. Waits for the device, so that the time is the step's."""
        values = {"loss": float(loss), "grad_norm": float(norm or 0.0)}
        now = time.perf_counter()
        values["tokens_per_s"] = self.options.batch * self.options.tokens / (now - self.then)
        values["memory_gib"] = memory_gib(self.accelerator.device)
        self.then = now
        self.step += 1
        if not math.isfinite(values["loss"]):
            raise RuntimeError(f"the loss of step {self.step} is {values['loss']}; gradient norm {values['grad_norm']}")
        self.accelerator.log(values, step=self.step)
        if not self.first:
            return
        with self.file.open("a") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
        line = (
            f"loss {values['loss']:.4f}  grad norm {values['grad_norm']:.3f}  "
            f"{values['tokens_per_s']:,.0f} tokens/s  {values['memory_gib']:.1f} GiB"
        )
        if self.bar.shown:
            self.bar.update(self.step, line)
        elif self.step % max(1, self.options.steps // 20) == 0 or self.step == 1:
            print(f"step {self.step:>6}  {line}", flush=True)

    def end(self) -> None:
        self.bar.stop()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _step_of(line: str) -> int | None:
    """The step that a line is of; None for one that is cut short, as by a full disk or a kill."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def memory_gib(device: torch.device) -> float:
    """The most that this process has held so far: of the GPU's memory, or of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
