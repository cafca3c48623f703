"""The `openai` client against a worker on a real port: what it gets, and what it is told."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
import torch

from model import Packed
from tests.align import small
from tests.rollout.live import MAX_TOKENS, TOKENIZER, Live, is_idle, make_worker, served
from tests.serving.live import wait_for

PROMPT = "the cat sat on"
CHAT = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with served(make_worker(small.model())) as found:
        yield found


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def free_memory(live: Live) -> tuple[int, int]:
    """Slots and pages that nobody holds."""
    cache = live.worker.driver.engine._runner.cache
    return len(cache.free_slots), len(cache.free_pages)


def test_a_completion_carries_what_was_asked(client: openai.OpenAI, live: Live):
    asked = {"model": "small", "prompt": PROMPT, "max_tokens": 12, "seed": 5}
    more = {"return_token_ids": True}
    found = client.completions.create(**asked, n=3, logprobs=0, extra_body=more)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    prompt = TOKENIZER(PROMPT).input_ids
    assert found.prompt_token_ids == [prompt]
    assert found.usage.prompt_tokens == len(prompt)
    assert found.usage.completion_tokens == sum(len(c.token_ids) for c in found.choices)
    assert found.policy_version == 0
    model = live.worker.driver.engine.model
    for choice in found.choices:
        row = [*prompt, *choice.token_ids]
        with torch.no_grad():
            exact = model(packed=Packed.from_sequences([row]), targets=torch.tensor([*row[1:], 0]))
        expected = exact.logprobs[len(prompt) - 1 : -1].tolist()
        assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-5)
        assert choice.finish_reason in ("stop", "length")
    again = client.completions.create(**asked, n=3)
    assert [c.text for c in again.choices] == [c.text for c in found.choices]
    by_ids = client.completions.create(**asked | {"prompt": prompt})
    assert by_ids.choices[0].text == found.choices[0].text
    assert len({c.text for c in found.choices}) > 1


def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI):
    asked = {"model": "small", "prompt": [PROMPT, "and the hat"], "max_tokens": 20, "seed": 1}
    more = {"return_token_ids": True}
    whole = client.completions.create(**asked, n=2, extra_body=more)
    texts, tokens, ends, usage = [""] * 4, [[] for _ in range(4)], [None] * 4, None
    for event in client.completions.create(
        **asked, n=2, stream=True, stream_options={"include_usage": True}, extra_body=more
    ):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.token_ids
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.token_ids for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_chat_streams_and_gives_logprobs(client: openai.OpenAI):
    asked = {"model": "small", "messages": CHAT, "max_completion_tokens": 10, "seed": 3}
    whole = client.chat.completions.create(**asked, logprobs=True)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    assert all(one.logprob < 0 for one in choice.logprobs.content)
    events = [*client.chat.completions.create(**asked, stream=True)]
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(e.choices[0].delta.content for e in events) == choice.message.content


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI):
    asked = {"model": "small", "prompt": PROMPT, "max_tokens": 40, "seed": 2}
    text = client.completions.create(**asked).choices[0].text
    stop = text[7:9]
    cut = client.completions.create(**asked, stop=[stop, "never seen"]).choices[0]
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    pieces = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(c.text for event in pieces for c in event.choices) == cut.text


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, r"model = 'gpt', expected 'small'"),
        (
            {"prompt": "the cat " * 60},
            openai.BadRequestError,
            r"a prompt of \d+ tokens and a respo",
        ),
        ({"prompt": ""}, openai.BadRequestError, "an empty prompt"),
        ({"prompt": []}, openai.BadRequestError, "an empty list of prompts"),
        (
            {"prompt": [5, 10**6]},
            openai.BadRequestError,
            "token 1000000 is outside the model's voc",
        ),
        ({"max_tokens": MAX_TOKENS}, openai.BadRequestError, "shorten the prompt or max_tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens: .* greater than or equal to 1"),
        ({"temperature": -1}, openai.BadRequestError, "temperature: .* greater than or equal to 0"),
        ({"top_p": 0}, openai.BadRequestError, "top_p: .* greater than 0"),
        ({"n": 0}, openai.BadRequestError, "n: .* greater than or equal to 1"),
        ({"n": 2000}, openai.BadRequestError, "n: .* less than or equal to 1024"),
        ({"stop": ""}, openai.BadRequestError, "an empty stop string"),
        ({"logprobs": 5}, openai.BadRequestError, "logprobs"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty"),
        ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature: Extra inputs"),
        ({"extra_body": {"top_k": -1}}, openai.BadRequestError, "top_k"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_said_in_one_line(
    client: openai.OpenAI, live: Live, changes: dict, kind: type, message: str, stream: bool
):
    asked = {"model": "small", "prompt": PROMPT, "max_tokens": 4, "stream": stream}
    with pytest.raises(kind, match=message) as caught:
        client.completions.create(**asked | changes)
    assert "\n" not in caught.value.body["message"]
    assert is_idle(live)


def test_a_cancelled_stream_and_a_cancelled_call_free_their_slots(
    live: Live, client: openai.OpenAI
):
    client.completions.create(model="small", prompt=PROMPT, max_tokens=2)
    before = free_memory(live)
    for _ in range(5):
        stream = client.completions.create(
            model="small", prompt=PROMPT, max_tokens=MAX_TOKENS - 20, n=7, stream=True
        )
        next(iter(stream))
        stream.close()
    wait_for(lambda: is_idle(live))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(
            model="small", prompt=PROMPT, max_tokens=MAX_TOKENS - 20, n=7
        )
    wait_for(lambda: is_idle(live))
    assert free_memory(live) == before


def test_more_than_the_queue_holds_is_refused_for_now_or_for_ever():
    # long enough to be live still when the last one asks, however busy the machine; then left
    worker = make_worker(small.model(), max_slots=64, max_samples=4, max_tokens=4000)
    with served(worker) as live:
        # greedy: a draw might be the end of the turn
        asked = {"model": "small", "prompt": PROMPT, "max_tokens": 3900, "temperature": 0}
        with httpx.Client(base_url=live.url) as http:
            never = http.post("/v1/completions", json=asked | {"n": 5})
            assert never.status_code == 400
            with http.stream(
                "POST", "/v1/completions", json=asked | {"n": 4, "stream": True}
            ) as one:
                # held: what reads the answer hangs up when it is let go
                lines = one.iter_lines()
                next(lines)
                full = http.post("/v1/completions", json=asked)
            assert (full.status_code, full.headers["retry-after"]) == (429, "1")
            assert "4 of 4 samples are queued or live" in full.json()["error"]["message"]


def test_a_key_a_size_and_a_path_are_checked_at_the_door():
    worker = make_worker(small.model(), api_key="k1", max_body_bytes=1000)
    with served(worker) as live, httpx.Client(base_url=live.url) as http:
        assert http.get("/health").json()["status"] == "ok"
        assert http.get("/v1/models").status_code == 401
        keyed = {"authorization": "Bearer k1"}
        assert http.get("/v1/models", headers=keyed).json()["data"][0]["id"] == "small"
        long = http.post("/v1/completions", headers=keyed, content=b"x" * 1001)
        assert (long.status_code, long.json()["error"]["code"]) == (413, "too_large")
        bad = http.post("/v1/completions", headers=keyed, content=b"{")
        assert (bad.status_code, bad.json()["error"]["type"]) == (400, "invalid_request_error")
        for body, status in (([b"{}"], 400), ([b"x" * 600] * 2, 413)):
            chunked = http.post("/v1/completions", headers=keyed, content=iter(body))
            assert chunked.status_code == status
        assert http.get("/nothing", headers=keyed).json()["error"]["code"] == "not_found"
        text = http.get("/metrics").text
        assert 'rollout_requests_total{endpoint="/v1/models",status="401"} 1.0' in text


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind(live: Live):
    """A third are answered, a third cancelled in mid-stream, a third refused."""
    base = {"model": "small", "prompt": [5, 6, 7], "max_tokens": 3}
    driver = live.worker.driver
    with httpx.Client(base_url=live.url, timeout=60) as http:
        http.post("/v1/completions", json=base)
        before = free_memory(live)
        for number in range(10_000):
            if number % 3 == 0:
                assert http.post("/v1/completions", json=base).status_code == 200
            elif number % 3 == 1:
                asked = base | {"stream": True, "max_tokens": 80}
                with http.stream("POST", "/v1/completions", json=asked) as answer:
                    next(answer.iter_lines())
            else:
                assert http.post("/v1/completions", json=base | {"n": 2000}).status_code == 400
    wait_for(lambda: is_idle(live))
    assert free_memory(live) == before
    assert not driver._tickets
    assert not driver.engine._cancelled
