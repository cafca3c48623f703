"""Numbers of a run: summed over microbatches and processes, then one line each in metrics.jsonl.

The file is append-only and has one continuous token axis: a resumed run first cuts off the lines
written after the step it resumes from, because those steps are made again.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import (
    GeneralTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)
from accelerate.utils import gather_object
from torch import Tensor

from align.ledger import ledger_line
from align.losses.types import Loss

Tracker = Literal["tensorboard", "wandb", "trackio"]


def read(scalars: Sequence[Tensor]) -> list[float]:
    """Numbers of one device on the host, in one wait for all of them."""
    return torch.stack([x.detach().double() for x in scalars]).tolist() if scalars else []


class Meter:
    """Sums of what the losses measured since the last line.

    Example:
        >>> meter = Meter()
        >>> meter.add_value("reward", 1.0)
        >>> meter.add_value("reward", 0.0)
        >>> meter.means(Accelerator(cpu=True))
        {'reward': 0.5}
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        self.maxima: dict[str, float] = {}
        self.ledger: list[float] = []
        # Tensors wait on their device until a line is due: reading one is a wait for the device.
        self.pending: list[Loss] = []

    def add(self, loss: Loss) -> None:
        """Adds one microbatch's metrics and maxima."""
        self.pending.append(replace(loss, sum=loss.sum.detach(), aux=None))

    def add_value(self, name: str, value: float) -> None:
        """Adds one number that counts once."""
        self._add(name, value, 1.0)

    def _add(self, name: str, total: float, count: float) -> None:
        old_total, old_count = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (old_total + total, old_count + count)

    def _settle(self) -> None:
        told = read(
            [x for loss in self.pending for pair in loss.metrics.values() for x in pair]
            + [x for loss in self.pending for x in loss.maxima.values()]
            + [x for loss in self.pending if loss.ledger is not None for x in loss.ledger]
        )
        values = iter(told)
        for loss in self.pending:
            for name in loss.metrics:
                self._add(name, next(values), next(values))
        for loss in self.pending:
            for name in loss.maxima:
                self.maxima[name] = max(self.maxima.get(name, -math.inf), next(values))
        for loss in self.pending:
            if loss.ledger is not None:
                self._add_ledger([next(values) for _ in loss.ledger])
        self.pending = []

    def _add_ledger(self, entries: Sequence[float]) -> None:
        old = self.ledger or [0.0] * len(entries)
        self.ledger = [a + b for a, b in zip(old, entries, strict=True)]

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean and maximum of each name over all processes; a name nobody counted is absent."""
        together = self._together(accelerator)
        means = {name: total / count for name, (total, count) in together.sums.items() if count}
        return means | together.maxima | ledger_line(together.ledger)

    def _together(self, accelerator: Accelerator) -> Meter:
        """The sums of all processes, on each of them."""
        self._settle()
        mine = [(self.sums, self.maxima, self.ledger)]
        shares = gather_object(mine) if accelerator.num_processes > 1 else mine
        together = Meter()
        for sums, maxima, ledger in shares:
            if ledger:
                together._add_ledger(ledger)
            for name, (total, count) in sums.items():
                together._add(name, total, count)
            for name, value in maxima.items():
                together.maxima[name] = max(together.maxima.get(name, -math.inf), value)
        return together

    def state_dict(self, accelerator: Accelerator) -> dict[str, Any]:
        """The sums of all processes; for one of them to load."""
        together = self._together(accelerator)
        return {
            "sums": together.sums,
            "maxima": together.maxima,
            "ledger": together.ledger,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {name: (total, count) for name, (total, count) in state["sums"].items()}
        self.maxima = dict(state["maxima"])
        self.ledger = list(state["ledger"])


def cut_after(path: Path, step: int) -> None:
    """Drops the lines of steps after `step`, and a last line torn by a crash.

    Raises:
        ValueError: if a line before the last is not a JSON object with a step.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            line_step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f'{path}:{number}: no line of metrics ({line[:60]!r}), expected {{"step": ...}}; '
                "move the file aside to start a new one"
            ) from error
        if line_step <= step:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _tracker(name: Tracker, run_name: str, folder: Path) -> GeneralTracker:
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"report_to: {name} is not installed; pip install {name} or leave it out")
    makers = {
        "tensorboard": lambda: TensorBoardTracker(run_name, folder / "tensorboard"),
        "wandb": lambda: WandBTracker(run_name),
        "trackio": lambda: TrackioTracker(run_name),
    }
    return makers[name]()


class MetricsWriter:
    """Appends lines to folder/metrics.jsonl and feeds trackers; only the main process writes.

    Args:
        folder: of the stage.
        report_to: trackers to feed besides.

    Raises:
        ValueError: if a tracker is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        accelerator: Accelerator,
        run_name: str,
        report_to: Sequence[Tracker] = (),
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.is_main = accelerator.is_main_process
        self.trackers = [_tracker(name, run_name, folder) for name in report_to]
        self.started: list[GeneralTracker] = []

    def open(self, *, resumed_step: int = 0) -> None:
        """Starts the trackers and cuts off what was written after the resumed step.

        Raises:
            ValueError: if the old file is broken.
        """
        if self.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_after(self.path, resumed_step)
        for tracker in self.trackers:
            tracker.start()
            self.started.append(tracker)

    def write(self, values: Mapping[str, float]) -> None:
        """One line; `values` holds at least step and tokens.

        A value that is not finite is written as null, which every JSON reader takes.
        """
        if not self.is_main:
            return
        clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        for tracker in self.trackers:
            tracker.log(dict(values), step=int(values["step"]))

    def close(self) -> None:
        for tracker in self.started:
            tracker.finish()
