"""A decode batch whose tensors stay where they are: its step can be captured in a graph.

    tokens, lengths -> model -> logits -> draw -> tokens, lengths + 1

The host only tells who is in the batch; as long as that stays, nothing is sent to the device, and
one small tensor comes back a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model import DecodeCache, HybridForCausalLM, Packed
from model.kernels.draw.splitmix import MASK_63
from model.kernels.experts.router import route
from model.packed import sent
from rollout.native.sampler import Knobs, draw
from rollout.native.sequence import Sample
from rollout.types import Sampling

WHOLE_NUMBERS = ("tokens", "index", "lengths", "position", "alive", "top_k", "seed", "sample")
FRACTIONS = ("temperature", "top_p", "min_p")


class Flags(NamedTuple):
    """What a step has to do; one graph each. The first three as in `Knobs`."""

    greedy: bool
    tempered: bool
    filtered: bool
    experts: bool

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Flags:
        samplings = [sample.group.request.sampling for sample in samples]
        return cls(
            *Knobs.flags(samplings),
            any(sample.group.request.return_experts for sample in samples),
        )


@dataclass(frozen=True)
class Out:
    """What a step leaves.

    Args:
        columns: [4, R] fp64: token, logprob, filtered logprob and kept mass of each row.
        experts: [R, layers, K] int16, or None.
    """

    columns: Tensor
    experts: Tensor | None


class Batch:
    """R rows, of which the first are samples and the others write into a slot that nobody reads.

    Args:
        filler: that slot; it has a page.
        rows: R.
    """

    def __init__(
        self, model: HybridForCausalLM, cache: DecodeCache, *, filler: int, rows: int
    ) -> None:
        self.model, self.cache = model, cache
        self.filler, self.rows = filler, rows
        self.live: list[Sample] = []
        self.flags = Flags(greedy=False, tempered=False, filtered=False, experts=False)
        device = cache.states.device
        self._whole = torch.zeros(len(WHOLE_NUMBERS), rows, dtype=torch.int64, device=device)
        self._parts = torch.zeros(len(FRACTIONS), rows, device=device)
        # not dict(zip(..)): a row stays a view of what `fill` overwrites
        self.numbers = {name: self._whole[i] for i, name in enumerate(WHOLE_NUMBERS)}
        self.fractions = {name: self._parts[i] for i, name in enumerate(FRACTIONS)}
        self.fill([])

    def fill(self, live: Sequence[Sample], tokens: Tensor | None = None) -> None:
        """Says who is in the batch: each sample's last token comes next.

        Args:
            tokens: [len(live)] on the device, those of a step whose tokens the host has not seen;
                None takes them from the samples.
        """
        default = Sampling()
        unseen = int(tokens is not None)
        rest = self.rows - len(live)
        whole, parts = [], []
        for sample in live:
            knobs = sample.group.request.sampling
            length = self.cache.lengths[sample.slot] + 1
            counters = knobs.top_k, knobs.seed & MASK_63, sample.index
            last = 0 if unseen else sample.tokens[-1]
            position = len(sample.tokens) + unseen
            whole.append((last, sample.slot, length, position, 1, *counters))
            parts.append((knobs.temperature, knobs.top_p, knobs.min_p))
        whole += [(0, self.filler, 1, 0, 0, 0, 0, 0)] * rest
        parts += [(default.temperature, default.top_p, default.min_p)] * rest
        device = self._whole.device
        self._whole.copy_(sent(torch.tensor(whole, dtype=torch.int64).T.contiguous(), device))
        self._parts.copy_(sent(torch.tensor(parts, dtype=torch.float32).T.contiguous(), device))
        if tokens is not None:
            self.numbers["tokens"][: len(live)].copy_(tokens)
        self.live = list(live)

    def step(self) -> Out:
        """One token of every row, as `flags` says; the rows are then ready for the next."""
        at, flags = self.numbers, self.flags
        packed = Packed(at["tokens"], at["lengths"] - 1, (1,) * self.rows)
        step = self.cache.decode_step(at["index"], at["lengths"])
        out = self.model.model.decode(packed, step)
        knobs = Knobs(
            **self.fractions,
            top_k=at["top_k"],
            seed=at["seed"],
            sample=at["sample"],
            greedy=flags.greedy,
            tempered=flags.tempered,
            filtered=flags.filtered,
        )
        drawn = draw(self.model.logits(out.hidden), knobs, at["position"])
        at["tokens"].copy_(drawn.tokens)
        at["lengths"].add_(at["alive"])
        at["position"].add_(at["alive"])
        experts = None
        if flags.experts:
            experts = chosen_experts(out.router_logits, self.model.config.num_experts_per_tok)
        # fp64 holds token ids exactly
        numbers = (drawn.tokens, drawn.logprobs, drawn.filtered_logprobs, drawn.kept_mass)
        return Out(torch.stack([number.double() for number in numbers]), experts)


def chosen_experts(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """[T, layers, K] int16."""
    chosen = torch.stack([route(logits, top_k)[1] for logits in router_logits], dim=1)
    return chosen.to(torch.int16)
