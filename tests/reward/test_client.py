"""HttpScorer equals the scorer behind it, loses nothing, and says where it stopped waiting."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from reward.client import HttpScorer, trl_reward
from reward.scorer import InProcessScorer
from reward.serving.judging import Service, Settings
from reward.serving.types import Limits
from reward.types import Item, Score, Scorer
from tests.reward.live import Live, served
from tests.reward.test_scorer import PROMPT, item, scorer

ITEMS = [item("5" * (1 + 7 * n % 23), answer="5", verifier="math" * (n % 2)) for n in range(60)]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    limits = Limits(item_tokens=40, queue_items=200)
    settings = Settings(limits=limits, api_key="k1", max_body_bytes=20_000)
    with served(Service(scorer(), settings)) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("reward.client.FIRST_WAIT_S", 0.001)


def assert_same(found: list[Score], wanted: list[Score]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-5)
        assert one.dimensions == pytest.approx(dict(other.dimensions), abs=1e-5)
        assert set(one.signals) == set(other.signals)
        assert (one.valid, one.reason, one.version) == (other.valid, other.reason, other.version)


@pytest.mark.parametrize("batch_items", [1, 7, 256])
def test_scores_are_those_of_the_scorer_behind_it(live, batch_items):
    judge: Scorer = HttpScorer(live.url, api_key="k1", batch_items=batch_items)
    wanted = scorer(max_tokens=40)
    items = [*ITEMS[:10], item("5" * 60), *ITEMS[10:], item("5" * 61)]
    assert judge.version == wanted.version
    assert_same(judge.score(items), wanted.score(items))
    assert judge.score([]) == []


def test_batches_that_are_too_large_are_halved(live):
    judge = HttpScorer(live.url, api_key="k1", batch_items=1000)
    items = [ITEMS[n % 60] for n in range(300)]
    assert_same(judge.score(items), scorer().score(items))


def test_wrong_items_are_errors_by_their_place_in_the_call(live):
    judge = HttpScorer(live.url, api_key="k1", batch_items=4)
    with pytest.raises(ValueError, match=r"item 5: .*'maths', but no signal .*unknown_verifier"):
        judge.score([*ITEMS[:5], item("5", verifier="maths")])
    with pytest.raises(ValueError, match="item 1: arguments"):
        judge.score([ITEMS[0], item("5", arguments={"a": {1, 2}})])
    with pytest.raises(ValueError, match=r"wrong or missing key.*unauthorized"):
        HttpScorer(live.url).score(ITEMS[:1])


def test_a_service_that_is_not_there_is_named():
    with pytest.raises(RuntimeError, match=r"http://127.0.0.1:1: no answer within 0.05 s \(Conn"):
        HttpScorer("http://127.0.0.1:1", deadline_s=0.05)
    for wrong, message in (
        ({"batch_items": 0}, "batch_items = 0, expected 1 or more"),
        ({"num_connections": 0}, "num_connections = 0, expected 1 or more"),
        ({"deadline_s": 0.0}, "deadline_s = 0, expected more than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            HttpScorer("http://x", **wrong)


class Flaky:
    """A transport to a service that answers only at the third try, and in a jumbled order."""

    def __init__(self, url: str, key: str) -> None:
        self._client = httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"})
        self._lock = threading.Lock()
        self._random = random.Random(0)
        self.tries: dict[str, int] = {}

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return self._client.get("/health")
        name = json.loads(request.content)["id"]
        with self._lock:
            tried = self.tries[name] = self.tries.get(name, 0) + 1
            pause = self._random.uniform(0, 0.01)
        if tried == 1:
            raise httpx.ConnectError("refused")
        answer = self._client.post("/v1/score", content=request.content, headers=request.headers)
        time.sleep(pause)
        if tried == 2:
            # Judged, but the answer is lost on its way: asked again, it has to be the same.
            raise httpx.ReadError("reset")
        if tried == 3:
            return httpx.Response(429, headers={"retry-after": "0"})
        if tried == 4:
            return httpx.Response(503)
        return httpx.Response(200, content=answer.content)


def test_what_was_not_answered_is_asked_again_under_the_same_id(live):
    flaky = Flaky(live.url, "k1")
    judge = HttpScorer(live.url, batch_items=5, transport=httpx.MockTransport(flaky))
    assert_same(judge.score(ITEMS), scorer().score(ITEMS))
    assert list(flaky.tries.values()) == [5] * 12


def health(version: str = "v1") -> dict:
    judge = {"version": version, "hierarchy": "h", "artifact": "", "calibrated": False}
    return {"status": "ok", "judge": judge, "queue_items": 0, "queue_tokens": 0}


def answering(make) -> HttpScorer:
    """A client of a service whose answers to /v1/score are what `make` gives for a request."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(200, json=health())
        return make(json.loads(request.content))

    transport = httpx.MockTransport(answer)
    return HttpScorer("http://x", transport=transport, deadline_s=0.2)


def score_of(request: dict, num: int, **changes) -> httpx.Response:
    one = {"score": 0.5, "probability": 0.5, "dimensions": {}, "signals": {}}
    one |= {"valid": True, "reason": "", "num_tokens": 1}
    body = {"id": request["id"], "judge": health()["judge"], "scores": [one] * num, **changes}
    return httpx.Response(200, json=body)


def test_answers_that_cannot_be_trusted_are_errors():
    good = answering(lambda request: score_of(request, 1))
    assert good.score([ITEMS[0]])[0].value == 0.5
    cases = (
        (lambda request: score_of(request, 2), "2 scores under id .* for 1 items"),
        (lambda request: score_of(request, 1, id="other"), "under id 'other' for 1 items"),
        (
            lambda request: score_of(request, 1, judge=health("v2")["judge"]),
            "scored by v2, expected v1",
        ),
        (lambda request: httpx.Response(200, text="hello"), "no ScoreResponse; is it a scoring"),
        (lambda request: httpx.Response(404, text="hello"), "no ErrorResponse"),
        (
            lambda request: httpx.Response(
                500, json={"error": {"code": "internal", "message": "it broke"}}
            ),
            r"it broke \(internal\)",
        ),
        (lambda request: httpx.Response(503), r"no answer within 0.2 s \(status 503\)"),
    )
    for make, message in cases:
        with pytest.raises(RuntimeError, match=message):
            answering(make).score([ITEMS[0]])


def test_trls_rewards_are_the_scores_of_text_and_of_chats():
    reward = trl_reward(InProcessScorer(), "exactness")
    assert reward.__name__ == "exactness"
    columns = {"answer": ["5", "5", "5", "5"], "verifier": ["math"] * 3 + [None], "other": [1] * 4}
    chats = [[{"role": "assistant", "content": text}] for text in ("5", "6", " ", "5")]
    found = reward(
        prompts=[list(PROMPT)] * 4, completions=chats, completion_ids=[[1]] * 4, **columns
    )
    assert found == [1.0, 0.0, 0.0, None]
    texts = reward(prompts=["2+3?"] * 4, completions=["5", "6", "", "5"], **columns)
    assert texts == found
    heads = trl_reward(scorer())
    (value,) = heads(prompts=["2+3?"], completions=["5"])
    assert value == scorer().score([item("5")])[0].value
    assert math.isfinite(value)
    with pytest.raises(ValueError, match="a completion of 2 messages, expected one"):
        reward(prompts=["a"], completions=[[{"role": "tool", "content": "b"}] * 2])


def test_trls_rewards_come_over_http_as_well(live):
    reward = trl_reward(HttpScorer(live.url, api_key="k1"))
    found = reward(
        prompts=["2+3?"] * 2, completions=["5", "6"], answer=["5"] * 2, verifier=["math"] * 2
    )
    right, wrong = (Item(PROMPT, text, "5", "math") for text in "56")
    assert found == pytest.approx([one.value for one in scorer().score([right, wrong])], abs=1e-5)
