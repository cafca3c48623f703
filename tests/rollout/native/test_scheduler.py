"""Admission: order, limits, and that everything taken comes back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import DecodeCache, Packed, preset
from rollout.native.prefix import Prefixes
from rollout.native.scheduler import Limits, Piece, Scheduler
from rollout.native.sequence import Sample
from rollout.types import Request, Sampling

CONFIG = preset("tiny", num_hidden_layers=1, hidden_size=4, num_attention_heads=1, head_dim=2,
                num_key_value_heads=1, rotary_dim=2)  # fmt: skip
NONE = Prefixes(0, 8)


def request(name: str, prompt: int, new: int, samples: int = 1) -> Request:
    return Request(name, (1,) * prompt, Sampling(max_new_tokens=new), num_samples=samples)


def names(samples: list[Sample]) -> list[tuple[str, int]]:
    return [(sample.group.request.request_id, sample.index) for sample in samples]


class Run:
    """A scheduler and a cache whose model does nothing."""

    def __init__(self, requests: list[Request], limits: Limits) -> None:
        self.plan = Scheduler(limits)
        for each in requests:
            self.plan.add(each)
        self.cache = DecodeCache(
            CONFIG,
            num_slots=limits.num_slots,
            num_pages=limits.num_pages,
            page_tokens=limits.page_tokens,
        )

    def feed(self, slot: int, tokens: int) -> None:
        held = self.cache.lengths[slot]
        one = Packed.from_sequences([[0] * tokens])
        step = self.cache.begin((slot,), Packed(one.tokens, one.positions + held, one.lengths))
        step.end()

    def admit(self) -> tuple[list[Piece], list[Sample]]:
        pieces, started = self.plan.admit(self.cache, NONE)
        for piece in pieces:
            self.feed(piece.group.root, piece.end - piece.begin)
        for sample in started:
            group = sample.group
            is_last = sample.index == group.request.num_samples - 1
            sample.slot = group.root if is_last else self.cache.fork(group.root)
            sample.tokens.append(0)
            if is_last:
                group.root = -1
            self.plan.live.append(sample)
        return pieces, started

    def decode(self) -> list[Sample]:
        """One token each; those that reached their limit."""
        self.plan.make_room(self.cache, NONE)
        for sample in self.plan.live:
            self.feed(sample.slot, 1)
            sample.tokens.append(0)
        limit = {s: s.group.request.sampling.max_new_tokens for s in self.plan.live}
        return [sample for sample in self.plan.live if len(sample.tokens) >= limit[sample]]


def test_groups_start_in_order_and_the_rest_waits():
    run = Run([request("a", 3, 4, 2), request("b", 3, 4, 2)], Limits(3, 100, 8))
    _, first = run.admit()
    assert names(first) == [("a", 0), ("a", 1)]
    # b's prompt took the third slot, and its samples wait for another
    assert run.plan.waiting[0].root >= 0
    run.plan.end(first[:1], run.cache)
    assert names(run.admit()[1]) == [("b", 0), ("b", 1)]
    assert not run.plan.waiting


def test_a_group_larger_than_the_slots_starts_in_parts_beside_its_parked_prompt():
    run = Run([request("a", 3, 4, 5)], Limits(3, 100, 8))
    _, first = run.admit()
    assert names(first) == [("a", 0), ("a", 1)]
    run.plan.end(first[:1], run.cache)
    _, second = run.admit()
    assert names(second) == [("a", 2)]
    run.plan.end(first[1:] + second, run.cache)
    # two slots are free, and the last sample takes over the prompt's
    assert names(run.admit()[1]) == [("a", 3), ("a", 4)]
    assert not run.plan.waiting


def test_freed_slots_are_collected_so_that_prompts_are_prefilled_together():
    run = Run([request("a", 3, 4) for _ in range(40)], Limits(32, 400, 8))
    _, live = run.admit()
    assert len(live) == 32
    run.plan.end(live[:3], run.cache)
    assert run.admit() == ([], [])
    run.plan.end(live[3:4], run.cache)
    assert len(run.admit()[1]) == 4


def test_as_many_prompts_as_slots_all_start_before_one_ends():
    limits = Limits(32, 999, 8, prefill_tokens=32, chunk_tokens=32)
    run = Run([request("a", 8, 40) for _ in range(32)], limits)
    for turn in range(1, 9):
        assert len(run.admit()[1]) == 4
        assert len(run.plan.live) == 4 * turn
        run.decode()
    assert not run.plan.waiting


def test_a_long_prompt_begun_goes_on_whatever_else_waits():
    limits = Limits(32, 999, 8, prefill_tokens=32, chunk_tokens=32)
    run = Run([request("short", 8, 40)], limits)
    assert names(run.admit()[1]) == [("short", 0)]
    for new in (request("long", 90, 4), *(request("later", 8, 4) for _ in range(9))):
        run.plan.add(new)
    assert [piece.end for piece in run.admit()[0]] == [32]
    for _ in range(run.cache.num_free_slots - 1):
        run.cache.allocate()
    assert [piece.end for piece in run.admit()[0]] == [64]
    assert names(run.admit()[1]) == [("long", 0)]
    # one slot is free, and four would be taken together
    assert run.admit() == ([], [])


def test_who_stays_after_a_step_is_known_before_its_tokens():
    run = Run([request("a", 3, 3), request("b", 3, 9)], Limits(2, 4, 4))
    run.admit()
    assert names(run.plan.staying(run.cache)) == [("a", 0), ("b", 0)]
    run.decode()
    # a takes its last token in the step that runs
    assert names(run.plan.staying(run.cache)) == [("b", 0)]
    # c has no slot yet, and then it has one
    run.plan.add(request("c", 3, 3))
    assert names(run.plan.staying(run.cache)) == [("b", 0)]
    run.plan.end(run.plan.live[:1], run.cache)
    assert run.plan.staying(run.cache) == []
    run.plan.cancel(run.plan.waiting[0], run.cache)
    # b needs a page from its ninth token on, and none is free
    for _ in range(4):
        run.feed(run.plan.live[0].slot, 1)
    taken = [run.cache._take() for _ in range(run.cache.num_free_pages)]
    assert run.plan.staying(run.cache) == []
    run.cache.release(taken)
    assert names(run.plan.staying(run.cache)) == [("b", 0)]


def test_prompts_are_cut_at_fixed_places_and_the_budget_holds_a_turn():
    limits = Limits(9, 100, 8, prefill_tokens=20, chunk_tokens=16)
    run = Run([request("a", 10, 2), request("b", 40, 2), request("c", 5, 2)], limits)

    def cuts() -> list[tuple[str, int, int]]:
        return [(p.group.request.request_id, p.begin, p.end) for p in run.admit()[0]]

    assert cuts() == [("a", 0, 10)]
    assert cuts() == [("b", 0, 16)]
    assert cuts() == [("b", 16, 32)]
    assert cuts() == [("b", 32, 40), ("c", 0, 5)]


def test_the_youngest_pauses_when_pages_run_out_and_comes_back_first():
    run = Run([request("a", 7, 9), request("b", 7, 9), request("c", 7, 9)], Limits(9, 3, 8))
    _, first = run.admit()
    assert names(first) == [("a", 0), ("b", 0), ("c", 0)]
    run.decode()
    run.plan.end(first[2:], run.cache)
    # a and b need a second page each, and c left one
    run.decode()
    assert names(run.plan.swapped) == [("b", 0)]
    assert run.plan.swapped[0].saved is not None
    assert run.plan.num_in_flight == 2
    run.plan.add(request("d", 7, 9))
    assert run.admit() == ([], [])
    run.plan.end(first[:1], run.cache)
    assert names(run.admit()[1]) == [("d", 0)]
    assert names(run.plan.live) == [("b", 0), ("d", 0)]


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
    run = Run(requests, Limits(slots, pages, 4, prefill_tokens=12, chunk_tokens=8))
    seen = []
    for _ in range(10_000):
        if not run.plan.num_in_flight:
            break
        seen += names(run.admit()[1])
        ended = [
            s for s in run.plan.live if len(s.tokens) >= s.group.request.sampling.max_new_tokens
        ]
        run.plan.end(ended, run.cache)
        ended = run.decode() + random.sample(
            run.plan.live, int(random.random() < 0.1 and bool(run.plan.live))
        )
        run.plan.end(list(dict.fromkeys(ended)), run.cache)
        if random.random() < 0.05 and run.plan.groups:
            group = random.choice(list(run.plan.groups.values()))
            seen += names([s for s in run.plan.cancel(group, run.cache) if not s.tokens])
    assert sorted(seen) == [
        (str(i), k)
        for i, k in sorted(
            ((i, k) for i, (_, _, n) in enumerate(shapes) for k in range(n)),
            key=lambda x: (str(x[0]), x[1]),
        )
    ]
    assert run.cache.num_free_slots == slots
    assert run.cache.num_free_pages == pages


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
    plan = Scheduler(Limits(1, 8, 8))
    plan.add(request("ok", 3, 4))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        plan.add(bad)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert plan.num_in_flight == 1
