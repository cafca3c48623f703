from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from align.checkpoint import (
    MARK,
    Progress,
    Trained,
    clean,
    latest,
    load,
    save,
)
from align.optim import OptimConfig, build_optimizer


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def trained(seed: int = 0, *, width: int = 3, steps: int = 0) -> Trained:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width))
    # Frozen, and the same for every seed: a checkpoint does not hold it.
    nn.init.constant_(model[0].bias.requires_grad_(False), 0.5)
    optimizer, scheduler = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.1), 10)
    made = Trained(model, optimizer, scheduler)
    for _ in range(steps):
        update(made)
    return made


def update(made: Trained) -> None:
    made.model(torch.randn(2, 4)).square().sum().backward()
    made.optimizer.step()
    made.optimizer.zero_grad()
    made.scheduler.step()


def write(
    folder: Path, made: Trained, step: int, accelerator: Accelerator, **changes: object
) -> Path:
    progress = Progress(step=step, course={"cursor": 7}, state={"tokens": 5.0})
    given = {"config": '{"lr": 1}', "keep": 2, **changes}
    return save(folder, made, progress, accelerator=accelerator, **given)


def test_continues_bit_for_bit(tmp_path: Path, accelerator: Accelerator) -> None:
    first = trained(steps=3)
    path = write(tmp_path, first, 3, accelerator)
    torch.manual_seed(7)
    for _ in range(3):
        update(first)

    second = trained(seed=1, steps=1)
    progress = load(path, second, config='{"lr": 1}')
    torch.manual_seed(7)
    for _ in range(3):
        update(second)
    assert (progress.step, progress.course, progress.state) == (3, {"cursor": 7}, {"tokens": 5.0})
    for (name, ours), theirs in zip(
        second.model.named_parameters(), first.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()


def test_frozen_weights_are_not_written(tmp_path: Path, accelerator: Accelerator) -> None:
    path = write(tmp_path, trained(), 1, accelerator)
    entries = FileSystemReader(path / "sharded").read_metadata().state_dict_metadata
    named = {name for name in entries if name.startswith("weights.")}
    assert named == {"weights.0.weight", "weights.1.weight", "weights.1.bias"}
    assert json.loads((path / "config.json").read_text()) == {"lr": 1}


def test_newest_are_kept(tmp_path: Path, accelerator: Accelerator) -> None:
    made = trained()
    for step in (2, 4, 10):
        write(tmp_path, made, step, accelerator)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000010"]
    assert latest(tmp_path) == tmp_path / "step-00000010"


def test_half_written_ones_do_not_count_and_are_cleaned(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    assert latest(tmp_path / "nowhere") is None
    made = trained()
    whole = write(tmp_path, made, 2, accelerator)
    torn = write(tmp_path, made, 4, accelerator)
    (torn / MARK).unlink()
    (tmp_path / ".writing-step-00000006").mkdir()
    assert latest(tmp_path) == whole
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == [whole]


def test_full_disk_is_one_line_and_leaves_the_earlier_one(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    earlier = write(tmp_path, trained(), 2, accelerator)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses to write more than 4 KiB to a file: the nearest thing to a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(RuntimeError) as caught:
            write(tmp_path, trained(width=4000), 4, accelerator)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    message = str(caught.value)
    assert "step-00000004: cannot write the checkpoint (earlier one: " in message
    assert "step-00000002, untouched); free disk space and run again: " in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == [earlier]
    load(earlier, trained(), config='{"lr": 1}')


def test_other_config_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    config = '{"lr": 1, "save_every_steps": 5}'
    path = write(tmp_path, trained(), 1, accelerator, config=config)
    with pytest.raises(RuntimeError, match=r"written under another config \(lr 1 -> 2\); put it"):
        load(path, trained(), config='{"lr": 2, "save_every_steps": 9}')


def test_what_processes_share_may_change(tmp_path: Path, accelerator: Accelerator) -> None:
    there = '{"parallel": {"sequence": 2, "expert": 4, "router": "row"}}'
    path = write(tmp_path, trained(), 1, accelerator, config=there)
    load(path, trained(), config='{"parallel": {"sequence": 1, "expert": 1, "router": "row"}}')
    with pytest.raises(RuntimeError, match=r"\(parallel\.router 'row' -> 'global'\)"):
        load(path, trained(), config='{"parallel": {"sequence": 2, "router": "global"}}')


def test_other_weights_are_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    path = write(tmp_path, trained(), 1, accelerator)
    message = r"0\.weight is \(3, 4\) in the checkpoint and \(5, 4\) in the model; move"
    with pytest.raises(RuntimeError, match=message):
        load(path, trained(width=5), config='{"lr": 1}')


def test_another_layout_is_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    path = write(tmp_path, trained(), 1, accelerator)
    (path / MARK).write_text('{"step": 1, "num_processes": 8}')
    with pytest.raises(RuntimeError, match=r"layout 1, expected 2: another version .* move the"):
        load(path, trained(), config='{"lr": 1}')


def test_a_damaged_one_is_one_line(tmp_path: Path, accelerator: Accelerator) -> None:
    path = write(tmp_path, trained(), 1, accelerator)
    next((path / "sharded").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(
        RuntimeError, match=r"cannot be read \(process 0: .*\); move it aside"
    ) as caught:
        load(path, trained(), config='{"lr": 1}')
    assert "\n" not in str(caught.value)


SCRIPT = """
import sys
from pathlib import Path
import torch
from align.loop import TrainConfig, train
from align.optim import OptimConfig
from tests.align import small
from tests.align.test_loop import Course, data

folder = Path(sys.argv[1])
model = small.model()
config = TrainConfig(optim=OptimConfig(lr=1e-2), save_every_steps=3)
train(Course(data(count=200)), model, config=config, job=small.job(folder))
torch.save(model.state_dict(), folder / "final.pt")
"""


@pytest.mark.slow
def test_killed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / name)], cwd=root)

    assert start("whole").wait() == 0
    for kill_at in (7, 20, 33):
        process = start("cut")
        path = tmp_path / "cut" / "metrics.jsonl"
        while process.poll() is None:
            if path.exists() and path.read_text().count("\n") >= kill_at:
                process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start("cut").wait() == 0
    whole, cut = (torch.load(tmp_path / name / "final.pt") for name in ("whole", "cut"))
    for name, weight in whole.items():
        assert torch.equal(weight, cut[name]), name
    counts = [
        [(line["step"], line["tokens"], line["loss"]) for line in map(json.loads, text)]
        for text in (
            (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            for name in ("whole", "cut")
        )
    ]
    assert counts[0] == counts[1]
