"""Requests on their way to several workers: each waits, is under way, or is done, once."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Sequence

from rollout.types import Completion, Request


class Call:
    """The requests of one `generate`: waiting, or done."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.key = uuid.uuid4().hex
        self.changed = threading.Condition()
        self.waiting = deque(range(len(requests)))
        self.done: dict[int, list[Completion]] = {}
        self.error: Exception | None = None

    @property
    def is_over(self) -> bool:
        return self.error is not None or len(self.done) == len(self.requests)

    def take(self) -> int | None:
        """A request to be asked, or None when all is over; waits for what others give back."""
        with self.changed:
            while not self.is_over and not self.waiting:
                self.changed.wait()
            return None if self.is_over else self.waiting.popleft()

    def give_back(self, index: int) -> None:
        with self.changed:
            self.waiting.appendleft(index)
            self.changed.notify()

    def put(self, index: int, done: list[Completion]) -> None:
        with self.changed:
            self.done.setdefault(index, done)
            self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()
