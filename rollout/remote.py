"""One rollout worker, asked over HTTP: what it holds, takes and samples."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from rollout.canary import ProofError, check_sums
from rollout.types import Completion, Request
from rollout.wire import (
    BroadcastRequest,
    ErrorResponse,
    GenerateRequest,
    GenerateResponse,
    Health,
    PushRequest,
    WeightsTold,
)
from serving.client import CONNECT_S, FIRST_WAIT_S, Form, read_form


class GoneError(Exception):
    """A worker that does not answer; another one may."""


class BusyError(Exception):
    """A worker that has no room for now."""


class BrokenPushError(RuntimeError):
    """A broadcast that lost a member on the way; those left can be sent it again, whole."""


@dataclass(frozen=True)
class Pushed:
    """What workers have to hold; None is no folder, after a broadcast."""

    path: Path | None
    version: int
    expected: Mapping[str, str]


@dataclass(eq=False)
class RemoteWorker:
    """A worker, and how it fares.

    Args:
        stall_s: seconds that it may sit on a request or on new weights.
    """

    url: str
    http: httpx.Client
    stall_s: float
    is_ready: bool = False
    trouble: str = "never asked"
    wait_s: float = FIRST_WAIT_S
    lock: threading.Lock = field(default_factory=threading.Lock)

    def health(self) -> Health | None:
        """None where it does not answer."""
        try:
            answer = self._ask("GET", "/health", limit_s=CONNECT_S)
        except GoneError:
            return None
        return self._read(Health, answer)

    def push(self, pushed: Pushed) -> None:
        """Has it take new weights, and compares what it then holds.

        Raises:
            ProofError: if it holds anything else.
            GoneError: if it does not answer, or does not hold what cannot be sent again.
        """
        if pushed.path is None:
            try:
                return self.check(pushed, self.told())
            except ProofError as error:
                raise GoneError(f"{error}; it takes part again at the next push") from error
        asked = PushRequest(path=str(pushed.path), version=pushed.version)
        self.check(pushed, self._send("/v1/weights", asked))

    def receive(self, asked: BroadcastRequest) -> WeightsTold:
        """Has it join a process group and take the weights that are sent there.

        Raises:
            ProofError: if it refuses or breaks off.
            GoneError: if it does not answer.
        """
        return self._send("/v1/weights/broadcast", asked)

    def _send(self, path: str, asked: PushRequest | BroadcastRequest) -> WeightsTold:
        answer = self._ask("POST", path, asked.model_dump_json().encode())
        if answer.status_code != 200:
            raise ProofError(f"{self.url}: {self._refusal(answer)}")
        return self._read(WeightsTold, answer)

    def check(self, pushed: Pushed, told: WeightsTold) -> None:
        """Compares what it says that it holds.

        Raises:
            ProofError: if that is anything else than what was pushed.
        """
        if told.version != pushed.version:
            raise ProofError(
                f"{self.url}: holds version {told.version}, pushed was {pushed.version}; its "
                "weights are stale"
            )
        check_sums(pushed.expected, told.checksums, version=pushed.version, where=self.url)

    def told(self) -> WeightsTold:
        """What it holds right now.

        Raises:
            GoneError: if it does not answer.
        """
        return self._read(WeightsTold, self._ask("GET", "/v1/weights"))

    def samples(self, request: Request, *, key: str, policy_version: int) -> list[Completion]:
        """Samples of one request, the same however often they are asked for under `key`.

        Raises:
            BusyError: if it has no room.
            GoneError: if it does not answer, or cannot sample from that version now.
            ValueError: if it refuses the request for what it is.
            RuntimeError: if it answers another request.
        """
        asked = GenerateRequest.of(request, key=key, policy_version=policy_version)
        answer = self._ask("POST", "/v1/generate", asked.model_dump_json().encode())
        if answer.status_code == 429:
            raise BusyError
        if answer.status_code != 200:
            told = f"{self.url}: {self._refusal(answer)}"
            # otherwise stale, stopping or broken: it has to be brought back first
            raise ValueError(told) if answer.status_code == 400 else GoneError(told)
        found = self._read(GenerateResponse, answer)
        done = [one.to_completion() for one in found.completions]
        got = [(one.request_id, one.sample, one.prompt) for one in done]
        wanted = [(request.request_id, n, request.prompt) for n in range(request.num_samples)]
        if found.id != key or got != wanted:
            raise RuntimeError(
                f"{self.url}: {len(done)} samples under id {found.id!r}, expected "
                f"{request.num_samples} of {request.request_id!r} under {key!r}; something on the "
                "way mixes answers"
            )
        return done

    def withdraw(self, key: str) -> None:
        """Ends what it samples under `key`; nothing runs on a worker that is gone."""
        with suppress(GoneError):
            self._ask("DELETE", f"/v1/generate/{key}", limit_s=CONNECT_S)

    def _ask(
        self, method: str, path: str, body: bytes = b"", *, limit_s: float | None = None
    ) -> httpx.Response:
        try:
            return self.http.request(
                method,
                path,
                content=body,
                headers={"content-type": "application/json"},
                timeout=httpx.Timeout(limit_s or self.stall_s, connect=CONNECT_S),
            )
        except (httpx.TransportError, RuntimeError) as error:
            # httpx raises RuntimeError where another thread has closed the client
            self.trouble = f"{self.url}: {type(error).__name__}: {error}"
            raise GoneError(self.trouble) from error

    def _read(self, form: type[Form], answer: httpx.Response) -> Form:
        return read_form(form, answer, self.url, service="rollout worker")

    def _refusal(self, answer: httpx.Response) -> str:
        return self._read(ErrorResponse, answer).error.message
