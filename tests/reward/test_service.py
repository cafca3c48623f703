"""The scoring API over HTTP: what it answers, what it refuses, and that it stays alive."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator

import httpx
import pytest
from starlette.testclient import TestClient

from reward.hierarchy import sigmoid
from reward.scorer import InProcessScorer
from reward.service import create_app
from reward.serving.judging import Service, Settings
from reward.serving.types import Limits
from reward.types import Item, Verdict
from reward.wire import ScoreItem
from tests.reward.live import served
from tests.reward.serving.test_batching import LOST, Faulty
from tests.reward.test_scorer import item, scorer
from tests.serving.live import wait_for

RIGHT = {"prompt": "2+3?", "response": "5", "answer": "5", "verifier": "math"}
FREE = {"messages": [{"role": "user", "content": "2+3?"}], "response": "6"}


@pytest.fixture(scope="module")
def judge() -> InProcessScorer:
    return scorer()


@pytest.fixture(scope="module")
def http(judge: InProcessScorer) -> Iterator[TestClient]:
    settings = Settings(
        limits=Limits(item_tokens=50, queue_items=8), max_body_bytes=4096, artifact="abc"
    )
    app = create_app(Service(judge, settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, *items: dict, **more) -> httpx.Response:
    return client.post("/v1/score", json={"items": items, **more})


def error(answer: httpx.Response) -> dict:
    found = answer.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"code", "message", "items"}
    return found["error"]


def test_a_score_is_the_scorers_down_to_the_signals(http, judge):
    answer = post(http, RIGHT, FREE)
    assert answer.status_code == 200
    told = answer.json()
    items = [ScoreItem.model_validate(one).to_item() for one in (RIGHT, FREE)]
    assert items[0] == item("5", answer="5", verifier="math")
    for got, wanted in zip(told["scores"], judge.score(items), strict=True):
        assert got["score"] == pytest.approx(wanted.value, abs=1e-6)
        assert got["dimensions"] == pytest.approx(dict(wanted.dimensions), abs=1e-6)
        assert set(got["signals"]) == set(wanted.signals)
        assert (got["valid"], got["num_tokens"]) == (True, 6)
    assert told["scores"][0]["signals"]["rule:math"] == {
        "value": 1.0,
        "valid": True,
        "reason": "5 equals 5",
    }
    assert told["judge"] == {
        "version": judge.version,
        "hierarchy": judge.hierarchy.version,
        "artifact": "abc",
        "calibrated": False,
    }
    assert len(told["id"]) == 32


def test_the_probability_is_the_sigmoid_of_the_total_or_the_calibration(http, judge):
    (heads,) = judge.read_heads([judge.encode(item("6"))])
    (told,) = post(http, FREE).json()["scores"]
    assert told["probability"] == pytest.approx(sigmoid(heads.overall), abs=1e-6)
    settings = Settings(calibrate=lambda total: 0.25 + 0 * total)
    with TestClient(create_app(Service(scorer(), settings))) as client:
        told = post(client, FREE).json()
    assert told["scores"][0]["probability"] == 0.25
    assert told["judge"]["calibrated"]
    with TestClient(create_app(Service(InProcessScorer()))) as client:
        (told,) = post(client, RIGHT).json()["scores"]
    assert (told["score"], told["probability"], told["num_tokens"]) == (1.0, None, 0)


def test_the_same_id_gives_the_same_answer_and_no_other_items(http):
    first, again = post(http, FREE, id="x1"), post(http, FREE, id="x1")
    assert first.content == again.content
    assert first.json()["id"] == "x1"
    other = post(http, RIGHT, id="x1")
    assert (other.status_code, error(other)["code"]) == (409, "reused_id")
    assert post(http, {**FREE, "response": " "}, id="x2").status_code == 422
    assert post(http, FREE, id="x2").status_code == 200


def test_get_reward_speaks_openrlhfs_form(http, judge):
    body = {"query": ["2+3?5", "2+3?", "2+3?6"], "prompts": ["2+3?"] * 3, "labels": ["", None, ""]}
    answer = http.post("/get_reward", json=body)
    assert answer.status_code == 200
    told = answer.json()
    five, six = judge.score([item("5"), item("6")])
    assert told["rewards"] == pytest.approx([five.value, 0.0, six.value], abs=1e-6)
    assert told["scores"] == told["rewards"]
    assert told["extra_logs"] == {"malformed": [0, 1, 0], "num_tokens": [6, 0, 6]}
    assert http.post("/get_reward", json={"query": ["a b"], "prompts": ["a"]}).status_code == 200


def test_labels_are_judged_by_the_rule_they_name_or_the_services(http):
    label = json.dumps({"verifier": "math", "answer": "5"})
    body = {"query": ["2+3?5", "2+3?6"], "prompts": ["2+3?"] * 2, "labels": [label, label]}
    right, wrong = http.post("/get_reward", json=body).json()["rewards"]
    assert right > wrong
    plain = http.post("/get_reward", json={**body, "labels": ["5", "5"]})
    assert plain.status_code == 422
    assert "start it with --label-verifier" in error(plain)["message"]
    app = create_app(Service(scorer(), Settings(label_verifier="math")))
    with TestClient(app) as client:
        told = client.post("/get_reward", json={**body, "labels": ["5", "5"]}).json()
    assert told["rewards"] == pytest.approx([right, wrong], abs=1e-6)
    with pytest.raises(ValueError, match=r"label_verifier = 'maths', expected a rule of the tree"):
        Service(scorer(), Settings(label_verifier="maths"))


def test_a_judge_that_failed_is_unknown_and_never_a_zero():
    def rule(one: Item) -> dict[str, Verdict]:
        raise OSError("no sandbox")

    with TestClient(create_app(Service(scorer(), Settings(rule=rule)))) as client:
        right, free = post(client, RIGHT, FREE).json()["scores"]
        label = json.dumps({"verifier": "math", "answer": "5"})
        body = {"query": ["2+3?5"], "prompts": ["2+3?"], "labels": [label]}
        refused = client.post("/get_reward", json=body)
        counted = client.get("/metrics").text
    assert (right["valid"], right["reason"]) == (False, "math: OSError: no sandbox")
    assert free["valid"]
    assert (refused.status_code, error(refused)["code"]) == (422, "no_verdict")
    assert "reward_invalid_scores_total 2.0" in counted


JSON = {"content-type": "application/json"}
LONE = b'{"items": [{"prompt": "\\ud800", "response": "b"}]}'


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b"", 422, "malformed", "Field required"),
        (b"\x00\xff\xfe", 400, "malformed", "pars"),
        (b"{", 400, "malformed", "not JSON: Expecting property name"),
        (b"[" * 4000, 400, "malformed", "pars"),
        (b"3", 422, "malformed", "valid dictionary"),
        (b'{"items": []}', 422, "malformed", "at least 1 item"),
        (LONE, 422, "malformed", "surrogates not allowed"),
        (LONE.replace(b"prompt", b"\\ud800"), 422, "malformed", "items.0"),
        (b'{"items": [{"prompt": "a"}]}', 422, "malformed", "items.0.response: Field required"),
        ({**FREE, "respnse": "b"}, 422, "malformed", "items.0.respnse: Extra inputs"),
        ({**FREE, "prompt": "a"}, 422, "malformed", "either messages or prompt"),
        ({**FREE, "messages": []}, 422, "malformed", "either messages or prompt"),
        (
            {**FREE, "messages": [{"role": "assistant", "content": "a"}]},
            422,
            "malformed",
            "the last message is the assistant's",
        ),
        ({**FREE, "response": "\n "}, 422, "empty", "item 0: the response is empty"),
        ({**FREE, "response": "5" * 60}, 422, "too_long", "65 tokens, longer than the limit of 50"),
        ({**FREE, "verifier": "maths"}, 422, "unknown_verifier", "no signal of hierarchy default@"),
        ({**FREE, "verifier": "exact"}, 422, "wrong_item", "Item.answer = '' for verifier exact"),
        (b"x" * 10_000_000, 413, "too_large", "longer than the limit of 4096 bytes"),
        (b"x" * 5_000, 413, "too_large", "longer than the limit of 4096 bytes"),
    ],
)
def test_bad_input_is_one_clear_refusal_and_the_service_lives_on(http, body, status, code, message):
    if isinstance(body, dict):
        body = json.dumps({"items": [body]}).encode()
    answer = http.post("/v1/score", content=body, headers=JSON)
    assert answer.status_code == status
    told = error(answer)
    assert told["code"] == code
    assert message in told["message"]
    assert post(http, FREE).status_code == 200


def test_a_refusal_names_every_item_at_fault(http):
    long = {**FREE, "response": "5" * 60}
    told = error(post(http, FREE, long, FREE, long))
    assert told["message"].endswith("(and 1 more)")
    assert [(one["index"], one["num_tokens"], one["max_tokens"]) for one in told["items"]] == [
        (1, 65, 50),
        (3, 65, 50),
    ]


def test_more_items_than_the_queue_holds_are_refused_for_good(http):
    answer = post(http, *[FREE] * 9)
    assert (answer.status_code, error(answer)["code"]) == (413, "too_large")
    assert "send them in parts" in error(answer)["message"]


def test_a_long_body_without_a_length_is_refused_as_well(http):
    answer = http.post("/v1/score", content=iter([b"x" * 3000] * 20), headers=JSON)
    assert (answer.status_code, error(answer)["code"]) == (413, "too_large")


def test_other_paths_and_methods_are_refused_in_the_same_form(http):
    missing, method = http.get("/v2/score"), http.get("/v1/score")
    assert (missing.status_code, error(missing)["code"]) == (404, "not_found")
    assert (method.status_code, error(method)["code"]) == (405, "method_not_allowed")
    body = {"query": ["a b"], "prompts": ["b"]}
    other = http.post("/get_reward", json=body)
    assert error(other)["message"] == "item 0: the query does not begin with its prompt"
    uneven = http.post("/get_reward", json={**body, "labels": ["", ""]})
    assert "2 labels for 1 queries" in error(uneven)["message"]


def test_the_key_is_asked_before_the_body_is_read():
    app = create_app(Service(InProcessScorer(), Settings(api_key="k1")))
    with TestClient(app) as client:
        for headers in ({}, {"authorization": "Bearer k2"}, {"authorization": "Basic !"}):
            answer = client.post("/v1/score", content=b"{", headers=headers)
            assert (answer.status_code, error(answer)["code"]) == (401, "unauthorized")
        ok = client.post(
            "/v1/score", json={"items": [RIGHT]}, headers={"authorization": "Bearer k1"}
        )
        assert ok.status_code == 200
        basic = client.post("/v1/score", json={"items": [RIGHT]}, auth=("anybody", "k1"))
        assert basic.status_code == 200
        assert client.get("/openapi.json").status_code == 401
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_a_full_queue_says_when_to_come_back():
    go, inside = threading.Event(), threading.Event()

    def rule(one: Item) -> dict[str, Verdict]:
        inside.set()
        assert go.wait(30)
        return InProcessScorer().rule_signals([one])[0]

    settings = Settings(limits=Limits(queue_items=1), rule=rule)
    with TestClient(create_app(Service(InProcessScorer(), settings))) as client:
        answers: list[httpx.Response] = []
        first = threading.Thread(target=lambda: answers.append(post(client, RIGHT)))
        first.start()
        assert inside.wait(30)
        full = post(client, RIGHT)
        assert (full.status_code, error(full)["code"]) == (429, "queue_full")
        assert full.headers["retry-after"] == "1"
        assert client.get("/health").json()["queue_items"] == 1
        go.set()
        first.join(30)
        assert answers[0].status_code == 200
        assert post(client, RIGHT).status_code == 200


def test_a_signal_lets_what_is_inside_be_answered_and_refuses_the_rest():
    go, inside = threading.Event(), threading.Event()

    def rule(one: Item) -> dict[str, Verdict]:
        inside.set()
        assert go.wait(30)
        return InProcessScorer().rule_signals([one])[0]

    with served(Service(InProcessScorer(), Settings(rule=rule))) as live:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(httpx.post(f"{live.url}/v1/score", json={"items": [RIGHT]}, timeout=30))

        first = threading.Thread(target=ask)
        first.start()
        assert inside.wait(30)
        live.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: httpx.get(f"{live.url}/health").status_code == 503)
        assert httpx.get(f"{live.url}/health").json()["status"] == "draining"
        refused = httpx.post(f"{live.url}/v1/score", json={"items": [RIGHT]})
        assert (refused.status_code, error(refused)["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "1"
        go.set()
        first.join(30)
        assert answers[0].json()["scores"][0]["score"] == 1.0
        live.thread.join(30)
        assert not live.thread.is_alive()


def test_a_lost_device_is_not_healthy_and_its_clients_wait_for_a_new_process():
    judge = Faulty(LOST, is_lost=False)
    with served(Service(judge)) as live:
        client = httpx.Client(base_url=live.url, timeout=30)
        assert client.post("/v1/score", json={"items": [FREE]}).status_code == 200
        assert client.get("/health").json()["status"] == "ok"
        judge.is_lost = True
        refused = client.post("/v1/score", json={"items": [FREE]})
        assert (refused.status_code, error(refused)["code"]) == (503, "broken")
        assert refused.headers["retry-after"] == "5"
        told = client.get("/health")
        assert told.status_code == 503
        assert (told.json()["status"], told.json()["reason"]) == ("broken", f"RuntimeError: {LOST}")
        # Even where no device is asked: what cannot judge all takes nothing.
        assert client.post("/v1/score", json={"items": [RIGHT]}).status_code == 503
        form = {"query": ["2+3?5"], "prompts": ["2+3?"]}
        assert client.post("/get_reward", json=form).status_code == 503


def test_metrics_count_what_happened():
    with TestClient(create_app(Service(scorer()))) as client:
        post(client, RIGHT, FREE)
        post(client, {**FREE, "response": ""})
        lines = client.get("/metrics").text.splitlines()
    wanted = {
        'reward_requests_total{endpoint="/v1/score",status="200"} 1.0',
        'reward_requests_total{endpoint="/v1/score",status="422"} 1.0',
        "reward_items_total 2.0",
        "reward_tokens_total 12.0",
        "reward_invalid_scores_total 0.0",
        "reward_queue_items 0.0",
        "reward_queue_tokens 0.0",
        "reward_batch_tokens_sum 12.0",
        "reward_batch_items_count 1.0",
        "reward_forward_seconds_count 1.0",
        'reward_request_seconds_count{endpoint="/v1/score"} 2.0',
    }
    assert wanted <= set(lines)


def test_every_example_in_the_openapi_is_answered(http):
    told = http.get("/openapi.json").json()
    assert set(told["paths"]) == {"/v1/score", "/get_reward", "/health", "/metrics"}
    assert {"401", "413", "422", "429", "503"} <= set(
        told["paths"]["/v1/score"]["post"]["responses"]
    )
    schemas = told["components"]["schemas"]
    answer = post(http, *schemas["ScoreItem"]["examples"])
    assert answer.status_code == 200
    for example in schemas["RewardRequest"]["examples"]:
        assert http.post("/get_reward", json=example).status_code == 200
