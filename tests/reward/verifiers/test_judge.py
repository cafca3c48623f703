"""A judge model: both orders, nothing asked twice, and no 0 for a judge that failed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from reward.hierarchy import Hierarchy
from reward.scorer import InProcessScorer
from reward.types import Item
from reward.verifiers import verify
from reward.verifiers.judge import JudgeConfig, JudgeModel, open_judge

PROMPT = ({"role": "user", "content": "Who wrote Emma?"},)
GOOD, BAD = "Jane Austen wrote it.", "I do not know."

Reply = Callable[[str, int], tuple[int, str]]


def said(text: str) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


@contextmanager
def server(reply: Reply) -> Iterator[tuple[str, list[dict]]]:
    """A local judge; reply gets the question and how many came before it."""
    asked: list[dict] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(asked)
                asked.append({"path": self.path, "auth": self.headers["authorization"], **body})
            status, text = reply(body["messages"][0]["content"], number)
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())
            except BrokenPipeError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", asked
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def judge(url: str, **changes: object) -> JudgeModel:
    given = {"url": url, "model": "m", "retry_wait_s": 0.0, "retries": 1, "timeout_s": 5.0}
    return JudgeModel(JudgeConfig.model_validate(given | changes), api_key="k")


def item(response: str = GOOD, answer: str = BAD) -> Item:
    return Item(PROMPT, response, answer=answer, verifier="judge")


def knows(question: str, _: int) -> tuple[int, str]:
    """Prefers the answer that names the author, wherever it stands."""
    first, second = (question.split(f"<answer_{side}>")[1] for side in "ab")
    good = ["Austen" in part.split("</answer")[0] for part in (first, second)]
    verdict = "tie" if good[0] == good[1] else "A" if good[0] else "B"
    return said(f"Because.\nVerdict: {verdict}")


def test_the_better_answer_wins_in_both_orders_and_equal_ones_tie():
    with server(knows) as (url, asked):
        one = judge(url)
        values = [one.verify(item(*sides)).value for sides in ((GOOD, BAD), (BAD, GOOD))]
        assert values == [1.0, 0.0]
        assert one.verify(item(GOOD, GOOD + " Yes.")).value == 0.5
    assert asked[0]["path"] == "/v1/chat/completions"
    assert (asked[0]["auth"], asked[0]["model"], asked[0]["temperature"]) == ("Bearer k", "m", 0.0)


def test_a_judge_that_loves_a_place_says_nothing():
    with server(lambda *_: said("Verdict: A")) as (url, _):
        verdict = judge(url).verify(item())
    assert verdict.valid
    assert verdict.value == 0.5
    assert verdict.reason.endswith("its word changed with the order")


def test_nothing_is_asked_twice_not_even_by_the_next_run(tmp_path):
    cache = str(tmp_path / "judge.jsonl")
    with server(knows) as (url, asked):
        first = judge(url, cache=cache)
        assert [first.verify(item()).value for _ in range(3)] == [1.0] * 3
        assert len(asked) == 2
        assert judge(url, cache=cache).verify(item()).value == 1.0
        # The same two answers the other way round are the same two questions.
        assert judge(url, cache=cache).verify(item(BAD, GOOD)).value == 0.0
        assert len(asked) == 2
        assert judge(url, cache=cache, model="other").verify(item()).value == 1.0
        assert len(asked) == 4
    (tmp_path / "judge.jsonl").write_text("no\n")
    with pytest.raises(ValueError, match=r"judge\.jsonl:1: no kept answer"):
        judge(url, cache=cache)


def slow(question: str, number: int) -> tuple[int, str]:
    time.sleep(0.3)
    return said("Verdict: A")


FAILURES = {
    "timeout": (slow, "no answer from http"),
    "error": (lambda *_: (500, "broken"), "status 500: 'broken'"),
    "refusal": (lambda *_: (401, "who are you"), "status 401"),
    "babble": (lambda *_: said("Both are so nice! A or B, who knows."), "no verdict in"),
    "two words": (lambda *_: said("Verdict: A\nVerdict: B"), "two verdicts in"),
    "no json": (lambda *_: (200, "<html>"), "no chat completion"),
    "no text": (
        lambda *_: (200, json.dumps({"choices": [{"message": {"content": None}}]})),
        "no text in the chat completion",
    ),
    "one order": (lambda q, n: said("Verdict: A") if n == 0 else (500, "late"), "status 500"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_judge_that_failed_gives_no_verdict_and_never_0(name):
    reply, reason = FAILURES[name]
    with server(reply) as (url, _):
        verdict = judge(url, timeout_s=0.1 if name == "timeout" else 5.0).verify(item())
    assert not verdict.valid
    assert reason in verdict.reason


def test_nobody_at_the_url_is_no_verdict():
    with server(knows) as (url, _):
        pass
    verdict = judge(url).verify(item())
    assert not verdict.valid
    assert "ConnectError" in verdict.reason


def test_a_babble_is_not_kept_and_a_full_queue_is_asked_again():
    def reply(question: str, number: int) -> tuple[int, str]:
        return (429, "busy") if number < 2 else knows(question, number)

    with server(reply) as (url, asked):
        assert judge(url, retries=3).verify(item()).value == 1.0
        assert len(asked) == 4
    # Not by number: the first verdict may be there before the other order has been asked.
    babbling = threading.Event()
    babbling.set()
    with server(lambda q, n: said("Hm.") if babbling.is_set() else knows(q, n)) as (url, _):
        one = judge(url)
        assert not one.verify(item()).valid
        babbling.clear()
        assert one.verify(item()).value == 1.0


def test_a_scorer_asks_it_and_an_unknown_is_left_out_of_the_group():
    tree = Hierarchy.model_validate(
        {"dimensions": {"helpfulness": {"signals": {"taste": {"verifiers": ["judge"]}}}}}
    )
    with server(knows) as (url, _):
        scores = InProcessScorer(tree, judge=judge(url)).score([item(), item(BAD, GOOD)])
        assert [score.value for score in scores] == [1.0, 0.0]
    broken = InProcessScorer(tree, judge=judge(url)).score([item()])[0]
    assert not broken.valid
    without = InProcessScorer(tree).score([item()])[0]
    assert not without.valid
    assert "no judge model is given" in without.reason


def test_a_judge_has_both_a_url_and_a_model():
    with pytest.raises(ValueError, match="needs both its URL 'http://a/v1' and its model ''"):
        open_judge("http://a/v1", "")
    assert open_judge("", "") is None


def test_a_reference_is_needed():
    with server(knows) as (url, _), pytest.raises(ValueError, match=r"give Item\.answer"):
        verify(item(answer=" "), judge=judge(url))
