from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from align import metrics
from align.losses.types import Loss
from align.metrics import Meter, MetricsWriter, cut_after


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def writer(folder: Path, accelerator: Accelerator, resumed_step: int = 0) -> MetricsWriter:
    made = MetricsWriter(folder, accelerator=accelerator, run_name="stage")
    made.open(resumed_step=resumed_step)
    return made


def test_means_divide_once_and_maxima_are_kept(accelerator: Accelerator) -> None:
    meter = Meter()
    for total, count, largest in ((2.0, 4.0, 1.5), (6.0, 1.0, 9.0), (0.0, 3.0, -1.0)):
        one = {"share": (torch.tensor(total), torch.tensor(count))}
        meter.add(Loss(sum=torch.zeros(()), metrics=one, maxima={"top": torch.tensor(largest)}))
    meter.add(Loss(sum=torch.zeros(()), metrics={"none": (torch.zeros(()), torch.zeros(()))}))
    assert meter.means(accelerator) == {"share": 1.0, "top": 9.0}


def test_state_continues_the_sums(accelerator: Accelerator) -> None:
    first, second = Meter(), Meter()
    first.add_value("reward", 1.0)
    second.load_state_dict(first.state_dict(accelerator))
    second.add_value("reward", 2.0)
    assert second.means(accelerator) == {"reward": 1.5}


def test_lines_after_the_resumed_step_are_cut(tmp_path: Path, accelerator: Accelerator) -> None:
    first = writer(tmp_path, accelerator)
    for step in range(1, 5):
        first.write({"step": step, "tokens": 10 * step, "loss": 1.0})
    second = writer(tmp_path, accelerator, resumed_step=2)
    second.write({"step": 3, "tokens": 30, "loss": math.nan})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"]) for line in lines] == [(1, 10), (2, 20), (3, 30)]
    assert lines[-1]["loss"] is None


def test_line_torn_by_a_crash_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    cut_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_broken_line_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: no line of metrics \('nonsense'\)"):
        cut_after(path, 2)


def test_tracker_gets_the_same_numbers(tmp_path: Path, accelerator: Accelerator) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    made = MetricsWriter(
        tmp_path, accelerator=accelerator, run_name="stage", report_to=("tensorboard",)
    )
    made.open()
    made.write({"step": 1, "tokens": 5, "loss": 0.25})
    made.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "stage"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.25)]


def test_missing_tracker_is_named(
    tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to: wandb is not installed; pip install wandb"):
        MetricsWriter(tmp_path, accelerator=accelerator, run_name="stage", report_to=("wandb",))
