"""Who runs next: requests wait in order, take slots and pages, and give them back when they end.

A request is one prompt and a group of samples. The prompt is prefilled into one slot, its *root*;
each sample forks the root, and the last one takes it over, so a group of n holds n slots. If the
cache has no room for a whole group, the root stays parked and the rest start as others finish.

Pages are reserved for the longest possible response, so a started sequence never runs out: with
p tokens of prompt, m new ones and pages of z tokens, floor(p / z) pages are shared by the group and
each sample owns ceil((p + m - 1) / z) - floor(p / z) (the last token is never fed back).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rollout.types import Completion, Finish, Request


@dataclass(frozen=True)
class Limits:
    """What a cache can hold.

    Args:
        num_slots: sequences at once.
        num_pages: pages of keys and values.
        page_tokens: tokens a page.
    """

    num_slots: int
    num_pages: int
    page_tokens: int


@dataclass(eq=False)
class Group:
    """A request on its way.

    Args:
        order: place of the request among all.
        root: slot of the prefilled prompt; -1 before prefill and once the last sample took it.
        logits: [V] fp32 after the last prompt token, shared by all samples; None before prefill.
        num_started, num_ended: samples.
    """

    request: Request
    order: int
    root: int = -1
    logits: Tensor | None = None
    num_started: int = 0
    num_ended: int = 0

    @property
    def is_last_started(self) -> bool:
        return self.num_started == self.request.num_samples


@dataclass(eq=False)
class Sample:
    """One response on its way; slot is -1 while it holds none."""

    group: Group
    index: int
    slot: int = -1
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    filtered_logprobs: list[float] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)

    def take(self, token: int, logprob: float, filtered: float, mass: float) -> Finish | None:
        """Appends a token; says how the response ended, or None if it goes on."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.filtered_logprobs.append(filtered)
        self.kept_mass.append(mass)
        sampling = self.group.request.sampling
        if token in sampling.stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) == sampling.max_new_tokens else None

    def completion(self, finish: Finish, policy_version: int) -> Completion:
        return Completion(
            request_id=self.group.request.request_id,
            sample=self.index,
            prompt=self.group.request.prompt,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            filtered_logprobs=tuple(self.filtered_logprobs),
            kept_mass=tuple(self.kept_mass),
            finish=finish,
            policy_version=policy_version,
        )


class Scheduler:
    """Admits the samples of all requests, first come first served, within the limits.

    Args:
        requests: in the order of the results.
        limits: of the cache.

    Raises:
        ValueError: if a request could never run within the limits.

    Example:
        >>> requests = [Request("a", (1, 2), num_samples=3), Request("b", (3,))]
        >>> plan = Scheduler(requests, Limits(num_slots=4, num_pages=64, page_tokens=64))
        >>> [(sample.group.request.request_id, sample.index) for sample in plan.admit()]
        [('a', 0), ('a', 1), ('a', 2), ('b', 0)]
    """

    def __init__(self, requests: Sequence[Request], limits: Limits) -> None:
        for request in requests:
            refuse_unless_it_fits(request, limits)
        self.limits = self.used_limits(requests, limits)
        self.waiting = deque(Group(request, order) for order, request in enumerate(requests))
        self.live: list[Sample] = []
        self.free_slots = self.limits.num_slots
        self.free_pages = self.limits.num_pages
        # waiting for an eighth of the slots makes one prefill of many prompts out of many of one
        self.batch_slots = max(1, self.limits.num_slots // 8)

    @staticmethod
    def used_limits(requests: Sequence[Request], limits: Limits) -> Limits:
        """The part of the limits that these requests can use at most."""
        slots = sum(request.num_samples for request in requests)
        pages = 0
        for request in requests:
            shared, own, _ = demand(request, limits.page_tokens)
            pages += shared + request.num_samples * own
        return Limits(
            min(limits.num_slots, slots), min(limits.num_pages, pages), limits.page_tokens
        )

    def admit(self) -> list[Sample]:
        """Starts what fits now; groups seen for the first time have root -1 and need a prefill."""
        started: list[Sample] = []
        if self.live and self.free_slots < self.batch_slots:
            return started
        while self.waiting:
            group = self.waiting[0]
            while not group.is_last_started and self._reserve(group):
                started.append(Sample(group, group.num_started))
                group.num_started += 1
            if not group.is_last_started:
                break
            self.waiting.popleft()
        self.live.extend(started)
        return started

    def end(self, ended: Sequence[Sample]) -> None:
        """Gives back what these samples and any group that is now complete had reserved."""
        gone = set(ended)
        self.live = [sample for sample in self.live if sample not in gone]
        for sample in ended:
            group = sample.group
            shared, own, _ = demand(group.request, self.limits.page_tokens)
            group.num_ended += 1
            self.free_slots += 1
            self.free_pages += own
            if group.num_ended == group.request.num_samples:
                self.free_pages += shared

    def _reserve(self, group: Group) -> bool:
        """Takes slots and pages for the group's next sample, and for its root if it is new."""
        shared, own, tail = demand(group.request, self.limits.page_tokens)
        is_first = group.num_started == 0
        is_last = group.num_started == group.request.num_samples - 1
        slots = is_first + (not is_last)
        # a root that waits for later samples keeps its own last page; the last sample takes it
        pages = own + is_first * (shared + tail) - is_last * tail
        if slots > self.free_slots or pages > self.free_pages:
            return False
        self.free_slots -= slots
        self.free_pages -= pages
        return True


def demand(request: Request, page_tokens: int) -> tuple[int, int, int]:
    """Pages of a request: shared by its group, owned by each sample, and the prompt's part page."""
    prompt = len(request.prompt)
    shared = prompt // page_tokens
    whole = -(-(prompt + request.sampling.max_new_tokens - 1) // page_tokens)
    return shared, whole - shared, -(-prompt // page_tokens) - shared


def refuse_unless_it_fits(request: Request, limits: Limits) -> None:
    """Raises ValueError in one line if the request is empty or can never run."""
    if not request.prompt or request.num_samples < 1:
        raise ValueError(
            f"request {request.request_id!r}: {len(request.prompt)} prompt tokens, num_samples = "
            f"{request.num_samples}; expected at least 1 of each"
        )
    shared, own, tail = demand(request, limits.page_tokens)
    is_group = request.num_samples > 1
    slots, pages = 1 + is_group, shared + own + is_group * tail
    if slots > limits.num_slots:
        raise ValueError(
            f"request {request.request_id!r}: num_samples = {request.num_samples} needs {slots} "
            f"slots (the prompt's and a sample's), max_slots = {limits.num_slots}; "
            f"set max_slots >= {slots}"
        )
    if pages > limits.num_pages:
        raise ValueError(
            f"request {request.request_id!r}: a prompt of {len(request.prompt)} tokens and "
            f"max_new_tokens = {request.sampling.max_new_tokens} need {pages} pages of "
            f"{limits.page_tokens} tokens, max_cache_tokens = "
            f"{limits.num_pages * limits.page_tokens} gives {limits.num_pages}; set "
            f"max_cache_tokens >= {pages * limits.page_tokens} or shorten the prompt or response"
        )
