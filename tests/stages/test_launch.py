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
# what a step took, and the engine's own rounding, which depends on the size of its batches
UNLIKE = {"seconds", "tokens_per_s", "engine/gap", "engine/gap_max"}


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
            stage |= {"prompts_per_part": 8, "min_gap": 0.05, "min_score": 0.0}
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
    text = (run / stage / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def table(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "report.json").read_text())["evals"]


@pytest.mark.slow
@pytest.mark.multi
def test_the_demos_ladder_is_the_same_for_one_and_two_processes(tmp_path: Path):
    recipe = shrunk_demo()
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    trained = [stage["name"] for stage in recipe["stages"] if stage["kind"] != "sample"]
    one = launch(tmp_path, "one", processes=1)
    data = launch(tmp_path, "data")
    rows = launch(tmp_path, "rows", *(f"{stage}.parallel.sequence=2" for stage in trained))
    for stage in trained:
        wanted = lines(one, stage)
        assert len(wanted) == len(lines(data, stage)) == len(lines(rows, stage)) == 3
        for expected, told in zip(wanted, lines(data, stage), strict=True):
            assert told.keys() == expected.keys()
            for key in told.keys() - UNLIKE:
                assert told[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-4), (stage, key)
        # A shared row's sums are rounded otherwise, and one last bit can turn a sampled token.
        if stage != "grpo":
            for expected, told in zip(wanted, lines(rows, stage), strict=True):
                assert told["loss"] == pytest.approx(expected["loss"], abs=1e-4), stage
    assert table(data) == table(one)
    sampled = "pairs-short/artifact/rows.jsonl"
    assert (data / sampled).read_bytes() == (one / sampled).read_bytes()
