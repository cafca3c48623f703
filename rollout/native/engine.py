"""The native engine: prompts prefilled once and forked to their group, decoded in one batch.

One turn of `generate` is: admit what fits, prefill the new prompts packed, draw the first tokens
from the logits that a group shares, fork the survivors, then one decode step of all live samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from model import DecodeCache, HybridForCausalLM, Packed
from rollout.native.sampler import Knobs, draw
from rollout.native.scheduler import Group, Limits, Sample, Scheduler
from rollout.sync import copy_weights
from rollout.types import Completion, Request


class NativeEngine:
    """Samples from a live model, in process. Implements `rollout.types.Engine`.

    The weights are the caller's: what a trainer updates in place is sampled from at the next call,
    and the trainer sets `policy_version` itself. The cache lives only during `generate`.

    Args:
        model: any device and dtype; put in eval mode during `generate` and back afterwards.
        max_slots: sequences decoded at once.
        max_cache_tokens: tokens of keys and values held at once; a prompt shared by its group
            counts once, and responses count at their longest.
        policy_version: carried by every completion.
        page_tokens: granularity of the cache, in tokens.
        prefill_tokens: most prompt tokens per forward; a longer prompt goes in pieces.
        autocast: type that fp32 weights are multiplied in, as a trainer's forward does; None
            multiplies them as they are.

    Raises:
        ValueError: if a limit is below 1.

    Example:
        >>> from model.config import preset
        >>> from rollout.types import Sampling
        >>> model = HybridForCausalLM(preset("tiny", num_hidden_layers=1, hidden_size=32))
        >>> engine = NativeEngine(model, max_slots=4, max_cache_tokens=256)
        >>> sampling = Sampling(max_new_tokens=8)
        >>> done = engine.generate([Request("p", (5, 6, 7), sampling, num_samples=2)])
        >>> [(completion.request_id, completion.sample) for completion in done]
        [('p', 0), ('p', 1)]
    """

    def __init__(
        self,
        model: HybridForCausalLM,
        *,
        max_slots: int,
        max_cache_tokens: int,
        policy_version: int = 0,
        page_tokens: int = 64,
        prefill_tokens: int = 16384,
        autocast: torch.dtype | None = None,
    ) -> None:
        for name, value in (
            ("max_slots", max_slots),
            ("max_cache_tokens", max_cache_tokens),
            ("page_tokens", page_tokens),
            ("prefill_tokens", prefill_tokens),
        ):
            if value < 1:
                raise ValueError(f"NativeEngine.{name} = {value}, expected >= 1")
        self.model = model
        self.limits = Limits(max_slots, -(-max_cache_tokens // page_tokens), page_tokens)
        self.prefill_tokens = prefill_tokens
        self.policy_version = policy_version
        self.autocast = autocast
        self._fault = ""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All samples of all requests, in the order of the requests, then of the samples.

        Raises:
            ValueError: if a request can never fit, or holds a token outside the vocabulary.
            RuntimeError: if the engine is closed, half updated, or the model gives nan.
        """
        if self._fault:
            raise RuntimeError(self._fault)
        self._check_tokens(requests)
        plan = Scheduler(requests, self.limits)
        precision = torch.autocast(
            self.model.device.type, dtype=self.autocast, enabled=self.autocast is not None
        )
        with torch.no_grad(), precision, evaluating(self.model):
            run = _Run(self, plan)
            while plan.live or plan.waiting:
                run.start(plan.admit())
                if plan.live:
                    run.decode()
        return [run.done[key] for key in sorted(run.done)]

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces every weight in place by name; every later completion carries `version`.

        Raises:
            ValueError: naming the first tensor that is unexpected, misshapen or missing. Weights
                already copied stay, so the engine refuses to generate until a whole update.
        """
        self._fault = (
            f"engine: the update to version {version} broke off, so its weights are of two "
            "versions; call update_weights again with a complete stream"
        )
        copy_weights(self.model, stream)
        self.policy_version = version
        self._fault = ""

    def close(self) -> None:
        """Ends the engine; the model stays as it is."""
        self._fault = "engine: it is closed; make a new one"

    def _check_tokens(self, requests: Sequence[Request]) -> None:
        vocabulary = self.model.config.vocab_size
        for request in requests:
            if request.prompt and not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
                bad = next(token for token in request.prompt if not 0 <= token < vocabulary)
                raise ValueError(
                    f"request {request.request_id!r}: token {bad} is outside the model's "
                    f"vocabulary of {vocabulary}; render it with the model's own tokenizer"
                )


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


class _Run:
    """One call of `generate`: its cache, its live samples and their settings."""

    def __init__(self, engine: NativeEngine, plan: Scheduler) -> None:
        self.engine = engine
        self.model = engine.model
        self.plan = plan
        self.done: dict[tuple[int, int], Completion] = {}
        self.device = self.model.device
        self.cache = DecodeCache(
            self.model.config,
            num_slots=plan.limits.num_slots,
            num_pages=plan.limits.num_pages,
            page_tokens=plan.limits.page_tokens,
            dtype=self.model.dtype,
            device=self.device,
        )
        self.knobs: Knobs | None = None

    def start(self, started: list[Sample]) -> None:
        """Prefills new prompts, draws the first tokens and gives a slot to those that go on."""
        if not started:
            return
        groups = list(dict.fromkeys(sample.group for sample in started))
        self._prefill([group for group in groups if group.root < 0])
        logits = torch.stack([_shared_logits(sample.group) for sample in started])
        ended = self._draw(started, logits, self._knobs(started))
        gone = set(ended)
        for sample in started:
            group = sample.group
            takes_root = sample.index == group.request.num_samples - 1
            if sample not in gone:
                sample.slot = group.root if takes_root else self.cache.fork(group.root)
            elif takes_root:
                self.cache.free(group.root)
        self.plan.end(ended)
        self.knobs = None

    def decode(self) -> None:
        """One token of every live sample."""
        live = self.plan.live
        slots = [sample.slot for sample in live]
        tokens = torch.tensor([sample.tokens[-1] for sample in live], device=self.device)
        positions = torch.tensor([self.cache.lengths[slot] for slot in slots], device=self.device)
        packed = Packed(tokens, positions, (1,) * len(live))
        hidden = self.model.model.run(packed, cache=self.cache, slots=tuple(slots)).hidden
        if self.knobs is None:
            self.knobs = self._knobs(live)
        ended = self._draw(live, self.model.logits(hidden), self.knobs)
        if ended:
            for sample in ended:
                self.cache.free(sample.slot)
            self.plan.end(ended)
            self.knobs = None

    def _knobs(self, samples: Sequence[Sample]) -> Knobs:
        rows = [(sample.group.request.sampling, sample.index) for sample in samples]
        return Knobs.of(rows, device=self.device)

    def _draw(self, samples: Sequence[Sample], logits: Tensor, knobs: Knobs) -> list[Sample]:
        """Adds one token to each sample; returns those that ended, noting their completions."""
        positions = torch.tensor([len(sample.tokens) for sample in samples], device=self.device)
        drawn = draw(logits.float(), knobs, positions)
        # one copy to the host a step; fp64 holds token ids and fp32 numbers exactly
        numbers = (drawn.tokens, drawn.logprobs, drawn.filtered_logprobs, drawn.kept_mass)
        columns = torch.stack([number.double() for number in numbers]).tolist()
        ended = []
        for sample, token, *rest in zip(samples, *columns, strict=True):
            finish = sample.take(int(token), *rest)
            if finish is not None:
                key = (sample.group.order, sample.index)
                self.done[key] = sample.completion(finish, self.engine.policy_version)
                ended.append(sample)
        return ended

    def _prefill(self, groups: list[Group]) -> None:
        """Fills each group's root slot and notes the logits after its last prompt token."""
        for group in groups:
            group.root = self.cache.allocate()
        for pieces in runs_of(groups, self.engine.prefill_tokens):
            tokens = [t for group, begin, end in pieces for t in group.request.prompt[begin:end]]
            positions = [p for _, begin, end in pieces for p in range(begin, end)]
            packed = Packed(
                torch.tensor(tokens, device=self.device),
                torch.tensor(positions, device=self.device),
                tuple(end - begin for _, begin, end in pieces),
            )
            slots = tuple(group.root for group, _, _ in pieces)
            hidden = self.model.model.run(packed, cache=self.cache, slots=slots).hidden
            last = hidden[packed.cu_seqlens[1:].long() - 1]
            for (group, _, end), row in zip(pieces, self.model.logits(last), strict=True):
                if end == len(group.request.prompt):
                    group.logits = row


def _shared_logits(group: Group) -> Tensor:
    assert group.logits is not None, "a sample starts only after its prompt was prefilled"
    return group.logits


def runs_of(groups: Sequence[Group], budget: int) -> Iterator[list[tuple[Group, int, int]]]:
    """Pieces (group, begin, end) of the prompts, in order, at most `budget` tokens a run.

    A prompt longer than the budget is cut; two pieces of one prompt never share a run.
    """
    pieces: list[tuple[Group, int, int]] = []
    room = budget
    for group in groups:
        length = len(group.request.prompt)
        for begin in range(0, length, budget):
            size = min(budget, length - begin)
            if pieces and (size > room or pieces[-1][0] is group):
                yield pieces
                pieces, room = [], budget
            pieces.append((group, begin, begin + size))
            room -= size
    if pieces:
        yield pieces
