"""`accelerate launch` climbs one ladder alike with one process and two, whatever they share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
# what a step took
UNLIKE = ("seconds", "tokens_per_s")
# fp64 rounds at 1e-16
BOUND = 1e-11


def shrunk_demo() -> dict[str, Any]:
    """The demo's ladder with every stage, a few steps, rows and eval items each."""
    recipe = yaml.safe_load((ROOT / "stages/recipes/tiny.yaml").read_text())
    for eval_ in recipe["evals"]:
        for source in eval_["data"]:
            source["num_rows"] = 3
    sizes = {"batch_sequences": 4, "batch_items": 6, "prompts_per_step": 4}
    for stage in recipe["stages"]:
        for source in stage["data"]:
            if "num_rows" in source:
                source["num_rows"] = 12
        for key in stage.keys() & sizes.keys():
            stage[key] = sizes[key]
        if stage["kind"] == "sample":
            # Rules find every answer wrong this early: the pairs are the heads', far closer.
            stage |= {"prompts_per_part": 8, "min_gap": 0.005, "min_score": 0.0}
            stage |= {"num_samples": 4, "max_new_tokens": 8}
        else:
            stage |= {"max_steps": 3, "micro_sequences": 2}
    return recipe


def launch(home: Path, name: str, *sets: str, processes: int = 2) -> Path:
    """Runs home/r.yaml; returns the run's folder."""
    run = home / name
    command = [
        *("accelerate.commands.launch", "--config_file", "stages/launch/cpu.yaml"),
        *("--num_processes", str(processes), "--main_process_port", "0"),
        *("-m", "stages", "run", str(home / "r.yaml"), "--out", str(run)),
    ]
    done = subprocess.run(
        [sys.executable, "-m", *command, *(part for key in sets for part in ("--set", key))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return run


def lines(run: Path, stage: str) -> list[dict[str, float]]:
    """What each step told, but for its pace."""
    text = (run / stage / "metrics.jsonl").read_text()
    told = [json.loads(line) for line in text.splitlines()]
    assert len(told) == 3
    return [{k: v for k, v in line.items() if k not in UNLIKE} for line in told]


def saved(run: Path, stage: str) -> dict[str, bytes]:
    """The weights that a stage left."""
    files = sorted((run / stage / "artifact").rglob("*.safetensors"))
    assert files
    return {file.name: file.read_bytes() for file in files}


def table(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "report.json").read_text())["evals"]


@pytest.fixture
def trained(tmp_path: Path) -> list[str]:
    """Writes r.yaml; the stages that have steps."""
    recipe = shrunk_demo()
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return [stage["name"] for stage in recipe["stages"] if stage["kind"] != "sample"]


@pytest.mark.slow
@pytest.mark.multi
def test_the_demos_ladder_is_the_same_for_one_and_two_processes(tmp_path: Path, trained: list[str]):
    one = launch(tmp_path, "one", "precision=fp64", processes=1)
    data = launch(tmp_path, "data", "precision=fp64")
    shared = (f"{stage}.parallel.sequence=2" for stage in trained)
    rows = launch(tmp_path, "rows", "precision=fp64", *shared)
    for other in (data, rows):
        for stage in trained:
            for expected, told in zip(lines(one, stage), lines(other, stage), strict=True):
                assert told == pytest.approx(expected, rel=BOUND, abs=BOUND), (other.name, stage)
            assert saved(other, stage) == saved(one, stage), (other.name, stage)
        for expected, told in zip(table(one), table(other), strict=True):
            assert told == pytest.approx(expected, abs=BOUND)
        assert sampled(other) == sampled(one)


@pytest.mark.slow
@pytest.mark.multi
def test_in_fp32_two_processes_with_other_rows_give_the_bits_of_one(
    tmp_path: Path, trained: list[str]
):
    # Two microbatches a step at most: three are added in another order by two processes.
    sets = ("dpo-long.micro_sequences=3", "grpo.micro_sequences=4")
    one = launch(tmp_path, "one", *sets, processes=1)
    data = launch(tmp_path, "data", *sets)
    for stage in trained:
        assert lines(data, stage) == lines(one, stage), stage
    assert table(data) == table(one)
    file = "pairs-short/artifact/rows.jsonl"
    assert (data / file).read_bytes() == (one / file).read_bytes()


def sampled(run: Path) -> list[dict[str, Any]]:
    """The pairs of the sample stage, but for the judge's numbers."""
    text = (run / "pairs-short/artifact/rows.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
