"""Many callers, one engine: a thread of its own submits, steps and cancels, and nobody else does.

    submit -> queue -> engine.submit -> engine.step, again and again -> tokens to each listener
    between -> waits until nothing is in flight, then runs alone with the engine (new weights)

While something waits to run between, new requests are held, so that it gets its turn; every answer
is of one version of the weights.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from rollout.types import Request, StreamingEngine, Token

LOG = logging.getLogger(__name__)
RETRY_S = 1

Listener = Callable[[Sequence[Token] | Exception], None]
"""Told, on the engine's thread, of a request's tokens of one turn, or why there will be no more."""

Result = TypeVar("Result")


class QueueFullError(RuntimeError):
    """No room now; `RETRY_S` later there may be."""


class ClosedError(RuntimeError):
    """The worker stops."""


class StepWatch(Protocol):
    """Told of every turn."""

    def step(self, *, num_tokens: int, seconds: float) -> None: ...


@dataclass
class _Ticket:
    """One request on its way."""

    request: Request
    listener: Listener
    accepted: Future[None]
    left: int
    """Samples that have not ended."""


class Driver:
    """Owns an engine from now on.

    Args:
        engine: touched by this object's thread alone.
        max_samples: queued or live at once.
        watch: told of turns.

    Raises:
        ValueError: if max_samples is below 1.
    """

    def __init__(
        self, engine: StreamingEngine, *, max_samples: int = 4096, watch: StepWatch | None = None
    ) -> None:
        if max_samples < 1:
            raise ValueError(f"Driver.max_samples = {max_samples}, expected >= 1")
        self.engine = engine
        self.max_samples = max_samples
        self._watch = watch
        self._names = itertools.count()
        self._changed = threading.Condition()
        self._tickets: dict[str, _Ticket] = {}
        self._new: deque[str] = deque()
        self._cancelled: deque[str] = deque()
        self._between: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._num_samples = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_samples(self) -> int:
        """Queued or live."""
        return self._num_samples

    @property
    def is_running(self) -> bool:
        """Whether anybody works on what is submitted."""
        return self._thread.is_alive()

    def submit(self, request: Request, listener: Listener) -> tuple[str, Future[None]]:
        """Queues a request.

        Its own id may be any other request's: tokens and completions carry it all the same.

        Returns: a name to cancel it by, and a future that is done when the engine has taken it, or
            holds the engine's ValueError.

        Raises:
            QueueFullError: if there is no room now, which there would be in an empty queue.
            ValueError: if there never would be.
            ClosedError: if the driver stops.
        """
        if request.num_samples > self.max_samples:
            raise ValueError(
                f"num_samples = {request.num_samples}, expected at most {self.max_samples}, which "
                "this worker holds at once; ask for fewer"
            )
        with self._changed:
            if self._is_closing:
                raise ClosedError("the worker is stopping; ask another one")
            if self._num_samples + request.num_samples > self.max_samples:
                raise QueueFullError(
                    f"{self._num_samples} of {self.max_samples} samples are queued or live, no "
                    f"room for {request.num_samples} more; ask again in a moment"
                )
            name = str(next(self._names))
            accepted: Future[None] = Future()
            self._tickets[name] = _Ticket(request, listener, accepted, request.num_samples)
            self._num_samples += request.num_samples
            self._new.append(name)
            self._changed.notify()
        return name, accepted

    def cancel(self, name: str) -> None:
        """Ends a request wherever it is; nothing more is told of it. One that ended stays so."""
        with self._changed:
            if name in self._tickets:
                self._cancelled.append(name)
                self._changed.notify()

    def between(self, work: Callable[[], Result]) -> Future[Result]:
        """Runs `work` on the engine's thread when nothing is in flight."""
        done: Future[Result] = Future()
        with self._changed:
            if self._is_closing:
                raise ClosedError("the worker is stopping; ask another one")
            self._between.append((work, done))
            self._changed.notify()
        return done

    def close(self) -> None:
        """Ends what is in flight, the thread and the engine."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except Exception:
            # nothing that is foreseen; without this line askers would wait for ever
            LOG.exception("the engine's thread broke off; the worker stops")
            with self._changed:
                self._is_closing = True
        self._fail_all(ClosedError("the worker is stopping; ask another one"))
        self.engine.close()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (
                    self._is_closing
                    or self._new
                    or self._cancelled
                    or self._between
                    or self.engine.num_in_flight
                ):
                    self._changed.wait()
                if self._is_closing:
                    return
                cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
                # held back while somebody wants the engine alone
                count = 0 if self._between else len(self._new)
                new = [self._new.popleft() for _ in range(count)]
            for name in cancelled:
                self._cancel(name)
            for name in new:
                self._begin(name)
            if self._between and not self.engine.num_in_flight:
                self._run_between()
            self._step()

    def _begin(self, name: str) -> None:
        ticket = self._tickets.get(name)
        if ticket is None:
            return
        # an asker who left has cancelled it; from here on nobody can
        if not ticket.accepted.set_running_or_notify_cancel():
            self._end(name)
            return
        try:
            self.engine.submit(replace(ticket.request, request_id=name))
        except (ValueError, RuntimeError) as error:
            self._end(name)
            ticket.accepted.set_exception(error)
        else:
            ticket.accepted.set_result(None)

    def _cancel(self, name: str) -> None:
        ticket = self._tickets.get(name)
        if ticket is None:
            return
        self._end(name)
        # a future that cannot be cancelled was running: the engine has the request
        if not ticket.accepted.cancel():
            self.engine.cancel(name)

    def _end(self, name: str) -> None:
        with self._changed:
            ticket = self._tickets.pop(name)
            self._num_samples -= ticket.request.num_samples

    def _run_between(self) -> None:
        work, done = self._between.popleft()
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            tokens = self.engine.step()
        except Exception as error:
            LOG.exception("the engine broke off; what was in flight is refused")
            self._fail_all(error)
            return
        if tokens and self._watch is not None:
            seconds = time.perf_counter() - began
            self._watch.step(num_tokens=sum(t.token >= 0 for t in tokens), seconds=seconds)
        by_name: dict[str, list[Token]] = {}
        for token in tokens:
            by_name.setdefault(token.request_id, []).append(token)
        for name, found in by_name.items():
            ticket = self._tickets.get(name)
            # a request that was cancelled is told of once more, and nobody listens
            if ticket is None:
                continue
            ticket.left -= sum(token.completion is not None for token in found)
            if not ticket.left:
                self._end(name)
            _tell(ticket, [_renamed(token, ticket.request.request_id) for token in found])

    def _fail_all(self, error: Exception) -> None:
        for name, ticket in list(self._tickets.items()):
            self._end(name)
            if ticket.accepted.done():
                _tell(ticket, error)
            elif ticket.accepted.set_running_or_notify_cancel():
                ticket.accepted.set_exception(error)
        while self._between and self._is_closing:
            done = self._between.popleft()[1]
            if done.set_running_or_notify_cancel():
                done.set_exception(error)


def _tell(ticket: _Ticket, found: Sequence[Token] | Exception) -> None:
    try:
        ticket.listener(found)
    except Exception:
        # an asker whose loop has closed must not stop everybody else's samples
        LOG.exception("request %r: its asker cannot be told", ticket.request.request_id)


def _renamed(token: Token, request_id: str) -> Token:
    done = token.completion
    return replace(
        token,
        request_id=request_id,
        completion=None if done is None else replace(done, request_id=request_id),
    )
