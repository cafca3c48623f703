"""Batcher: packed = in process, order, limits, and that a broken judge is never a zero."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from reward.hierarchy import HIERARCHY
from reward.scorer import Encoded, Heads, InProcessScorer
from reward.serving.batching import Batcher
from reward.serving.types import (
    BrokenError,
    Limits,
    NeverFitsError,
    QueueFullError,
    Task,
    WrongItemsError,
)
from reward.types import Item, Verdict
from tests.reward.test_model import tiny
from tests.reward.test_scorer import encode, encode_prompt, item, scorer
from tests.serving.live import wait_for

ITEMS = [item("5" * (1 + 7 * n % 23), answer="5", verifier="math" * (n % 2)) for n in range(40)]


def tasks(items: list[Item]) -> list[Task]:
    return [Task(one) for one in items]


class Watch:
    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def forward(self, *, num_items: int, num_tokens: int, seconds: float) -> None:
        assert seconds >= 0
        self.sizes.append((num_items, num_tokens))


class Held(InProcessScorer):
    """A scorer whose forwards wait until they are let go."""

    def __init__(self) -> None:
        model = tiny()
        super().__init__(model.hierarchy, model, encode, encode_prompt=encode_prompt)
        self.go, self.inside = threading.Event(), threading.Event()

    def read_heads(self, batch: list[Encoded]) -> list[Heads]:
        self.inside.set()
        assert self.go.wait(30)
        return super().read_heads(batch)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_scores_are_those_of_the_scorer_in_order_whatever_shares_a_forward(batch_tokens):
    judge, watch = scorer(), Watch()
    batcher = Batcher(judge, Limits(batch_tokens=batch_tokens), watch=watch)
    futures = [batcher.submit(tasks(ITEMS[start : start + 7])) for start in range(0, 40, 7)]
    found = [one for future in futures for one in future.result(30)]
    batcher.close()
    whole = judge.score(ITEMS)
    assert len(found) == len(whole)
    for one, other in zip(found, whole, strict=True):
        assert one.score.value == pytest.approx(other.value, abs=1e-5)
        assert one.score.dimensions == pytest.approx(dict(other.dimensions), abs=1e-5)
        assert (one.score.version, set(one.score.signals)) == (other.version, set(other.signals))
    lengths = [len(encode(one)) for one in ITEMS]
    assert [one.num_tokens for one in found] == lengths
    assert sum(n for n, _ in watch.sizes) == 40
    assert sum(n for _, n in watch.sizes) == sum(lengths)
    assert all(n <= batch_tokens or items == 1 for items, n in watch.sizes)


def test_items_of_several_requests_share_a_forward():
    judge, watch = Held(), Watch()
    batcher = Batcher(judge, watch=watch)
    futures = [batcher.submit(tasks([item("5")]))]
    assert judge.inside.wait(30)
    futures += [batcher.submit(tasks([item("7" * n)])) for n in (1, 2, 3)]
    wait_for(lambda: batcher.queue_tokens == 6 + 6 + 7 + 8)
    judge.go.set()
    assert all(future.result(30)[0].score.valid for future in futures)
    batcher.close()
    assert watch.sizes == [(1, 6), (3, 21)]


def test_a_rule_that_blocks_holds_up_nobody_else():
    go = threading.Event()

    def rule(one: Item) -> dict[str, Verdict]:
        assert go.wait(30)
        return InProcessScorer().rule_signals([one])[0]

    batcher = Batcher(scorer(), rule=rule)
    slow = batcher.submit(tasks([item("5", answer="5", verifier="math")]))
    assert batcher.submit(tasks([item("5")])).result(30)[0].score.valid
    assert not slow.done()
    go.set()
    assert slow.result(30)[0].score.dimensions["correctness"] == 1.0
    batcher.close()


def test_a_full_queue_refuses_and_takes_again_once_there_is_room():
    judge = Held()
    batcher = Batcher(judge, Limits(queue_items=3, queue_tokens=10_000))
    first = batcher.submit(tasks([item("5"), item("6")]))
    with pytest.raises(QueueFullError, match="2 of 3 items") as refused:
        batcher.submit(tasks([item("5"), item("6")]))
    assert refused.value.retry_s == 1
    judge.go.set()
    first.result(30)
    wait_for(lambda: batcher.queue_items == 0)
    assert batcher.queue_tokens == 0
    assert len(batcher.submit(tasks([item("5")] * 3)).result(30)) == 3
    with pytest.raises(NeverFitsError, match=r"4 items .* at most 3"):
        batcher.submit(tasks([item("5")] * 4))
    batcher.close()


def test_tokens_are_limited_once_they_are_known():
    judge = Held()
    batcher = Batcher(judge, Limits(queue_tokens=12, item_tokens=12))
    first = batcher.submit(tasks([item("5")]))
    assert judge.inside.wait(30)
    with pytest.raises(QueueFullError, match="6 of 12 tokens"):
        batcher.submit(tasks([item("55")])).result(30)
    with pytest.raises(NeverFitsError, match="18 tokens"):
        batcher.submit(tasks([item("5")] * 3)).result(30)
    judge.go.set()
    assert first.result(30)[0].score.valid
    batcher.close()
    assert (batcher.queue_items, batcher.queue_tokens) == (0, 0)


def test_wrong_items_are_named_all_of_them():
    batcher = Batcher(scorer(), Limits(item_tokens=20))
    with pytest.raises(WrongItemsError) as refused:
        batcher.submit(
            tasks([item("5"), item("5" * 30), item("5", verifier="maths"), item("5" * 31)])
        ).result(30)
    assert [
        (one.index, one.code, one.num_tokens, one.max_tokens) for one in refused.value.items
    ] == [
        (1, "too_long", 35, 20),
        (2, "unknown_verifier", 0, 0),
        (3, "too_long", 36, 20),
    ]
    with pytest.raises(WrongItemsError, match=r"item 1: Item.answer = '' for verifier exact"):
        batcher.submit(tasks([item("5"), item("5", verifier="exact")])).result(30)
    assert batcher.submit(tasks([item("5")])).result(30)[0].score.valid
    batcher.close()
    assert batcher.queue_items == 0


def test_a_rule_outside_the_tree_is_named():
    tree = HIERARCHY.model_copy(
        update={"dimensions": {"harmlessness": HIERARCHY.dimensions["harmlessness"]}}
    )
    batcher = Batcher(InProcessScorer(tree))
    with pytest.raises(WrongItemsError, match="'math', but no signal of hierarchy default@"):
        batcher.submit(tasks([item("5", answer="5", verifier="math")])).result(30)
    batcher.close()


def test_a_judge_that_breaks_leaves_its_items_without_a_score(monkeypatch):
    judge = scorer()

    def break_(batch: list[Encoded]) -> list[Heads]:
        raise MemoryError("too small")

    def rule(one: Item) -> dict[str, Verdict]:
        raise OSError("no sandbox")

    batcher = Batcher(judge, rule=rule)
    (broken,) = batcher.submit(tasks([item("5", answer="5", verifier="math")])).result(30)
    assert (broken.score.valid, broken.score.reason) == (False, "math: OSError: no sandbox")
    with monkeypatch.context() as patch:
        patch.setattr(judge, "read_heads", break_)
        (broken,) = batcher.submit(tasks([item("5")])).result(30)
    assert not broken.score.valid
    assert broken.score.reason == "reward model: MemoryError: too small"
    assert broken.overall is None
    assert batcher.submit(tasks([item("5")])).result(30)[0].score.valid
    judge._model.values.weight.data.fill_(float("nan"))
    (broken,) = batcher.submit(tasks([item("5")])).result(30)
    assert not broken.score.valid
    assert "nan, expected a finite number" in broken.score.reason
    batcher.close()


def test_an_item_that_breaks_a_forward_does_not_spoil_its_neighbours():
    judge, watch = Held(), Watch()
    batcher = Batcher(judge, watch=watch)
    first = batcher.submit(tasks([item("5")]))
    assert judge.inside.wait(30)
    bad = batcher.submit([Task(item("5"), lambda: Encoded((1, 2), 2))])
    good = batcher.submit(tasks([item("77")]))
    wait_for(lambda: batcher.queue_tokens == 6 + 2 + 7)
    judge.go.set()
    assert first.result(30)[0].score.valid
    broken, fine = bad.result(30)[0].score, good.result(30)[0].score
    assert not broken.valid
    assert broken.reason.startswith("reward model: ValueError: sequence 0: prompt length 2")
    assert fine.value == pytest.approx(scorer().score([item("77")])[0].value, abs=1e-6)
    batcher.close()
    assert watch.sizes == [(1, 6), (2, 9)]


def test_closing_answers_what_is_queued_and_takes_no_more():
    judge = Held()
    batcher = Batcher(judge)
    futures = [batcher.submit(tasks([one])) for one in ITEMS]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    time.sleep(0.05)
    with pytest.raises(RuntimeError, match="the batcher is closed"):
        batcher.submit(tasks([item("5")]))
    assert closing.is_alive()
    judge.go.set()
    closing.join(30)
    assert all(future.done() and future.result()[0].score.valid for future in futures)


def test_a_scorer_of_rules_alone_needs_no_tokens():
    batcher = Batcher(InProcessScorer())
    right, nothing = batcher.submit(
        tasks([item("5", answer="5", verifier="math"), item("6")])
    ).result(30)
    assert (right.score.value, right.overall, right.num_tokens) == (1.0, None, 0)
    assert not nothing.score.valid
    batcher.close()


def test_limits_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match=r"Limits.batch_tokens = 0, expected 1 or more"):
        Limits(batch_tokens=0)
    with pytest.raises(ValueError, match=r"queue_tokens = 5, expected at least .* 8192"):
        Batcher(scorer(), Limits(queue_tokens=5))


class Faulty(InProcessScorer):
    """A scorer whose device fails, in one forward or for good."""

    def __init__(self, error: BaseException, *, is_lost: bool) -> None:
        model = tiny()
        super().__init__(model.hierarchy, model, encode, encode_prompt=encode_prompt)
        self.error, self.is_lost, self.forwards = error, is_lost, 0
        self.go = threading.Event()
        self.go.set()

    def read_heads(self, batch: list[Encoded]) -> list[Heads]:
        self.forwards += 1
        assert self.go.wait(30)
        if self.is_lost or any(len(one.tokens) > 10 for one in batch):
            raise self.error
        return super().read_heads(batch)

    def check_device(self) -> None:
        if self.is_lost:
            raise self.error


LOST = RuntimeError("CUDA error: device-side assert triggered")


def test_an_item_that_cannot_be_read_spoils_neither_its_neighbours_nor_the_service():
    judge = Faulty(torch.OutOfMemoryError("out of memory"), is_lost=False)
    batcher = Batcher(judge)
    found = batcher.submit(tasks([item("5"), item("5" * 20), item("6")])).result(30)
    assert [one.score.valid for one in found] == [True, False, True]
    assert found[1].score.reason == "reward model: OutOfMemoryError: out of memory"
    assert batcher.failure == ""
    assert batcher.submit(tasks([item("5")])).result(30)[0].score.valid
    batcher.close()


def test_a_lost_device_is_a_failure_for_all_who_wait_and_all_who_come():
    judge = Faulty(LOST, is_lost=True)
    judge.go.clear()
    batcher = Batcher(judge, Limits(batch_tokens=1))
    ruled = item("5", answer="5", verifier="math")
    waiting = [batcher.submit(tasks([one, one])) for one in (item("5"), ruled, item("6"))]
    judge.go.set()
    for future in waiting:
        with pytest.raises(BrokenError, match="device-side assert"):
            future.result(30)
    assert judge.forwards == 1
    assert batcher.failure == f"RuntimeError: {LOST}"
    with pytest.raises(BrokenError, match="device-side assert"):
        batcher.submit(tasks([item("5")]))
    assert (batcher.queue_items, batcher.queue_tokens) == (0, 0)
    batcher.close()


@pytest.mark.parametrize("error", [KeyError("watch"), SystemExit(1)])
def test_whatever_ends_the_reading_is_a_failure_and_nobody_waits_for_ever(error):
    class Broken(Watch):
        def forward(self, *, num_items: int, num_tokens: int, seconds: float) -> None:
            raise error

    batcher = Batcher(scorer(), watch=Broken())
    with pytest.raises(BrokenError, match=type(error).__name__):
        batcher.submit(tasks([item("5")])).result(30)
    assert batcher.failure.startswith(type(error).__name__)
    batcher.close()
