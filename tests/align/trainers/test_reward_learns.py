"""Kind `reward` at the demo's scale: it learns, and a fault of the data stays in its dimension.

Minutes on a CPU, so all of it is slow.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from align.data.rows import PreferenceRow
from align.data.sources import DataConfig, read_rows
from align.data.supply import write_rows
from align.trainers.reward import REPORT_FILE, RewardConfig, run
from stages.recipe import BASES
from tests.align import small

TREE = {
    "dimensions": {
        "correctness": {"signals": {"correctness": {}}},
        "helpfulness": {"signals": {"constraints": {}, "style": {}}},
        "harmlessness": {"signals": {"harmlessness": {}}},
    }
}
# Every difficulty of what the demo's base can read; name, rows, hardest, ways.
LEAVES = (
    ("arithmetic", 1200, 0.33, ("other_answer",)),
    ("copy", 900, 0.5, ("near_miss",)),
    ("constraints", 1000, 0.6, ("violated",)),
    ("safety", 900, 1.0, ("unsafe", "over_refusal")),
    ("sort", 300, 0.5, ("impolite",)),
)


def leaves(
    folder: Path, change: Callable[[PreferenceRow], PreferenceRow] = lambda row: row
) -> None:
    """Training and held-out pairs in files; `change` is done to what is trained on alone."""
    for name, count, hardest, ways in LEAVES:
        for split, size in (("train", count), ("dev", 100)):
            source = DataConfig(
                task=name, num_rows=size, split=split, difficulty=(0.0, hardest), ways=ways
            )
            rows = read_rows(source, base=folder, inputs={}, seed=0, kind="preference")
            kept = [row for row in rows if isinstance(row, PreferenceRow)]
            changed = [change(row) for row in kept] if split == "train" else kept
            write_rows(folder / f"{name}.{split}.jsonl", changed)


def trained(folder: Path, names: tuple[str, ...], **changes: Any) -> Path:
    files = {
        part: [{"path": f"{name}.{part}.jsonl", "split": "all"} for name in names]
        for part in ("train", "dev")
    }
    given: dict[str, Any] = {
        "data": files["train"],
        "dev": files["dev"],
        "hierarchy": TREE,
        "curriculum": "none",
        "sequence_tokens": 512,
        "batch_sequences": 2,
        "micro_sequences": 2,
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "schedule": "cosine", "warmup_share": 0.05},
    }
    job = small.job(folder, BASES / "tiny")
    run(RewardConfig.model_validate(given | changes), job)
    return job.artifact


def accuracies(artifact: Path) -> Mapping[str, float]:
    told = json.loads((artifact / REPORT_FILE).read_text())["after"]
    return {"all": told["accuracy"], **told["by_signal"]}


@pytest.mark.slow
def test_a_broken_dimension_breaks_alone(tmp_path):
    names = tuple(name for name, *_ in LEAVES)
    chance = random.Random(0)

    def broken(row: PreferenceRow) -> PreferenceRow:
        if row.signal != "correctness" or chance.random() < 0.5:
            return row
        return PreferenceRow(row.prompt, row.rejected, row.chosen, row.origin, signal=row.signal)

    found = {}
    for name, change in (("whole", lambda row: row), ("broken", broken)):
        (tmp_path / name).mkdir()
        leaves(tmp_path / name, change)
        found[name] = accuracies(trained(tmp_path / name, names))
    # Seen: 0.85 over all, correctness 0.71 whole and 0.55 broken, the others as they were.
    assert found["whole"]["all"] >= 0.8
    assert abs(found["broken"]["correctness"] - 0.5) < 0.1
    assert found["whole"]["correctness"] > found["broken"]["correctness"] + 0.08
    for signal in ("constraints", "style", "harmlessness"):
        assert found["broken"][signal] > found["whole"][signal] - 0.05, signal
