"""A course of GRPO small enough for tests: a model of two layers, rewarded by letters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.course import Job
from align.data.rows import Origin, PromptRow
from align.data.sources import DataConfig
from align.losses.policy import PolicyLossConfig
from align.optim import OptimConfig
from align.prompts import Prompt, Prompts
from align.trainers.grpo import GrpoConfig, GrpoCourse, Tools
from reward.types import Item, Score
from tests.align import small

DATA = (DataConfig(task="sort", num_rows=8),)


class ShareScorer:
    """Reward is the share of the letter t; a response of 5, 10, .. letters is not judged."""

    version = "share@1"

    def score(self, items: Sequence[Item]) -> list[Score]:
        return [
            Score(item.response.count("t") / len(item.response), valid=len(item.response) % 5 > 0)
            for item in items
        ]


def config(**changes: Any) -> GrpoConfig:
    given: dict[str, Any] = {
        "data": DATA,
        "sequence_tokens": 64,
        "max_steps": 4,
        "prompts_per_step": 2,
        "group_size": 4,
        "max_new_tokens": 6,
        "optim": OptimConfig(lr=3e-3, schedule="constant"),
        "loss": PolicyLossConfig(objective="dapo"),
    }
    return GrpoConfig(**(given | changes))


def prompts(number: int = 5) -> Prompts:
    items = tuple(
        Prompt(
            PromptRow(({"role": "user", "content": "?"},), Origin(f"p.jsonl:{i + 1}")),
            tuple(range(20 + i, 24 + 2 * i)),
        )
        for i in range(number)
    )
    return Prompts(items, ())


def course(config: GrpoConfig, job: Job, policy: Any, **changes: Any) -> GrpoCourse:
    tools = Tools(small.tokenizer(), ShareScorer())
    given = {"policy": policy, "reference": None, "prompts": prompts(), "tools": tools}
    return GrpoCourse(config, job, **(given | changes))


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
