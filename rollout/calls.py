"""Requests on their way to several workers: each waits, is under way, or is done, once."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from rollout.types import Completion, Request
from rollout.wire import ErrorResponse

FIRST_WAIT_S = 0.1
CONNECT_S = 5.0

Form = TypeVar("Form", bound=BaseModel)


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


def refusal_of(answer: httpx.Response, url: str) -> str:
    """Why a worker refused."""
    return read_form(ErrorResponse, answer, url).error.message


def read_form(form: type[Form], answer: httpx.Response, url: str) -> Form:
    """An answer in the form that it should have.

    Raises:
        RuntimeError: if it has another.
    """
    try:
        return form.model_validate_json(answer.content)
    except ValidationError as error:
        raise RuntimeError(
            f"{url}: status {answer.status_code} with something that is no {form.__name__}; is it "
            "a rollout worker of this release?"
        ) from error
