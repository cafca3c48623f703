"""Samples of a rollout when they are due, or made ahead while the one before is trained."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from accelerate.utils import gather_object

from align.engines import Source
from align.experience import Group
from align.turns import Turns
from rollout.types import Completion, Request


class Sampler:
    """Asks a source for one rollout after the other.

    Args:
        source: used by this object alone.
        turns: whose prompts this process samples.
        group_size: samples of a prompt.
    """

    def __init__(self, source: Source, turns: Turns, *, group_size: int) -> None:
        self._source = source
        self._turns = turns
        self._group_size = group_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._ahead: tuple[int, Future[list[Completion]]] | None = None

    def take(self, index: int, requests: Sequence[Request]) -> list[Completion]:
        """Samples of the rollout that begins with step `index`, in order.

        Those that were begun ahead are waited for; others are made now, with the policy as it is.

        Raises:
            RuntimeError: as the engine, whenever it happened.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            return ahead[1].result()
        self._source.refresh(index)
        return self._source.engine.generate(requests)

    def begin(self, index: int, requests: Sequence[Request], *, version: int) -> None:
        """Starts on the rollout of step `index` with the policy as it is now, and goes on.

        Args:
            version: updates that the policy has seen.
        """
        self._source.refresh(version)
        self._ahead = (index, self._pool.submit(self._source.engine.generate, requests))

    def state_dict(self) -> list[Any]:
        """What all processes began ahead, waited for, as plain values: [] or [index, completions].

        In the prompts' own order, so that it fits any number of processes.
        """
        if self._ahead is None:
            return []
        index, future = self._ahead
        done = [vars(one) | {"timings": None} for one in future.result()]
        groups = self._groups(done)
        every = gather_object([groups]) if self._turns.process[1] > 1 else [groups]
        by_step = self._turns.in_order(index, every)
        return [index, [one for of_step in by_step for group in of_step for one in group]]

    def load_state_dict(self, state: Sequence[Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self._ahead = None
        if state:
            index, done = state
            future: Future[list[Completion]] = Future()
            own = self._turns.own_of(index, self._groups(done))
            future.set_result([Completion(**values) for group in own for values in group])
            self._ahead = (index, future)

    def _groups(self, done: Sequence[Any]) -> list[Sequence[Any]]:
        size = self._group_size
        return [done[first : first + size] for first in range(0, len(done), size)]

    def close(self) -> None:
        """Withdraws what is under way and ends the engine."""
        self._source.engine.close()
        self._pool.shutdown(wait=True, cancel_futures=True)


def staleness(groups: Sequence[Group], step: int) -> dict[str, float]:
    """Updates between the policy that sampled and the one that is trained, mean and most."""
    ages = [float(step - one.policy_version) for group in groups for one in group.completions]
    return {"rollout/staleness": statistics.fmean(ages), "rollout/staleness_max": max(ages)}
