"""The device's part of a turn: pieces of prompts through the model, one token of every live sample,
and what is drawn from the logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from model import DecodeCache, HybridForCausalLM, Packed
from model.kernels.experts.blocks import least_rows
from model.packed import sent
from rollout.native.batch import Batch, Flags, Out, chosen_experts
from rollout.native.graphs import Graphs, bucket, fingerprint
from rollout.native.int8 import int8_experts
from rollout.native.padded import MAX_PIECES, Last, Padded, bucket_of
from rollout.native.prefix import Prefixes
from rollout.native.sampler import Knobs, draw, refuse_broken
from rollout.native.scheduler import Piece
from rollout.native.sequence import Sample


@dataclass(frozen=True)
class Flight:
    """A decode step that was launched, and what comes back of it.

    Args:
        samples: whose token each row is, in order.
        tokens: [R] int64 on the device, of which the first are theirs.
        columns, experts: as in `Out`, on the host; of meaning once `landed` has happened.
        landed: None on a CPU, which waits.
    """

    samples: list[Sample]
    tokens: Tensor
    columns: Tensor
    experts: Tensor | None
    landed: torch.cuda.Event | None

    @property
    def is_awaited(self) -> bool:
        """Whether any of its samples still runs."""
        return any(sample.slot >= 0 for sample in self.samples)

    def tokens_of(self, samples: Sequence[Sample]) -> Tensor:
        """[len(samples)] on the device, which the host need not have seen."""
        rows = {sample: row for row, sample in enumerate(self.samples)}
        wanted = torch.tensor([rows[sample] for sample in samples], dtype=torch.int64)
        return self.tokens.index_select(0, sent(wanted, self.tokens.device))


class Runner:
    """A model, its cache, and one slot that takes what rows beyond the samples write.

    With bits of their own, on a CPU, every prompt goes alone and a decode batch has at least as
    many rows as make a row's bits its own (`least_rows`), so that the numbers of a request depend
    on nothing else. On CUDA prompts go together, and decode steps are graphs. Few short pieces of
    prompts are padded instead, each to a bucket that is a graph too.

    Args:
        uses_graphs: whether steps are captured; only on CUDA.
        rounds_experts: whether the experts are int8.
        own_bits: as in `NativeEngine`.
        pads: whether there are buckets.
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        cache: DecodeCache,
        *,
        uses_graphs: bool,
        rounds_experts: bool,
        own_bits: bool,
        pads: bool,
    ) -> None:
        self.model = model
        self.cache = cache
        self.device = model.device
        self.filler = cache.allocate()
        cache.fill(self.filler)
        cache.begin_decode([self.filler])
        self._batches: dict[int, Batch] = {}
        self._loaded: Batch | None = None
        self._uses_graphs = uses_graphs
        self._goes_alone = own_bits and model.device.type == "cpu"
        self._pads = pads
        self._padded: dict[int, Padded] = {}
        self._graphs: Graphs[Out] = Graphs()
        self._piece_graphs: Graphs[Last] = Graphs()
        self._captured_for: tuple[object, ...] = ()
        self.rounded = int8_experts(model) if rounds_experts else []

    def begin(self) -> None:
        """Looks at the model again, after a time in which its owner may have changed it."""
        for one in self.rounded:
            one.refresh()
        if self._uses_graphs and (found := fingerprint(self.model)) != self._captured_for:
            self._graphs, self._piece_graphs, self._captured_for = Graphs(), Graphs(), found

    def prefill(self, pieces: Sequence[Piece], prefixes: Prefixes, budget: int) -> None:
        """Fills each group's root and notes the logits after its last prompt token."""
        for run in runs_of(pieces, 1 if self._goes_alone else budget):
            if buckets := self._buckets(run):
                for piece, rows in zip(run, buckets, strict=True):
                    self._prefill_padded(piece, rows)
            else:
                self._prefill_packed(run)
            for piece in run:
                prefixes.put(piece.group, piece.end, self.cache)

    def _buckets(self, run: Sequence[Piece]) -> list[int]:
        """Rows for each piece of a run that is padded; none for one that is packed."""
        if not self._pads or len(run) > MAX_PIECES:
            return []
        found = [rows for p in run if (rows := bucket_of(p.begin, p.end)) is not None]
        return found if len(found) == len(run) else []

    def _prefill_packed(self, run: Sequence[Piece]) -> None:
        tokens = torch.cat([p.group.tokens[p.begin : p.end] for p in run])
        positions = torch.cat([torch.arange(p.begin, p.end) for p in run])
        lengths = tuple(p.end - p.begin for p in run)
        packed = Packed(
            sent(tokens, self.device),
            sent(positions, self.device),
            lengths,
        )
        slots = tuple(p.group.root for p in run)
        out = self.model.model.run(packed, cache=self.cache, slots=slots)
        self._note(run, out.hidden, packed)
        if any(p.group.request.return_experts for p in run):
            top_k = self.model.config.num_experts_per_tok
            experts = chosen_experts(out.router_logits, top_k).cpu().split(lengths)
            for piece, rows in zip(run, experts, strict=True):
                if piece.group.request.return_experts:
                    piece.group.experts.append(rows)

    def _prefill_padded(self, piece: Piece, rows: int) -> None:
        group, size = piece.group, piece.end - piece.begin
        if rows not in self._padded:
            self._padded[rows] = Padded(self.model, self.cache, filler=self.filler, rows=rows)
        padded, with_experts = self._padded[rows], group.request.return_experts
        key, step = (rows, with_experts), partial(padded.step, with_experts)
        self.cache.begin_decode([group.root], size)
        if self._uses_graphs and key not in self._piece_graphs:
            # a capture's runs before it write where nobody reads
            padded.clear()
            self._piece_graphs.capture(key, step)
        padded.fill(piece)
        last = self._piece_graphs.replay(key) if self._uses_graphs else step()
        self.cache.count([group.root], size)
        if piece.end == len(group.request.prompt):
            # the next replay writes over it
            group.logits = last.logits.clone()
        if last.experts is not None:
            group.experts.append(last.experts[:size].cpu())

    def first_tokens(self, started: Sequence[Sample]) -> list[list[float]]:
        """As `decode`, from the logits that a group shares."""
        rows = []
        for sample in started:
            assert sample.group.logits is not None, "a sample starts after its prompt's prefill"
            rows.append(sample.group.logits)
        knobs = Knobs.of(
            [(sample.group.request.sampling, sample.index) for sample in started],
            device=self.device,
        )
        first = torch.zeros(len(started), dtype=torch.int64, device=self.device)
        drawn = draw(torch.stack(rows), knobs, first)
        numbers = (drawn.tokens, drawn.logprobs, drawn.filtered_logprobs, drawn.kept_mass)
        return _columns(torch.stack([number.double() for number in numbers]))

    def launch(self, samples: Sequence[Sample], behind: Flight | None = None) -> Flight:
        """Starts a decode step of samples that have room for a token, and counts it.

        Args:
            behind: a step that holds their last tokens, which the host has not seen.
        """
        slots = [sample.slot for sample in samples]
        self.cache.begin_decode(slots)
        batch, out = self._step(list(samples), behind)
        self.cache.count(slots)
        columns, experts = (
            None if x is None else x.to("cpu", non_blocking=True)
            for x in (out.columns, out.experts)
        )
        assert columns is not None, "every step leaves columns"
        landed = None
        if self.device.type == "cuda":
            landed = torch.cuda.Event()
            landed.record()
        return Flight(list(samples), batch.numbers["tokens"], columns, experts, landed)

    def land(self, flight: Flight) -> tuple[list[Sample], list[list[float]]]:
        """Waits for a step: whose tokens it gave, and a column each of token, logprob, filtered
        logprob and kept mass. Those who have ended since it was launched are left out."""
        if flight.landed is not None:
            flight.landed.synchronize()
        rows = [row for row, sample in enumerate(flight.samples) if sample.slot >= 0]
        live = [flight.samples[row] for row in rows]
        if flight.experts is not None:
            for row, sample in zip(rows, live, strict=True):
                if sample.group.request.return_experts:
                    sample.experts.append(flight.experts[row][None].clone())
        return live, _columns(flight.columns[:, rows])

    def _step(self, live: list[Sample], behind: Flight | None) -> tuple[Batch, Out]:
        rows = bucket(len(live)) if self._uses_graphs else max(len(live), least_rows(self._probe))
        if rows not in self._batches:
            self._batches[rows] = Batch(self.model, self.cache, filler=self.filler, rows=rows)
        batch = self._batches[rows]
        if self._loaded is not batch or batch.live != live or not self._is_captured(batch):
            # before anything is written: it may be this batch that holds them
            tokens = None if behind is None else behind.tokens_of(live)
            batch.flags = Flags.of(live)
            if not self._is_captured(batch):
                # a capture's runs before it write where nobody reads
                batch.fill([])
                self._graphs.capture((rows, batch.flags), batch.step)
            batch.fill(live, tokens)
            self._loaded = batch
        key = rows, batch.flags
        return batch, self._graphs.replay(key) if self._uses_graphs else batch.step()

    def _is_captured(self, batch: Batch) -> bool:
        return not self._uses_graphs or (batch.rows, batch.flags) in self._graphs

    @property
    def _probe(self) -> Tensor:
        return self.cache.states

    def _note(self, run: Sequence[Piece], hidden: Tensor, packed: Packed) -> None:
        ends = [i for i, p in enumerate(run) if p.end == len(p.group.request.prompt)]
        if not ends:
            return
        last, total = [], 0
        for i, length in enumerate(packed.lengths):
            total += length
            if i in ends:
                last.append(total - 1)
        rows = hidden.index_select(0, sent(torch.tensor(last), self.device))
        for i, logits in zip(ends, self.model.logits(rows), strict=True):
            run[i].group.logits = logits


def _columns(numbers: Tensor) -> list[list[float]]:
    columns = numbers.tolist()
    refuse_broken(columns[1])
    return columns


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


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
