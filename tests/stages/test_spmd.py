"""Several processes climb as one: the main one writes, an error reaches all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys
from pathlib import Path
from stages.runner import climb
from tests.stages.fakes import ground, load

home = Path(sys.argv[1])
said = []
here = ground(home, said)
try:
    report = climb(load(home / "r.yaml", *sys.argv[2:]), here)
    text = " ".join(stage.status for stage in report.stages)
except Exception as error:
    text = f"{type(error).__name__}: {error}"
(home / f"told-{here.accelerator.process_index}").write_text(text)
"""


def launch(home: Path, *sets: str) -> list[str]:
    program = home / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
            *(str(program), str(home), *sets),
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [(home / f"told-{rank}").read_text() for rank in (0, 1)]


@pytest.mark.multi
def test_two_processes_climb_as_one_and_an_error_of_the_main_one_ends_both(tmp_path: Path):
    text = """\
name: two
model: {preset: tiny, tokenizer: {data: [{task: arithmetic}]}}
evals: [{name: depth, kind: task}]
stages:
  - {name: sft, kind: quiet, evals: [depth]}
  - {name: dpo, kind: quiet, from: sft}
"""
    (tmp_path / "r.yaml").write_text(text)
    assert launch(tmp_path) == ["fresh fresh", "fresh fresh"]
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [row["after"] for row in report["evals"]] == pytest.approx([1.015, 2.015])
    assert launch(tmp_path) == ["skipped skipped", "skipped skipped"]
    (tmp_path / "run/sft/artifact/manifest.json").write_text("{")
    told = launch(tmp_path)
    assert told[0] == told[1]
    assert told[0].startswith("RuntimeError: ")
    assert "not a manifest" in told[0]
