"""Admission: order, limits, and that everything reserved comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.native.scheduler import Limits, Sample, Scheduler, demand
from rollout.types import Request, Sampling


def request(name: str, prompt: int, new: int, samples: int = 1) -> Request:
    return Request(name, (1,) * prompt, Sampling(max_new_tokens=new), num_samples=samples)


def names(samples: list[Sample]) -> list[tuple[str, int]]:
    return [(sample.group.request.request_id, sample.index) for sample in samples]


def test_groups_start_in_order_and_the_rest_waits():
    plan = Scheduler([request("a", 3, 4, 2), request("b", 3, 4, 2)], Limits(3, 100, 8))
    first = plan.admit()
    # one slot is free, but b's parked prompt would need a second one for its first sample
    assert names(first) == [("a", 0), ("a", 1)]
    assert plan.admit() == []
    plan.end(first[:1])
    assert names(plan.admit()) == [("b", 0), ("b", 1)]
    assert not plan.waiting


def test_a_group_larger_than_the_slots_starts_in_parts_beside_its_parked_prompt():
    plan = Scheduler([request("a", 3, 4, 5)], Limits(3, 100, 8))
    first = plan.admit()
    assert names(first) == [("a", 0), ("a", 1)]
    plan.end(first[:1])
    second = plan.admit()
    assert names(second) == [("a", 2)]
    plan.end(first[1:] + second)
    # two slots are free, and the last sample takes over the prompt's
    assert names(plan.admit()) == [("a", 3), ("a", 4)]
    assert not plan.waiting


def test_freed_slots_are_collected_so_that_prompts_are_prefilled_together():
    plan = Scheduler([request("a", 3, 4) for _ in range(40)], Limits(32, 400, 8))
    live = plan.admit()
    assert len(live) == 32
    plan.end(live[:3])
    assert plan.admit() == []
    plan.end(live[3:4])
    assert len(plan.admit()) == 4


def test_pages_limit_as_slots_do():
    # 20 prompt tokens: 2 shared pages of 8; 20 + 9 - 1 tokens: 2 pages of its own for each sample
    assert demand(request("a", 20, 9), 8) == (2, 2, 1)
    plan = Scheduler([request("a", 20, 9, 4)], Limits(100, 7, 8))
    first = plan.admit()
    # 3 for the parked prompt and 2 a sample; a third does not fit into the 7
    assert names(first) == [("a", 0), ("a", 1)]
    plan.end(first)
    assert names(plan.admit()) == [("a", 2), ("a", 3)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 20), st.integers(1, 6)),
        min_size=1,
        max_size=12,
    ),
    st.integers(2, 9),
    st.integers(14, 40),
    st.randoms(use_true_random=False),
)
def test_every_sample_runs_once_and_nothing_is_lost(shapes, slots, pages, random):
    requests = [request(str(i), *shape) for i, shape in enumerate(shapes)]
    plan = Scheduler(requests, Limits(slots, pages, 4))
    seen = []
    while plan.waiting or plan.live:
        seen += names(plan.admit())
        assert plan.live, "a scheduler with work must have something to run"
        parked = bool(plan.waiting and plan.waiting[0].num_started)
        assert len(plan.live) + parked <= slots
        assert plan.free_pages >= 0
        plan.end(random.sample(plan.live, random.randint(1, len(plan.live))))
    assert seen == [(str(i), k) for i, (_, _, n) in enumerate(shapes) for k in range(n)]
    assert plan.free_slots == plan.limits.num_slots
    assert plan.free_pages == plan.limits.num_pages


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("p7", 0, 4), "request 'p7': 0 prompt tokens, num_samples = 1; expected at least"),
        (request("p7", 3, 4, 0), "request 'p7': 3 prompt tokens, num_samples = 0; expected"),
        (
            request("p7", 60, 10),
            "request 'p7': a prompt of 60 tokens and max_new_tokens = 10 need 9 pages of 8 "
            "tokens, max_cache_tokens = 64 gives 8; set max_cache_tokens >= 72 or shorten",
        ),
        (
            request("p7", 3, 4, 3),
            "request 'p7': num_samples = 3 needs 2 slots (the prompt's and a sample's), "
            "max_slots = 1; set max_slots >= 2",
        ),
    ],
)
def test_a_request_that_can_never_run_is_refused_in_one_line(bad: Request, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        Scheduler([request("ok", 3, 4), bad], Limits(1, 8, 8))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
