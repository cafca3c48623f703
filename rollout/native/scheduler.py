"""Who runs next: requests wait in order, take slots and pages, and give them back when they end.

A request is one prompt and a group of samples. The prompt is prefilled into one slot, its *root*;
each sample forks the root, and the last one takes it over, so a group of n holds n slots. If the
cache has no room for a whole group, the root stays parked and the rest start as others finish.

Pages are taken as they are needed. When none is free, the youngest sample goes to the host, bit for
bit (`Snapshot`), and comes back before anything new starts; the oldest is never stopped, so every
request ends. A parked root is forgotten, and prefilled again, only where the oldest sample alone
has no room beside it.

A prompt is cut at fixed places (multiples of `chunk_tokens`), whatever else there is to do, so that
its numbers do not depend on its neighbours.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model import DecodeCache
from rollout.native.prefix import Prefixes
from rollout.native.sequence import Group, Sample
from rollout.types import Request

# free pages that admission leaves to those already live: one for so many samples
SAMPLES_A_SPARE_PAGE = 4


@dataclass(frozen=True)
class Limits:
    """What a cache can hold, and how prompts are cut.

    Args:
        num_slots: sequences at once.
        num_pages: pages of keys and values.
        page_tokens: tokens a page.
        prefill_tokens: most prompt tokens a turn.
        chunk_tokens: prompts are cut at multiples of this, <= prefill_tokens.
    """

    num_slots: int
    num_pages: int
    page_tokens: int
    prefill_tokens: int = 16384
    chunk_tokens: int = 16384


@dataclass(frozen=True)
class Piece:
    """Tokens begin..end of a group's prompt, to be prefilled."""

    group: Group
    begin: int
    end: int


@dataclass(frozen=True)
class Stats:
    """State of an engine.

    Args:
        num_live: samples decoding.
        num_pauses: since the engine was made.
        num_prefix_tokens: prompt tokens that were not prefilled because they were known.
        num_free_slots, num_free_pages: of the cache.
    """

    num_live: int
    num_pauses: int
    num_prefix_tokens: int
    num_free_slots: int
    num_free_pages: int


class Scheduler:
    """Admits samples, first come first served, within the limits.

    Example:
        >>> plan = Scheduler(Limits(num_slots=4, num_pages=64, page_tokens=64))
        >>> plan.add(Request("a", (1, 2), num_samples=3)).order
        0
        >>> plan.num_in_flight
        3
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Group] = deque()
        self.live: list[Sample] = []
        self.swapped: list[Sample] = []
        self.num_pauses = 0
        self._num_added = 0
        # waiting for an eighth of the slots makes one prefill of many prompts out of many of one
        self.batch_slots = max(1, limits.num_slots // 8)

    @property
    def num_in_flight(self) -> int:
        """Samples queued or live."""
        waiting = sum(group.num_waiting for group in self.waiting)
        return waiting + len(self.live) + len(self.swapped)

    @property
    def groups(self) -> dict[int, Group]:
        """Those in flight, by order."""
        samples = (sample.group for sample in (*self.live, *self.swapped))
        return {group.order: group for group in (*self.waiting, *samples)}

    def add(self, request: Request) -> Group:
        """Queues a request.

        Raises:
            ValueError: if it could never run within the limits.
        """
        refuse_unless_it_fits(request, self.limits)
        group = Group(request, self._num_added)
        self._num_added += 1
        self.waiting.append(group)
        return group

    def admit(self, cache: DecodeCache, prefixes: Prefixes) -> tuple[list[Piece], list[Sample]]:
        """What this turn prefills, and which samples start after it."""
        self._resume(cache, prefixes)
        if self.swapped or not self._may_admit(cache):
            return [], []
        slots = cache.num_free_slots
        budget = self.limits.prefill_tokens
        pages = self._spare_pages(cache, prefixes)
        pieces: list[Piece] = []
        started: list[Sample] = []
        while self.waiting:
            group = self.waiting[0]
            if group.root < 0:
                needed = pages_of(len(group.request.prompt), self.limits.page_tokens)
                first = min(len(group.request.prompt), self.limits.chunk_tokens)
                if not slots or needed > pages or (pieces and first > budget):
                    break
                slots -= 1
                pages += self._open(group, cache, prefixes)
            for piece in self._pieces(group, budget, is_first=not pieces):
                needed = self._new_pages(piece)
                if needed > pages:
                    break
                pages, budget = pages - needed, budget - (piece.end - piece.begin)
                group.num_prefilled = piece.end
                pieces.append(piece)
            if group.num_prefilled < len(group.request.prompt):
                break
            while group.num_waiting:
                forks = group.num_waiting > 1
                needed = self._first_page(group, forks=forks)
                if slots < forks or needed > pages:
                    break
                slots, pages = slots - forks, pages - needed
                started.append(Sample(group, group.num_started))
                group.num_started += 1
            if group.num_waiting:
                break
            self.waiting.popleft()
        self._make_free(sum(map(self._new_pages, pieces)), cache, prefixes)
        return pieces, started

    def staying(self, cache: DecodeCache) -> list[Sample]:
        """Who decodes again after a step in flight, whatever its tokens are, short of a stop.

        Empty if something else may come first: a prompt, a sample that paused, a page to be freed.
        """
        if self.swapped or self._may_admit(cache):
            return []
        staying = [
            sample
            for sample in self.live
            if len(sample.tokens) + 1 < sample.group.request.sampling.max_new_tokens
        ]
        needy = cache.needy([sample.slot for sample in staying])
        return staying if len(needy) <= cache.num_free_pages else []

    def _may_admit(self, cache: DecodeCache) -> bool:
        if not self.waiting or not self.live:
            return bool(self.waiting)
        first = self.waiting[0]
        if first.root >= 0 and first.num_prefilled < len(first.request.prompt):
            return True
        wanted = min(self.batch_slots, sum(group.num_waiting for group in self.waiting))
        # a root holds the slot of its group's last sample
        return cache.num_free_slots + (first.root >= 0 and first.num_waiting == 1) >= wanted

    def make_room(self, cache: DecodeCache, prefixes: Prefixes) -> None:
        """Frees pages until every live sample can take a token."""
        while True:
            needy = cache.needy([sample.slot for sample in self.live])
            if len(needy) <= cache.num_free_pages:
                return
            if prefixes.drop_oldest(cache):
                continue
            if len(self.live) > 1:
                youngest = max(self.live, key=lambda sample: sample.age)
                youngest.saved = cache.save(youngest.slot)
                cache.free(youngest.slot)
                youngest.slot = -1
                self.live.remove(youngest)
                self.swapped.append(youngest)
                self.num_pauses += 1
            else:
                assert self._forget_roots(cache), "a request that fits alone has room alone"

    def end(self, ended: Sequence[Sample], cache: DecodeCache) -> None:
        """Gives back what these samples hold."""
        if not ended:
            return
        gone = set(ended)
        self.live = [sample for sample in self.live if sample not in gone]
        self.swapped = [sample for sample in self.swapped if sample not in gone]
        for sample in ended:
            sample.saved = None
            if sample.slot >= 0:
                cache.free(sample.slot)
                sample.slot = -1

    def cancel(self, group: Group, cache: DecodeCache | None) -> list[Sample]:
        """Ends a group now; all of its samples that had not ended, in order."""
        samples = [s for s in (*self.live, *self.swapped) if s.group is group]
        samples += [Sample(group, k) for k in range(group.num_started, group.request.num_samples)]
        if group in self.waiting:
            self.waiting.remove(group)
        group.num_started = group.request.num_samples
        if cache is not None:
            if group.root >= 0:
                cache.free(group.root)
            self.end(samples, cache)
        group.forget()
        return sorted(samples, key=lambda sample: sample.age)

    def _resume(self, cache: DecodeCache, prefixes: Prefixes) -> None:
        for sample in sorted(self.swapped, key=lambda sample: sample.age):
            assert sample.saved is not None, "a paused sample was saved"
            like, shared = self._sibling(sample)
            needed = sample.saved.num_pages - shared + 1
            self._make_free(needed, cache, prefixes)
            if not self.live:
                while sample.saved.num_pages - shared > cache.num_free_pages:
                    # roots may hold the sibling's pages: then nothing is left to share
                    assert self._forget_roots(cache), "a request that fits alone has room alone"
                    like, shared = self._sibling(sample)
            elif not cache.num_free_slots or needed > self._spare_pages(cache, prefixes):
                return
            sample.slot = cache.load(sample.saved, like=like, shared=shared)
            sample.saved = None
            self.swapped.remove(sample)
            self.live.append(sample)

    def _sibling(self, sample: Sample) -> tuple[int, int]:
        """A slot that holds the same prompt, and how many of its pages are full of it."""
        group = sample.group
        full = len(group.request.prompt) // self.limits.page_tokens
        slots = [other.slot for other in self.live if other.group is group]
        if group.root >= 0 and group.num_prefilled == len(group.request.prompt):
            slots.append(group.root)
        return (slots[0], full) if slots else (-1, 0)

    def _spare_pages(self, cache: DecodeCache, prefixes: Prefixes) -> int:
        """Pages for whoever is new."""
        held = -(-len(self.live) // SAMPLES_A_SPARE_PAGE)
        return cache.num_free_pages + prefixes.num_droppable(cache) - held

    def _make_free(self, needed: int, cache: DecodeCache, prefixes: Prefixes) -> None:
        """Frees pages by forgetting what is known of prompts, as far as that goes."""
        while needed > cache.num_free_pages and prefixes.drop_oldest(cache):
            pass

    def _open(self, group: Group, cache: DecodeCache, prefixes: Prefixes) -> int:
        """Gives a group its root, with what is known of its prompt; pages fewer to spare."""
        before = prefixes.num_droppable(cache)
        group.root = cache.allocate()
        group.num_prefilled = prefixes.enter(group, cache)
        group.began = group.began or time.perf_counter()
        return prefixes.num_droppable(cache) - before

    def _pieces(self, group: Group, budget: int, *, is_first: bool) -> Iterator[Piece]:
        """What is left of a prompt, as far as the budget goes; one piece however small that is."""
        chunk, length = self.limits.chunk_tokens, len(group.request.prompt)
        begin = group.num_prefilled
        while begin < length:
            end = min(length, (begin // chunk + 1) * chunk)
            if end - begin > budget and not is_first:
                return
            yield Piece(group, begin, end)
            budget, begin, is_first = budget - (end - begin), end, False

    def _new_pages(self, piece: Piece) -> int:
        size = self.limits.page_tokens
        return pages_of(piece.end, size) - pages_of(piece.begin, size)

    def _first_page(self, group: Group, *, forks: bool) -> int:
        """Whether a sample's first token of its own takes a page."""
        grows = group.request.sampling.max_new_tokens > 1
        starts_page = len(group.request.prompt) % self.limits.page_tokens == 0
        return int(grows and (forks or starts_page))

    def _forget_roots(self, cache: DecodeCache) -> bool:
        """Frees parked and half filled prompts; they are prefilled again when their turn comes."""
        roots = [group for group in self.waiting if group.root >= 0]
        for group in roots:
            cache.free(group.root)
            group.forget()
        return bool(roots)


def pages_of(tokens: int, page_tokens: int) -> int:
    return -(-tokens // page_tokens)


def refuse_unless_it_fits(request: Request, limits: Limits) -> None:
    """Raises ValueError in one line if the request is empty or can never run."""
    if not request.prompt or request.num_samples < 1:
        raise ValueError(
            f"request {request.request_id!r}: {len(request.prompt)} prompt tokens, num_samples = "
            f"{request.num_samples}; expected at least 1 of each"
        )
    is_group = request.num_samples > 1
    prompt, new = len(request.prompt), request.sampling.max_new_tokens
    # the last token is never fed back
    alone = pages_of(prompt + new - 1, limits.page_tokens)
    pages = max(alone, pages_of(prompt, limits.page_tokens) + (is_group and new > 1))
    slots = 1 + is_group
    if slots > limits.num_slots:
        raise ValueError(
            f"request {request.request_id!r}: num_samples = {request.num_samples} needs {slots} "
            f"slots (the prompt's and a sample's), max_slots = {limits.num_slots}; "
            f"set max_slots >= {slots}"
        )
    if pages > limits.num_pages:
        raise ValueError(
            f"request {request.request_id!r}: a prompt of {prompt} tokens and max_new_tokens = "
            f"{new} need {pages} pages of {limits.page_tokens} tokens, max_cache_tokens = "
            f"{limits.num_pages * limits.page_tokens} gives {limits.num_pages}; set "
            f"max_cache_tokens >= {pages * limits.page_tokens} or shorten the prompt or response"
        )
