"""The device's part of a turn: pieces of prompts through the model, one token of every live sample,
and what is drawn from the logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model import DecodeCache, HybridForCausalLM, Packed
from model.kernels.experts.blocks import least_rows
from model.kernels.experts.router import route
from model.packed import sent
from rollout.native.prefix import Prefixes
from rollout.native.sampler import Knobs, draw, refuse_broken
from rollout.native.scheduler import Piece
from rollout.native.sequence import Sample


class Runner:
    """A model, its cache, and one slot that takes what rows beyond the samples write.

    On a CPU every prompt goes alone and a decode batch has at least as many rows as make a row's
    bits its own (`least_rows`), so that the numbers of a request depend on nothing else.
    """

    def __init__(self, model: HybridForCausalLM, cache: DecodeCache) -> None:
        self.model = model
        self.cache = cache
        self.device = model.device
        self.filler = cache.allocate()
        cache.fill(self.filler)
        self._knobs: tuple[list[Sample], Knobs] | None = None

    def prefill(self, pieces: Sequence[Piece], prefixes: Prefixes, budget: int) -> None:
        """Fills each group's root and notes the logits after its last prompt token."""
        for run in runs_of(pieces, 1 if self.device.type == "cpu" else budget):
            tokens = [t for p in run for t in p.group.request.prompt[p.begin : p.end]]
            positions = [n for p in run for n in range(p.begin, p.end)]
            lengths = tuple(p.end - p.begin for p in run)
            packed = Packed(
                sent(torch.tensor(tokens), self.device),
                sent(torch.tensor(positions), self.device),
                lengths,
            )
            out = self.model.model.run(
                packed, cache=self.cache, slots=tuple(p.group.root for p in run)
            )
            ends = [i for i, p in enumerate(run) if p.end == len(p.group.request.prompt)]
            if ends:
                rows = sent(torch.tensor(ends), self.device)
                last = out.hidden[packed.cu_seqlens[1:].long()[rows] - 1]
                for i, logits in zip(ends, self.model.logits(last), strict=True):
                    run[i].group.logits = logits
            wanted = any(p.group.request.return_experts for p in run)
            experts = self._experts(out.router_logits).split(lengths) if wanted else ()
            for piece, rows in zip(run, experts, strict=False):
                if piece.group.request.return_experts:
                    piece.group.experts.append(rows)
            for piece in run:
                prefixes.put(piece.group, piece.end, self.cache)

    def first_tokens(self, started: Sequence[Sample]) -> list[list[float]]:
        """As `decode`, from the logits that a group shares."""
        rows = []
        for sample in started:
            assert sample.group.logits is not None, "a sample starts after its prompt's prefill"
            rows.append(sample.group.logits)
        return self._draw(started, torch.stack(rows), knobs_of(started, self.device))

    def decode(self, live: Sequence[Sample]) -> list[list[float]]:
        """One token of every live sample: token, logprob, filtered logprob, kept mass, a column
        each."""
        slots = [sample.slot for sample in live]
        rows = max(len(live), least_rows(self.cache.states))
        step = self.cache.begin_decode(slots, filler=self.filler, rows=rows)
        tokens = [sample.tokens[-1] for sample in live] + [0] * (rows - len(live))
        packed = Packed(torch.tensor(tokens, device=self.device), step.lengths - 1, (1,) * rows)
        out = self.model.model.decode(packed, step)
        self.cache.count(slots)
        logits = self.model.logits(out.hidden)[: len(live)]
        if any(sample.group.request.return_experts for sample in live):
            for sample, row in zip(live, self._experts(out.router_logits), strict=False):
                if sample.group.request.return_experts:
                    sample.experts.append(row[None])
        if self._knobs is None or self._knobs[0] != live:
            self._knobs = list(live), knobs_of(live, self.device)
        return self._draw(live, logits, self._knobs[1])

    def _experts(self, router_logits: Sequence[Tensor]) -> Tensor:
        """[T, layers, K] int16 on the CPU."""
        top_k = self.model.config.num_experts_per_tok
        chosen = torch.stack([route(logits, top_k)[1] for logits in router_logits], dim=1)
        return chosen.to(torch.int16).cpu()

    def _draw(self, samples: Sequence[Sample], logits: Tensor, knobs: Knobs) -> list[list[float]]:
        positions = torch.tensor([len(sample.tokens) for sample in samples], device=self.device)
        drawn = draw(logits.float(), knobs, positions)
        # one copy to the host a step; fp64 holds token ids and fp32 numbers exactly
        numbers = (drawn.tokens, drawn.logprobs, drawn.filtered_logprobs, drawn.kept_mass)
        columns = torch.stack([number.double() for number in numbers]).tolist()
        refuse_broken(columns[1])
        return columns


def knobs_of(samples: Sequence[Sample], device: torch.device) -> Knobs:
    rows = [(sample.group.request.sampling, sample.index) for sample in samples]
    return Knobs.of(rows, device=device)


def runs_of(pieces: Sequence[Piece], budget: int) -> Iterator[list[Piece]]:
    """The pieces of each forward, in order, at most `budget` tokens unless it is one piece.

    Two pieces of one prompt never share a forward.
    """
    run: list[Piece] = []
    room = budget
    for piece in pieces:
        size = piece.end - piece.begin
        if run and (size > room or run[-1].group is piece.group):
            yield run
            run, room = [], budget
        run.append(piece)
        room -= size
    if run:
        yield run
