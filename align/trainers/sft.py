"""Kind `sft`: next-token training on conversations, with loss on what the assistant wrote."""

from __future__ import annotations

from pydantic import Field

from align.course import Job, Outcome
from align.data.sources import DataConfig
from align.data.supply import supply_chats
from align.loop import TrainConfig
from align.trainers.lm import LmCourse, adapted, fit, open_start


class SftConfig(TrainConfig):
    """Supervised fine-tuning on chat rows."""

    data: tuple[DataConfig, ...] = Field(min_length=1)
    """Where the rows come from, and how much of each."""


def run(config: SftConfig, job: Job) -> Outcome:
    """Trains job.start on conversations and writes the policy to job.artifact.

    Raises:
        ValueError: if a row, a file or the starting policy is not what it should be.
        RuntimeError: as `align.loop.train`.
    """
    model, tokenizer = open_start(config, job)
    data, sources = supply_chats(config, job, tokenizer)
    course = LmCourse(data, job.accelerator, ranks_per_row=config.parallel.sequence)
    metrics = fit(course, adapted(model, config, job), tokenizer, config=config, job=job)
    return Outcome(metrics, sources)
