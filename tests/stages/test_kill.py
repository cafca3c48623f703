"""A run that is killed in the middle of its stages ends with the same bits as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from align.data.sources import DataConfig, read_rows
from align.data.tokenizer import train_tokenizer
from align.policy import save_policy
from model import HybridForCausalLM, preset
from stages.artifact import Artifact

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("sft", "dpo", "grpo")
RECIPE = """\
name: killed
model: {path: base}
stages:
  - name: sft
    kind: sft
    data: [{task: copy, num_rows: 100, difficulty: [0.0, 0.1]}]
    sequence_tokens: 256
    batch_items: 8
    max_steps: 30
    save_every_steps: 1
  - name: dpo
    kind: dpo
    from: sft
    data: [{task: copy, num_rows: 100, difficulty: [0.0, 0.1]}]
    lora: {rank: 2, dropout: 0.1, targets: attention}
    sequence_tokens: 256
    batch_items: 8
    max_steps: 30
    save_every_steps: 2
  - name: grpo
    kind: grpo
    from: dpo
    data: [{task: constraints, num_rows: 100}]
    sequence_tokens: 256
    prompts_per_step: 4
    group_size: 4
    updates_per_rollout: 2
    max_new_tokens: 8
    max_steps: 30
    save_every_steps: 3
    optim: {lr: 1.0e-3}
"""


def start(home: Path, run: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stages", "run", str(home / "r.yaml"), "--out", str(home / run)],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(home: Path, run: str) -> str:
    process = start(home, run)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def kill_in(home: Path, run: str, stage: str) -> None:
    """Starts the run and kills it once the stage has logged a few steps."""
    metrics = home / run / stage / "metrics.jsonl"
    process = start(home, run)
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (home / run / stage / "artifact").exists(), f"{stage} was faster than the kill"


@pytest.mark.slow
def test_kill_9_in_every_stage_changes_no_bit(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    rows = read_rows(DataConfig(task="copy", num_rows=300), base=tmp_path, inputs={}, seed=0)
    tokenizer = train_tokenizer([str(row) for row in rows], 300)
    torch.manual_seed(0)
    shape = preset("tiny", vocab_size=300, hidden_size=32, num_hidden_layers=2)
    save_policy(HybridForCausalLM(shape), tokenizer, tmp_path / "base")

    finish(tmp_path, "whole")
    for stage in STAGES:
        kill_in(tmp_path, "killed", stage)
    said = finish(tmp_path, "killed")
    assert "sft: nothing changed, skipped" in said
    assert "grpo: goes on where it stopped" in said
    for stage in STAGES:
        whole, killed = (
            Artifact.open(tmp_path / run / stage / "artifact", verify=True)
            for run in ("whole", "killed")
        )
        assert whole.manifest.files == killed.manifest.files, stage
    assert "skipped" in finish(tmp_path, "killed").splitlines()[-1]
