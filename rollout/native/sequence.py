"""A request on its way through the engine, and each of its samples."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from model.step import Snapshot
from rollout.types import Completion, Finish, Request, Timings

Decode = Callable[[Sequence[int]], str]

# a character is at most so many byte tokens
TOKENS_A_CHARACTER = 4


@dataclass(eq=False)
class Group:
    """A request: one prompt, and samples that fork it.

    Args:
        order: place of the request among all.
        root: slot of the prompt; -1 before prefill and once the last sample took it.
        num_prefilled: prompt tokens that the root holds.
        logits: [V] fp32 after the last prompt token, shared by all samples; None before.
        num_started: samples.
        experts: [T, layers, K] pieces of the prompt's; empty unless asked for.
        arrived, began: seconds on a clock; began is 0 before the first prefill.
        version: of the weights that began it; None before.
    """

    request: Request
    order: int
    root: int = -1
    num_prefilled: int = 0
    logits: Tensor | None = None
    num_started: int = 0
    experts: list[Tensor] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    began: float = 0.0
    version: int | None = None

    @cached_property
    def tokens(self) -> Tensor:
        """[P] int64 on the host: the prompt."""
        # by way of an array: torch takes four times as long over a tuple of numbers
        return torch.frombuffer(array("q", self.request.prompt), dtype=torch.int64)

    @property
    def num_waiting(self) -> int:
        return self.request.num_samples - self.num_started

    def forget(self) -> None:
        """Back to before its prefill."""
        self.root, self.num_prefilled, self.logits = -1, 0, None
        self.experts.clear()


@dataclass(eq=False)
class Sample:
    """One response; slot is -1 while it holds none, and `saved` is then what it held."""

    group: Group
    index: int
    slot: int = -1
    saved: Snapshot | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    filtered_logprobs: list[float] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    num_certain: int = 0
    first: float = 0.0

    @property
    def age(self) -> tuple[int, int]:
        """Orders samples by arrival."""
        return self.group.order, self.index

    def take(
        self, token: int, logprob: float, filtered: float, mass: float, decode: Decode | None
    ) -> Finish | None:
        """Appends a token; says how the response ended, or None if it goes on."""
        if not self.tokens:
            self.first = time.perf_counter()
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.filtered_logprobs.append(filtered)
        self.kept_mass.append(mass)
        sampling = self.group.request.sampling
        if token in sampling.stop_token_ids:
            return "stop"
        if sampling.stop_strings and self._has_stop_string(decode):
            return "stop"
        if sampling.repetition_tokens:
            is_certain = math.exp(logprob) > sampling.repetition_probability
            self.num_certain = self.num_certain + 1 if is_certain else 0
            if self.num_certain == sampling.repetition_tokens:
                return "repetition"
        return "length" if len(self.tokens) == sampling.max_new_tokens else None

    def _has_stop_string(self, decode: Decode | None) -> bool:
        assert decode is not None, "refused when the request came"
        strings = self.group.request.sampling.stop_strings
        # only the end is new: what a string of this length could have begun in
        reach = TOKENS_A_CHARACTER * (max(map(len, strings)) + 1)
        text = decode(self.tokens[-reach:])
        return any(string in text for string in strings)

    def completion(self, finish: Finish, policy_version: int) -> Completion:
        group, now = self.group, time.perf_counter()
        began = group.began or now
        first = self.first or now
        experts = None
        if group.request.return_experts and self.tokens:
            experts = torch.cat([*group.experts, *self.experts])
        return Completion(
            request_id=group.request.request_id,
            sample=self.index,
            prompt=group.request.prompt,
            tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            filtered_logprobs=tuple(self.filtered_logprobs),
            kept_mass=tuple(self.kept_mass),
            finish=finish,
            policy_version=policy_version if group.version is None else group.version,
            timings=Timings(began - group.arrived, first - began, now - first),
            experts=experts,
        )
