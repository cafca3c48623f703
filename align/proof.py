"""The canary of an engine in the trainer's process, asked on every process of a run together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import nn

from rollout.canary import Canary, Sums, check_sums, trainer_score
from rollout.types import Engine


def prove(
    engine: Engine,
    policy: nn.Module,
    canary: Canary,
    *,
    version: int,
    autocast: torch.dtype | None,
    sums: Sums | None = None,
) -> float:
    """Asks this process's engine and the trainer; gives the largest rms of all, in nats.

    Every process scores every answer, for the forward of a shared model is a collective, and so all
    of them raise together.

    Args:
        policy: the trainer's, adapters on.
        autocast: of the trainer's forward.
        sums: as for `Canary.check`; of this process.

    Raises:
        ProofError: as `Canary.check`.
    """
    score = trainer_score(policy, autocast=autocast)
    answers: list[Any] = [canary.ask(engine, version=version)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        answers = gather_object(answers)
    gaps = [
        canary.compare(done, score(done), version=version, sums=sums, where=f"engine {place}")
        for place, done in enumerate(answers)
    ]
    return max(gaps)


def prove_push(
    engine: Engine,
    version: int,
    sums: Sums,
    *,
    policy: nn.Module,
    canary: Canary,
    autocast: torch.dtype | None,
    where: str,
) -> None:
    """Proves a copy that was just pushed: every tensor as it was sent, then as `prove`.

    Args:
        sums: of what was sent and of what the engine holds.
        where: who holds the copy, for the message.

    Raises:
        ProofError: naming the first tensor that the engine does not hold as it was sent, or if it
            holds all of them and does not sample from the trainer's policy.
    """
    check_sums(*sums(), version=version, where=where)
    prove(engine, policy, canary, version=version, autocast=autocast, sums=sums)
