"""The thread that owns an engine: order, solitude, failures, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rollout.serving.driver import ClosedError, Driver, QueueFullError
from rollout.types import Completion, Request, Sampling, Token
from tests.serving.live import wait_for


class FakeEngine:
    """Counts up to max_new_tokens for each sample; a prompt of -1 breaks the engine."""

    def __init__(self) -> None:
        self.policy_version = 0
        self.live: dict[str, tuple[Request, int]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.is_closed = False

    def submit(self, request: Request) -> None:
        if not request.prompt:
            raise ValueError("an empty prompt")
        self.live[request.request_id] = (request, 0)

    def step(self) -> list[Token]:
        self.gate.wait()
        told = []
        for name, (request, count) in list(self.live.items()):
            if request.prompt == (-1,):
                self.live.clear()
                raise RuntimeError("nan")
            done = count + 1 == request.sampling.max_new_tokens
            self.live[name] = (request, count + 1)
            if done:
                del self.live[name]
            for sample in range(request.num_samples):
                end = self.completion(name, sample) if done else None
                told.append(Token(name, sample, count, -1.0, end))
        return told

    def completion(self, name: str, sample: int) -> Completion:
        return Completion(name, sample, (1,), (0,), (0.0,), (0.0,), (1.0,), "length", 0)

    def cancel(self, request_id: str) -> None:
        del self.live[request_id]

    @property
    def num_in_flight(self) -> int:
        return sum(request.num_samples for request, _ in self.live.values())

    def close(self) -> None:
        self.is_closed = True


class Told(list):
    """What a listener heard."""

    def __call__(self, found) -> None:
        self.extend(found if isinstance(found, list) else [found])

    @property
    def is_over(self) -> bool:
        return bool(self) and (isinstance(self[-1], Exception) or self[-1].completion is not None)


def request(tokens: int = 3, samples: int = 1, prompt: tuple[int, ...] = (1,)) -> Request:
    return Request("same", prompt, Sampling(max_new_tokens=tokens), num_samples=samples)


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver(FakeEngine(), max_samples=4)
    yield made
    made.engine.gate.set()
    made.close()


def test_requests_of_one_id_are_told_apart_and_keep_it(driver: Driver):
    heard = [Told(), Told()]
    driver.engine.gate.clear()
    for told, tokens in zip(heard, (2, 5), strict=True):
        driver.submit(request(tokens), told)
    driver.engine.gate.set()
    wait_for(lambda: all(told.is_over for told in heard))
    assert [[token.token for token in told] for told in heard] == [[0, 1], [0, 1, 2, 3, 4]]
    assert {t.request_id for told in heard for t in told} == {"same"}
    assert heard[0][-1].completion.request_id == "same"
    assert driver.num_samples == 0


def test_what_runs_between_meets_nothing_in_flight_and_holds_back_what_comes_after(driver: Driver):
    first, second = Told(), Told()
    driver.engine.gate.clear()
    driver.submit(request(50), first)
    wait_for(lambda: driver.engine.num_in_flight == 1)
    seen = driver.between(lambda: (driver.engine.num_in_flight, len(first), len(second)))
    driver.submit(request(1), second)
    driver.engine.gate.set()
    assert seen.result(10) == (0, 50, 0)
    wait_for(lambda: second.is_over)
    failing = driver.between(lambda: 1 / 0)
    assert isinstance(failing.exception(10), ZeroDivisionError)


def test_a_full_queue_refuses_for_now_and_a_larger_request_for_ever(driver: Driver):
    driver.engine.gate.clear()
    driver.submit(request(samples=3), Told())
    with pytest.raises(QueueFullError, match="3 of 4 samples are queued or live, no room for 2"):
        driver.submit(request(samples=2), Told())
    with pytest.raises(ValueError, match="num_samples = 5, expected at most 4"):
        driver.submit(request(samples=5), Told())
    driver.engine.gate.set()
    wait_for(lambda: driver.num_samples == 0)


def test_a_cancelled_request_is_not_heard_of_again(driver: Driver):
    queued, live = Told(), Told()
    driver.engine.gate.clear()
    name, accepted = driver.submit(request(10**6), live)
    accepted.result(10)
    other, _ = driver.submit(request(10**6), queued)
    driver.cancel(other)
    driver.cancel(name)
    driver.cancel("never came")
    driver.engine.gate.set()
    wait_for(lambda: driver.num_samples == 0)
    wait_for(lambda: driver.engine.num_in_flight == 0)
    assert not queued
    assert not live.is_over


def test_askers_who_leave_before_they_are_accepted_do_not_stop_the_engine(driver: Driver):
    """An asyncio task that is cancelled cancels the futures it waits for, on its own thread."""
    driver.engine.gate.clear()
    _, accepted = driver.submit(request(10), Told())
    accepted.result(10)
    for is_told_first in (True, False):
        name, accepted = driver.submit(request(10**6), Told())
        assert accepted.cancel()
        if is_told_first:
            driver.cancel(name)
    push = driver.between(lambda: pytest.fail("nobody waits for it"))
    assert push.cancel()
    driver.engine.gate.set()
    after = Told()
    driver.submit(request(), after)
    wait_for(lambda: after.is_over)
    driver.cancel(name)
    wait_for(lambda: driver.num_samples == driver.engine.num_in_flight == 0)
    assert driver.is_running


def test_an_asker_who_cannot_be_told_stops_nobody_else(driver: Driver):
    def deaf(found) -> None:
        raise RuntimeError("event loop is closed")

    heard = Told()
    driver.submit(request(), deaf)
    driver.submit(request(5), heard)
    wait_for(lambda: heard.is_over)
    wait_for(lambda: driver.num_samples == 0)
    assert driver.is_running


def test_a_thread_that_cannot_go_on_says_so(driver: Driver, monkeypatch: pytest.MonkeyPatch):
    waiting = Told()
    name, accepted = driver.submit(request(10**9), waiting)
    accepted.result(10)
    driver.submit(request(10**9), waiting)[1].result(10)
    monkeypatch.setattr(driver.engine, "cancel", lambda name: 1 / 0)
    driver.cancel(name)
    wait_for(lambda: not driver.is_running)
    assert isinstance(waiting[-1], ClosedError)
    with pytest.raises(ClosedError, match="the worker is stopping"):
        driver.submit(request(), Told())


def test_an_engine_that_breaks_off_is_told_of_and_goes_on(driver: Driver):
    victim, culprit = Told(), Told()
    driver.engine.gate.clear()
    driver.submit(request(10**6), victim)
    driver.submit(request(prompt=(-1,)), culprit)
    driver.engine.gate.set()
    wait_for(lambda: victim.is_over and culprit.is_over)
    assert str(victim[-1]) == str(culprit[-1]) == "nan"
    _, refused = driver.submit(request(prompt=()), Told())
    with pytest.raises(ValueError, match="an empty prompt"):
        refused.result(10)
    again = Told()
    driver.submit(request(), again)
    wait_for(lambda: again.is_over)
    assert driver.num_samples == 0


def test_closing_ends_what_is_under_way():
    engine, told = FakeEngine(), Told()
    driver = Driver(engine)
    driver.submit(request(10**9), told)
    wait_for(lambda: len(told) > 0)
    driver.close()
    assert isinstance(told[-1], ClosedError)
    assert engine.is_closed
    for late in (lambda: driver.submit(request(), Told()), lambda: driver.between(int)):
        with pytest.raises(ClosedError, match="the worker is stopping"):
            late()


def test_a_queue_for_nobody_is_refused():
    with pytest.raises(ValueError, match="max_samples = 0, expected >= 1"):
        Driver(FakeEngine(), max_samples=0)
