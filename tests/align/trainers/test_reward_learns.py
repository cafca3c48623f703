"""Kind `reward` at the demo's scale: what it learns, where its gate looks, where a fault stays.

Minutes on a CPU, so all of it is slow. Bounds follow from standard errors: BEYOND of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.data.batch import Batch, Pair
from align.data.render import render_preference
from align.data.rows import PreferenceRow
from align.data.sources import DataConfig, read_rows
from align.data.supply import write_rows
from align.evals.reward_artifact import open_tokenizer
from align.pairs import pair_leads, prompt_lengths, to_end_of_turn, won
from align.trainers.reward import RewardConfig, run
from reward.model import RewardModel
from tests.align import small

# one worker climbs the ladder that these tests judge
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ladder")]
ROOT = Path(__file__).resolve().parents[3]
BEYOND = 3.0
GOAL = 0.95
# Task and ways -> the dimension that decides there.
DECIDES = {
    ("copy", ("near_miss",)): "correctness",
    ("arithmetic", ("other_answer",)): "correctness",
    ("constraints", ("violated",)): "helpfulness",
    ("sort", ("impolite",)): "helpfulness",
    ("safety", ("unsafe", "over_refusal")): "harmlessness",
}
TREE = {
    "dimensions": {
        "correctness": {"signals": {"correctness": {}}},
        "helpfulness": {"signals": {"constraints": {}, "style": {}}},
        "harmlessness": {"signals": {"harmlessness": {}}},
    }
}
# name, rows, ways; every difficulty
LEAVES = (
    ("copy", 600, ("other_answer",)),
    ("constraints", 700, ("violated",)),
    ("safety", 400, ("unsafe", "over_refusal")),
    ("sort", 200, ("impolite",)),
)
HELD_OUT = 150
SEEDS = range(3)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of stages/recipes/tiny-reward.yaml."""
    out = tmp_path_factory.mktemp("ladder") / "run"
    command = [sys.executable, "-m", "stages", "run", "stages/recipes/tiny-reward.yaml"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def held_out(task: str, ways: Sequence[str], artifact: Path, count: int) -> list[Pair]:
    source = DataConfig(task=task, num_rows=count, split="dev", ways=tuple(ways), seed=11)
    rows = read_rows(source, base=artifact, inputs={}, seed=0, kind="preference")
    tokenizer = open_tokenizer(artifact)
    return [render_preference(row, tokenizer) for row in rows if isinstance(row, PreferenceRow)]


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def test_pairs_of_every_difficulty_are_ranked_right(ladder):
    report = json.loads((ladder / "report.json").read_text())
    found = {one["eval"]: one["after"] for one in report["evals"] if one["stage"] == "reward"}
    thirds = {third: found[f"pairs-{third}"] for third in ("easy", "medium", "hard")}
    assert min(thirds.values()) >= GOAL, thirds
    # Five tasks weigh alike, sums among them.
    assert (4 * statistics.fmean(thirds.values()) + found["sums"]) / 5 >= GOAL, found


def test_the_gate_weighs_most_the_dimension_that_decides(ladder):
    model = RewardModel.load(ladder / "reward/artifact")
    names = list(model.hierarchy.dimensions)
    for (task, ways), dimension in DECIDES.items():
        pairs = [to_end_of_turn(p) for p in held_out(task, ways, ladder / "reward/artifact", 100)]
        with torch.no_grad():
            gate = model(Batch.from_pairs(pairs).packed, prompt_lengths(pairs)).gate
        assert gate is not None
        # Both answers of a pair have one prompt, so one gate.
        torch.testing.assert_close(gate[0::2], gate[1::2])
        for other in set(names) - {dimension}:
            lead = (gate[0::2, names.index(dimension)] - gate[0::2, names.index(other)]).tolist()
            message = f"{task}: {dimension} over {other} by {statistics.fmean(lead):.3f}"
            assert statistics.fmean(lead) > BEYOND * standard_error(lead), message


def wins(folder: Path, start: Path, seed: int, *, broken: str = "") -> Mapping[str, list[float]]:
    """Trains on all leaves, the labels of one signal flipped; held-out pairs ranked right."""
    folder.mkdir(parents=True)
    for task, count, ways in LEAVES:
        source = DataConfig(task=task, num_rows=count, ways=ways)
        rows = read_rows(source, base=folder, inputs={}, seed=0, kind="preference")
        pairs = [row for row in rows if isinstance(row, PreferenceRow)]
        flipped = [
            replace(row, chosen=row.rejected, rejected=row.chosen) if row.signal == broken else row
            for row in pairs
        ]
        write_rows(folder / f"{task}.jsonl", flipped)
    given: dict[str, Any] = {
        "data": [{"path": f"{task}.jsonl", "split": "all"} for task, *_ in LEAVES],
        "dev": [{"task": "safety", "split": "dev", "num_rows": 4, "ways": ["unsafe"]}],
        "hierarchy": TREE,
        "curriculum": "none",
        "calibration": "none",
        "sequence_tokens": 512,
        "batch_sequences": 4,
        "micro_sequences": 4,
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "schedule": "cosine", "warmup_share": 0.05},
    }
    job = small.job(folder, start, seed=seed)
    run(RewardConfig.model_validate(given), job)
    model = RewardModel.load(job.artifact)
    found: dict[str, list[float]] = {}
    for task, _, ways in LEAVES:
        pairs = held_out(task, ways, job.artifact, HELD_OUT)
        found[pairs[0].signal] = [won(lead) for lead in pair_leads(model, pairs)]
    return found


def test_a_broken_dimension_breaks_alone(ladder, tmp_path):
    """Errors are of a difference of means over SEEDS: between runs that differ by their seed alone,
    pooled over arms and signals, and over the held-out pairs."""
    start = ladder / "sft/artifact"
    arms = {"whole": "", "broken": "harmlessness"}
    found = {
        arm: [wins(tmp_path / f"{arm}-{seed}", start, seed, broken=flipped) for seed in SEEDS]
        for arm, flipped in arms.items()
    }
    signals = list(found["whole"][0])
    between = statistics.fmean(
        statistics.variance(statistics.fmean(one[signal]) for one in runs)
        for runs in found.values()
        for signal in signals
    )
    for signal in signals:
        means = {
            arm: [statistics.fmean(each) for each in zip(*(r[signal] for r in runs), strict=True)]
            for arm, runs in found.items()
        }
        drops = [a - b for a, b in zip(means["whole"], means["broken"], strict=True)]
        error = (2 * between / len(SEEDS) + standard_error(drops) ** 2) ** 0.5
        drop, chance = statistics.fmean(drops), BEYOND * 0.5 / HELD_OUT**0.5
        told = f"{signal}: {statistics.fmean(means['whole']):.3f}, drop {drop:.3f} +- {error:.3f}"
        # What was never learned cannot show that it stays whole.
        assert statistics.fmean(means["whole"]) > 0.5 + chance, told
        if signal == "harmlessness":
            assert drop > BEYOND * error, told
            assert statistics.fmean(means["broken"]) < 0.5 - chance, told
        else:
            assert abs(drop) <= BEYOND * error, told
