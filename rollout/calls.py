"""Requests on their way to several workers: each waits, is under way, or is done, once."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from rollout.types import Completion, Request
from rollout.wire import ErrorResponse
from serving.client import CONNECT_S, FIRST_WAIT_S, Form, read_form


class GoneError(Exception):
    """A worker that does not answer; another one may."""


class BusyError(Exception):
    """A worker that has no room for now."""


@dataclass(frozen=True)
class Pushed:
    """What workers have to hold."""

    path: Path
    version: int
    expected: Mapping[str, str]


@dataclass(eq=False)
class RemoteWorker:
    url: str
    http: httpx.Client
    is_ready: bool = False
    trouble: str = "never asked"
    wait_s: float = FIRST_WAIT_S
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, method: str, path: str, body: bytes, limit_s: float) -> httpx.Response:
        """What the worker says, whatever it is.

        Raises:
            GoneError: if it says nothing within the limit.
        """
        try:
            return self.http.request(
                method,
                path,
                content=body,
                headers={"content-type": "application/json"},
                timeout=httpx.Timeout(limit_s, connect=CONNECT_S),
            )
        except (httpx.TransportError, RuntimeError) as error:
            # httpx raises RuntimeError where another thread has closed the client
            self.trouble = f"{self.url}: {type(error).__name__}: {error}"
            raise GoneError(self.trouble) from error

    def read(self, form: type[Form], answer: httpx.Response) -> Form:
        """Its answer in the form that it should have.

        Raises:
            RuntimeError: if it has another.
        """
        return read_form(form, answer, self.url, service="rollout worker")

    def refusal(self, answer: httpx.Response) -> str:
        """Why it refused."""
        return self.read(ErrorResponse, answer).error.message


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
