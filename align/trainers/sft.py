"""Kind `sft`: next-token training on conversations, with loss on what the assistant wrote."""

from __future__ import annotations

from align.course import Job, Outcome
from align.data.supply import supply_chats
from align.trainers.lm import RowsConfig, run_rows


class SftConfig(RowsConfig):
    """Supervised fine-tuning on chat rows."""


def run(config: SftConfig, job: Job) -> Outcome:
    """Trains job.start on conversations and writes the policy to job.artifact.

    Raises:
        ValueError: if a row, a file or the starting policy is not what it should be.
        RuntimeError: as `align.loop.train`.
    """
    return run_rows(config, job, supply_chats)
