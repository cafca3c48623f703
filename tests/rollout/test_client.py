"""Several workers as one engine: nothing lost, nothing twice, and only proven weights."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from align.lora import LoraConfig, apply_lora
from rollout.canary import ProofError
from rollout.client import RemoteEngine
from rollout.native.engine import NativeEngine
from rollout.sync import adapter_config, adapter_weights, checksums, parts, weights
from rollout.types import Completion, Request, Sampling
from tests.align import small
from tests.rollout.live import is_idle, make_worker, served
from tests.serving.live import wait_for

SAMPLING = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.95)


def requests(number: int = 12) -> list[Request]:
    return [
        Request(f"p{n}", tuple(range(20 + n, 26 + 2 * n)), SAMPLING, num_samples=3)
        for n in range(number)
    ]


def native(model: Any) -> NativeEngine:
    return NativeEngine(model, max_slots=8, max_cache_tokens=2048)


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    """The same tokens; numbers differ by what shared their batch, in the last bits."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("request_id", "sample", "prompt", "tokens", "finish", "policy_version"):
            assert getattr(one, name) == getattr(other, name), name
        for name in ("logprobs", "filtered_logprobs", "kept_mass"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-5), name


def test_workers_give_what_the_engine_gives(tmp_path: Path):
    with served(make_worker(small.model())) as one, served(make_worker(small.model())) as two:
        engine = RemoteEngine([one.url, two.url], tmp_path)
        assert_same(engine.generate(requests()), native(small.model()).generate(requests()))
        assert engine.generate([]) == []
        told = [httpx.get(f"{live.url}/metrics").text for live in (one, two)]
        assert all('endpoint="/v1/generate",status="200"' in text for text in told)
        engine.close()
        with pytest.raises(RuntimeError, match="the engine is closed"):
            engine.generate(requests())


def test_experts_come_over_the_wire(tmp_path: Path):
    asked = [replace(request, return_experts=True) for request in requests(2)]
    with served(make_worker(small.model())) as live:
        engine = RemoteEngine([live.url], tmp_path)
        found, expected = engine.generate(asked), native(small.model()).generate(asked)
        engine.close()
    for one, other in zip(found, expected, strict=True):
        assert one.experts.dtype == torch.int16
        assert torch.equal(one.experts, other.experts)
        assert one.timings.prefill_s > 0


class Network(httpx.BaseTransport):
    """Breaks connections after the worker has answered, or before it was asked."""

    def __init__(self) -> None:
        self.inner = httpx.HTTPTransport()
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path != "/v1/generate":
            return self.inner.handle_request(request)
        key = json.loads(request.read())["id"]
        with self.lock:
            self.asked[key] += 1
            turn = self.asked[key]
        if turn == 1:
            raise httpx.ConnectError("lost on the way there", request=request)
        answer = self.inner.handle_request(request)
        answer.read()
        if turn == 2:
            raise httpx.ReadError("lost on the way back", request=request)
        return answer


def test_answers_lost_on_the_way_are_given_again_without_sampling(tmp_path: Path):
    network = Network()
    with served(make_worker(small.model())) as live:
        engine = RemoteEngine([live.url], tmp_path, transport=network)
        done = engine.generate(requests(4))
        assert_same(done, native(small.model()).generate(requests(4)))
        assert [*network.asked.values()] == [3] * 4
        tokens = sum(len(one.tokens) for one in done)
        assert f"rollout_tokens_total {tokens}.0" in httpx.get(f"{live.url}/metrics").text
        engine.close()


def test_a_push_is_taken_by_all_and_proven(tmp_path: Path):
    roots = {"weights_root": tmp_path}
    with (
        served(make_worker(small.model(1), **roots)) as one,
        served(make_worker(small.model(2), **roots)) as two,
    ):
        engine = RemoteEngine([one.url, two.url], tmp_path)
        source = small.model(3)
        engine.update_weights(weights(source), 7)
        assert [view.url for view in engine.views()] == [one.url, two.url]
        found = engine.generate(requests())
        expected = native(source)
        expected.policy_version = 7
        assert_same(found, expected.generate(requests()))
        for view in engine.views():
            assert_same(view.generate(requests(2)), found[:6])
        engine.close()


def test_an_adapter_is_pushed_alone_and_sampled_from(tmp_path: Path):
    base = small.start(tmp_path / "start")
    policy = apply_lora(small.model(), LoraConfig(rank=2), seed=0)
    with served(make_worker(small.model(), weights_root=tmp_path)) as live:
        engine = RemoteEngine([live.url], tmp_path / "pushes")
        for version in (1, 2):
            for tensor in adapter_weights(policy).values():
                # not so large that fp32 rounds log-probabilities by more than is asked for
                torch.nn.init.normal_(tensor, std=0.1)
            engine.update_adapter(
                adapter_weights(policy).items(),
                version,
                config=adapter_config(policy),
                expected=checksums(parts(policy)),
            )
            expected = native(policy.get_base_model())
            expected.policy_version = version
            assert_same(engine.generate(requests(3)), expected.generate(requests(3)))
        pushed = sorted((tmp_path / "pushes").glob("*/*.safetensors"))
        assert pushed[0].stat().st_size < (base / "model.safetensors").stat().st_size / 2
        with pytest.raises(ProofError, match="holds all weights, and this worker an adapter"):
            engine.update_weights(weights(small.model()), 3)
        engine.close()


def wrong_base(policy: Any) -> None:
    policy.get_base_model().lm_head.weight.data[3, 4] += 1


def test_an_adapter_on_another_base_is_caught(tmp_path: Path):
    policy = apply_lora(small.model(), LoraConfig(rank=2), seed=0)
    wrong_base(policy)
    with served(make_worker(small.model(), weights_root=tmp_path)) as live:
        engine = RemoteEngine([live.url], tmp_path)
        with pytest.raises(ProofError, match=r"first differing tensor: 'lm_head.weight' holds"):
            engine.update_adapter(
                adapter_weights(policy).items(),
                1,
                config=adapter_config(policy),
                expected=checksums(parts(policy)),
            )
        engine.close()


def test_a_worker_that_holds_something_else_is_caught(tmp_path: Path):
    worker = make_worker(small.model(1), weights_root=tmp_path)
    push = worker.holder.push

    def corrupting(path: Path, version: int) -> Any:
        push(path, version)
        worker.driver.engine.model.model.norm.weight.data[5] = 3.0
        return worker.holder.told()

    worker.holder.push = corrupting  # type: ignore[method-assign]
    with served(worker) as live:
        engine = RemoteEngine([live.url], tmp_path)
        with pytest.raises(
            ProofError, match=r"first differing tensor: 'model\.norm\.weight' holds"
        ):
            engine.update_weights(weights(small.model()), 1)
        engine.close()


def test_a_worker_that_started_anew_is_pushed_before_it_is_asked(tmp_path: Path):
    with served(make_worker(small.model(1), weights_root=tmp_path)) as live:
        engine = RemoteEngine([live.url], tmp_path)
        engine.update_weights(weights(small.model(2)), 5)
        # as a new process would: other weights, version 0
        live.worker.driver.between(
            lambda: live.worker.driver.engine.update_weights(weights(small.model(3)), 0)
        ).result()
        expected = native(small.model(2))
        expected.policy_version = 5
        assert_same(engine.generate(requests()), expected.generate(requests()))
        engine.close()


def test_closing_withdraws_what_is_under_way(tmp_path: Path):
    with served(make_worker(small.model())) as live:
        engine = RemoteEngine([live.url], tmp_path)
        long = [
            Request(f"p{n}", (5, 6, 7), Sampling(max_new_tokens=90), num_samples=6)
            for n in range(9)
        ]
        caught: list[Exception] = []

        def ask() -> None:
            try:
                engine.generate(long)
            except RuntimeError as error:
                caught.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: live.worker.driver.engine.num_in_flight > 20)
        began = time.monotonic()
        engine.close()
        thread.join()
        wait_for(lambda: is_idle(live))
        assert time.monotonic() - began < 5, "slots must not wait until nobody has asked for long"
        assert "the engine is closed" in str(caught[0])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": ()}, "0 prompt tokens"),
        ({"prompt": (5, 10**6)}, "token 1000000 is outside"),
        ({"sampling": Sampling(max_new_tokens=10**5)}, "max_cache_tokens"),
    ],
)
def test_a_request_that_can_never_run_is_an_error_of_the_caller(tmp_path: Path, bad, message: str):
    given = {"request_id": "p", "prompt": (5,)} | bad
    with served(make_worker(small.model())) as live:
        engine = RemoteEngine([live.url], tmp_path)
        with pytest.raises(ValueError, match=message):
            engine.generate([Request(**given), *requests(2)])
        engine.close()


def test_what_cannot_be_pushed_says_why(tmp_path: Path):
    closed = make_worker(small.model())
    elsewhere = make_worker(small.model(), weights_root=tmp_path / "other")
    for worker, message in (
        (closed, "this worker takes no weights; start it with --weights-root"),
        (elsewhere, "expected a folder below .*other"),
    ):
        with served(worker) as live:
            engine = RemoteEngine([live.url], tmp_path)
            with pytest.raises(ProofError, match=message):
                engine.update_weights(weights(small.model()), 1)
            engine.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"urls": []}, r"RemoteEngine.urls = \[\], expected one or more"),
        ({"urls": ["http://a", "http://a"]}, "each once"),
        ({"deadline_s": 0}, "deadline_s = 0, expected more than 0"),
        ({"num_connections": 0}, "num_connections = 0, expected >= 1"),
    ],
)
def test_a_client_that_cannot_work_is_refused(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RemoteEngine(**{"urls": ["http://a"], "folder": tmp_path} | changes)
