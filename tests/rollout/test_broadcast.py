"""Weights by broadcast: every bit arrives, or a worker says why not and refuses what is half."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from align.lora import LoraConfig, apply_lora
from rollout import broadcast as wire_room
from rollout import meeting
from rollout.broadcast import buckets, forms
from rollout.canary import ProofError
from rollout.client import RemoteEngine
from rollout.remote import BrokenPushError
from rollout.sync import checksums, outline, weights
from tests.align import small
from tests.align.trainers.test_grpo_workers import worker_process
from tests.helpers import slow
from tests.rollout.live import Live, make_worker, served
from tests.rollout.test_client import assert_same, native, requests

CPU = torch.device("cpu")


def send(engine: RemoteEngine, model: torch.nn.Module, version: int, stream: Any = None) -> None:
    given = weights(model) if stream is None else stream
    engine.broadcast(given, version, tensors=outline(model), device=CPU)


def opened(*lives: Live, **changes: Any) -> RemoteEngine:
    return RemoteEngine([live.url for live in lives], Path("unused"), **changes)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_outline_is_the_stream_without_its_numbers(adapted: bool, dtype: torch.dtype | None):
    model = small.model()
    policy = apply_lora(model, LoraConfig(rank=2, targets="all"), seed=0) if adapted else model
    stream = [(name, t.shape, t.dtype) for name, t in weights(policy, dtype=dtype)]
    assert outline(policy, dtype=dtype) == stream


@pytest.mark.parametrize("bucket_bytes", [10_001, *slow(1, 1 << 30)])
def test_a_broadcast_is_taken_by_all_and_proven(monkeypatch: pytest.MonkeyPatch, bucket_bytes: int):
    monkeypatch.setattr(meeting, "BUCKET_BYTES", bucket_bytes)
    with (
        served(make_worker(small.model(1), broadcasts=True)) as one,
        served(make_worker(small.model(2), broadcasts=True)) as two,
    ):
        engine, source = opened(one, two), small.model(3)
        send(engine, source, 7)
        assert [view.url for view in engine.views()] == [one.url, two.url]
        expected = native(source)
        expected.policy_version = 7
        assert_same(engine.generate(requests()), expected.generate(requests()))
        for view in engine.views():
            sent, held = view.sums()
            assert sent == held == checksums(weights(source))
        engine.close()


def test_types_and_sizes_of_every_kind_share_a_bucket():
    mixed = [("a", torch.Size([3]), torch.uint8), ("b", torch.Size([]), torch.float64)]
    (bucket,) = buckets(forms(mixed), 32)
    assert [tensor.num_bytes for tensor in bucket] == [3, 8]
    assert len([*buckets(forms(mixed), 31)]) == 2


def test_a_worker_that_does_not_take_them_says_so_and_keeps_what_it_has():
    with served(make_worker(small.model())) as live:
        engine = opened(live)
        with pytest.raises(ProofError, match="this worker takes no broadcasts; start it with"):
            send(engine, small.model(1), 1)
        assert live.worker.health().status == "ok"
        engine.close()
    with served(make_worker(small.model(), broadcasts=True)) as live:
        engine, other = opened(live), small.model(intermediate_size=24)
        with pytest.raises(
            ProofError,
            match=r"has shape .*, the model.s is .*stream the weights of the same config",
        ):
            send(engine, other, 1)
        assert live.worker.health().status == "ok"
        assert live.worker.holder.told().checksums == checksums(weights(small.model()))
        engine.close()


def test_a_store_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wire_room, "JOIN_S", 0.5)
    monkeypatch.setattr(meeting, "_own_address", lambda url: "127.0.0.2")
    with served(make_worker(small.model(), broadcasts=True)) as live:
        engine = opened(live)
        store = meeting.TCPStore

        class Elsewhere(store):
            @property
            def port(self) -> int:
                return 9

        monkeypatch.setattr(meeting, "TCPStore", Elsewhere)
        with pytest.raises(ProofError) as found:
            send(engine, small.model(1), 1)
        assert "the trainer's store at 127.0.0.2:9 cannot be reached: Dist" in str(found.value)
        assert "\n" not in str(found.value)
        assert live.worker.health().status == "ok"
        engine.close()


def breaking(model: torch.nn.Module, work: Any) -> Iterator[tuple[str, Tensor]]:
    """A stream in whose middle something happens."""
    whole = [*weights(model)]
    for place, pair in enumerate(whole):
        if place == len(whole) // 2:
            work()
        yield pair


def test_a_trainer_that_breaks_off_leaves_a_worker_that_refuses_until_a_whole_push(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(meeting, "BUCKET_BYTES", 1)

    def dies() -> None:
        raise RuntimeError("out of memory\nand more")

    with served(make_worker(small.model(), broadcasts=True)) as live:
        engine, source = opened(live), small.model(1)
        with pytest.raises(BrokenPushError, match="broke off: RuntimeError: out of memory") as told:
            send(engine, source, 1, breaking(source, dies))
        assert "\n" not in str(told.value)
        assert live.worker.health().status == "broken"
        asked = {"model": "small", "prompt": [1, 2]}
        answer = httpx.post(f"{live.url}/v1/completions", json=asked)
        assert answer.status_code == 503
        assert "the push of version 1 broke off" in answer.text
        send(engine, source, 2)
        assert live.worker.health().status == "ok"
        engine.close()


@pytest.mark.multi
def test_a_worker_killed_in_the_middle_of_a_push_is_left_out_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(meeting, "BUCKET_BYTES", 1)
    start, source = small.start(tmp_path / "start"), small.model(1)
    with (
        worker_process(start, tmp_path, "--broadcast") as (url, dying),
        served(make_worker(small.model(), broadcasts=True)) as live,
    ):
        engine = RemoteEngine([url, live.url], tmp_path, deadline_s=60)

        def kill() -> None:
            os.kill(dying.pid, signal.SIGKILL)
            dying.wait()

        with pytest.raises(BrokenPushError, match="the broadcast broke off: "):
            send(engine, source, 1, breaking(source, kill))
        assert live.worker.health().status == "broken"
        send(engine, source, 2)
        assert [view.url for view in engine.views()] == [live.url]
        expected = native(source)
        expected.policy_version = 2
        assert_same(engine.generate(requests(2)), expected.generate(requests(2)))
        engine.close()
