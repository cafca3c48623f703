"""The project's own sampler inside vLLM: the same tokens under a seed as every other engine.

vLLM hands the logits of its batch over before it samples. Each row's token is drawn as
`rollout.native.sampler` draws it, everything else is set to -inf, and vLLM, told to be greedy, can
only take that token. What the token's probability was is kept for whoever collects it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from rollout.native.sampler import Knobs, draw
from rollout.types import Sampling

# where a request of vLLM's carries what follows
EXTRA = "hybrid_align"


@dataclass(frozen=True)
class Ask:
    """How one sample is drawn.

    Args:
        key: names the sample.
        sampling: of its request.
        sample: its index in the group.
    """

    key: tuple[int, int]
    sampling: Sampling
    sample: int


class Odds(NamedTuple):
    """Of one token, as in `rollout.types.Completion`."""

    logprob: float
    filtered_logprob: float
    kept_mass: float


class Draws(LogitsProcessor):
    """Draws each row that carries an `Ask`; other rows stay vLLM's own."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.rows: dict[int, tuple[Ask, Sequence[int]]] = {}
        self.knobs: Knobs | None = None
        self.odds: dict[tuple[int, int], dict[int, Odds]] = {}

    def is_argmax_invariant(self) -> bool:
        """False: vLLM leaves out of greedy rows what cannot change their token; this decides it."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows which request is in which row, in the order that vLLM prescribes."""
        if batch_update is None:
            return
        self.knobs = None
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, params, _, tokens in batch_update.added:
            ask = (params.extra_args or {}).get(EXTRA)
            self.rows.pop(row, None)
            if ask is not None:
                self.rows[row] = (ask, tokens)
        for source, target, direction in batch_update.moved:
            moving, there = self.rows.pop(source, None), self.rows.pop(target, None)
            if moving is not None:
                self.rows[target] = moving
            if there is not None and direction == MoveDirectionality.SWAP:
                self.rows[source] = there

    def apply(self, logits: Tensor) -> Tensor:
        """[N, V] fp32, each drawn row left with one finite number."""
        if not self.rows:
            return logits
        order = sorted(self.rows)
        asks = [self.rows[row][0] for row in order]
        places = [len(self.rows[row][1]) for row in order]
        if self.knobs is None:
            self.knobs = Knobs.of([(a.sampling, a.sample) for a in asks], device=self.device)
        index = torch.tensor(order, device=self.device)
        drawn = draw(logits[index], self.knobs, torch.tensor(places, device=self.device))
        columns = (drawn.logprobs, drawn.filtered_logprobs, drawn.kept_mass)
        for ask, place, *odds in zip(asks, places, *(c.tolist() for c in columns), strict=True):
            # a prompt that goes in by pieces is asked after each; the last answer counts
            self.odds.setdefault(ask.key, {})[place] = Odds(*odds)
        logits[index] = float("-inf")
        logits[index, drawn.tokens] = 0.0
        return logits

    def collect(self) -> dict[tuple[int, int], dict[int, Odds]]:
        """Sample -> place in its response -> odds, of all that was drawn since the last call."""
        found, self.odds = self.odds, {}
        return found
