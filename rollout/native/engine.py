"""The native engine: prompts prefilled once and forked to their group, decoded in one batch.

One turn is: bring back what paused, admit what fits, prefill pieces of the new prompts, draw the
first tokens from the logits that a group shares, fork the survivors, make room, then one decode
step of all live samples. Where nothing else is to be done first, the next turn's step is launched
before this one's tokens are looked at: the device goes on while the host works.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from peft import PeftModel
from torch import Tensor

from model import DecodeCache, HybridForCausalLM
from rollout.native.int8 import in_place_of_live
from rollout.native.prefix import Prefixes
from rollout.native.scheduler import Limits, Scheduler, Stats, refuse_unless_it_fits
from rollout.native.sequence import Decode, Sample
from rollout.native.turn import Flight, Runner, evaluating
from rollout.sync import copy_weights, half_updated
from rollout.types import Completion, Request, Token


class NativeEngine:
    """Samples from a live model, in process. Implements `rollout.types.StreamingEngine`.

    The weights are the caller's: what a trainer updates in place is sampled from at the next turn,
    and the trainer sets `policy_version` itself. A completion whose weights changed on the way
    carries the version that it began with. The cache is made when the first request comes.

    Args:
        model: any device and dtype; put in eval mode during a turn and back afterwards. Adapters of
            peft that are on are sampled from as they are, without merging.
        max_slots: sequences decoded at once.
        max_cache_tokens: tokens of keys and values held at once; a prompt shared by its group
            counts once.
        policy_version: carried by every completion.
        page_tokens: granularity of the cache, in tokens.
        prefill_tokens: most prompt tokens a turn; a longer prompt goes in pieces.
        autocast: type that fp32 weights are multiplied in, as a trainer's forward does; None
            multiplies them as they are.
        decode: text of some tokens, for requests with stop strings; None refuses those.
        max_prefixes: beginnings of prompts remembered, each with one state of the model.
        prefix_tokens: distance of the borders at which they are, a multiple of page_tokens; with
            max_prefixes = 0 it does nothing.
        graphs: whether decode steps are CUDA graphs; nothing on a CPU.
        buckets: whether pieces of prompts of up to 512 tokens, where they are few, are padded to
            32, 64, 128, 256 or 512 rows each, a graph each too. "cuda": where graphs are kept from
            one `generate` to the next, since a capture takes as long as several plain prefills.
        experts: "int8" rounds a copy of their weights, anew whenever work begins after a pause.
        keeps_cache: whether the cache outlives `generate`; otherwise a trainer gets the memory.
        own_bits: on a CPU, whether a request's numbers are its own to the last bit, whatever runs
            beside it; otherwise prompts are prefilled together, faster where they are short, and
            sums round as the company has it. CUDA never promises these bits.
        ahead: where a decode step may be launched before the tokens of the one before are looked
            at, so that the device does not wait for the host. Weights that change between two turns
            are then sampled from one token later.

    Raises:
        ValueError: if a limit is below 1, or prefix_tokens does not fit.

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
        model: HybridForCausalLM | PeftModel,
        *,
        max_slots: int,
        max_cache_tokens: int,
        policy_version: int = 0,
        page_tokens: int = 64,
        prefill_tokens: int = 16384,
        autocast: torch.dtype | None = None,
        decode: Decode | None = None,
        max_prefixes: int = 0,
        prefix_tokens: int = 1024,
        graphs: bool = True,
        experts: Literal["live", "int8"] = "live",
        keeps_cache: bool = True,
        own_bits: bool = True,
        ahead: Literal["cuda", "always", "never"] = "cuda",
        buckets: Literal["cuda", "always", "never"] = "cuda",
    ) -> None:
        for name, value, least in (
            ("max_slots", max_slots, 1),
            ("max_cache_tokens", max_cache_tokens, 1),
            ("page_tokens", page_tokens, 1),
            ("prefill_tokens", prefill_tokens, 1),
            ("max_prefixes", max_prefixes, 0),
        ):
            if value < least:
                raise ValueError(f"NativeEngine.{name} = {value}, expected >= {least}")
        is_border = 0 < prefix_tokens <= prefill_tokens and prefix_tokens % page_tokens == 0
        if max_prefixes and not is_border:
            raise ValueError(
                f"NativeEngine.prefix_tokens = {prefix_tokens}, expected a multiple of page_tokens "
                f"= {page_tokens}, at most prefill_tokens = {prefill_tokens}"
            )
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        assert isinstance(plain, HybridForCausalLM), "adapters wrap the project's own model"
        self.model = plain
        chunk = prefix_tokens if max_prefixes else prefill_tokens
        pages = -(-max_cache_tokens // page_tokens)
        self.limits = Limits(max_slots, pages, page_tokens, prefill_tokens, chunk)
        self.autocast = autocast
        self.keeps_cache = keeps_cache
        self.own_bits = own_bits
        self._text = decode
        self._rounds_experts = experts == "int8"
        self._uses_graphs = graphs and plain.device.type == "cuda"
        keeps_graphs = self._uses_graphs and keeps_cache
        self._pads = buckets == "always" or (buckets == "cuda" and keeps_graphs)
        self._version = policy_version
        self._prefixes = Prefixes(max_prefixes, prefix_tokens)
        self._plan = Scheduler(self.limits)
        self._runner: Runner | None = None
        self._flight: Flight | None = None
        self._looks_ahead = ahead == "always" or (ahead == "cuda" and plain.device.type == "cuda")
        self._cancelled: list[Token] = []
        self._is_busy = False
        self._fault = ""

    @property
    def policy_version(self) -> int:
        """Version of the weights; setting it says that they have changed."""
        return self._version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self._prefixes.clear(None if self._runner is None else self._runner.cache)
        self._version = version
        # its owner may have moved weights: see `Runner.begin`
        self._is_busy = False

    @property
    def num_in_flight(self) -> int:
        """Samples queued or live."""
        return self._plan.num_in_flight

    @property
    def stats(self) -> Stats:
        """What has happened and what is free, for whoever watches."""
        limits, cache = self.limits, None if self._runner is None else self._runner.cache
        return Stats(
            num_live=len(self._plan.live),
            num_pauses=self._plan.num_pauses,
            num_prefix_tokens=self._prefixes.num_hit_tokens,
            num_free_slots=limits.num_slots if cache is None else cache.num_free_slots,
            num_free_pages=limits.num_pages if cache is None else cache.num_free_pages,
        )

    def submit(self, request: Request) -> None:
        """Queues a request; its tokens come out of later turns.

        Raises:
            ValueError: if the request can never fit, holds a token outside the vocabulary or stop
                strings that nobody can decode, or if its id is already in flight.
            RuntimeError: if the engine is closed or half updated.
        """
        self._check_alive()
        self._check_request(request)
        if any(g.request.request_id == request.request_id for g in self._plan.groups.values()):
            raise ValueError(
                f"request {request.request_id!r} is in flight; wait for its end, cancel it, or "
                "choose another id"
            )
        self._plan.add(request)

    def step(self) -> list[Token]:
        """One turn: prefill what is admitted, decode one token of every live sample.

        Empty and free of cost when nothing is in flight and nothing was cancelled since.

        Raises:
            RuntimeError: if the engine is closed, half updated, or the model gives nan; then all
                that was in flight is gone.
        """
        self._check_alive()
        told, self._cancelled = self._cancelled, []
        if not self._plan.num_in_flight:
            return told
        with self._working():
            return told + [token for _, token in self._step()]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """All samples of all requests, in the order of the requests, then of the samples.

        Raises:
            ValueError: as `submit`, but two requests may have one id.
            RuntimeError: as `step`, and if submitted requests are in flight, whose tokens would
                be lost.
        """
        self._check_alive()
        if self._plan.num_in_flight:
            raise RuntimeError(
                f"engine: {self._plan.num_in_flight} submitted samples are in flight; call step "
                "until they are done before generate"
            )
        for request in requests:
            self._check_request(request)
        for request in requests:
            self._plan.add(request)
        done: dict[tuple[int, int], Completion] = {}
        try:
            with self._working():
                while self._plan.num_in_flight:
                    for sample, token in self._step():
                        if token.completion is not None:
                            done[sample.age] = token.completion
        finally:
            if not self.keeps_cache:
                self.release()
        return [done[age] for age in sorted(done)]

    def cancel(self, request_id: str) -> None:
        """Ends a request: its slots and pages are free at once.

        The next turn tells of it: token -1 for each sample that had not ended, with what it had.

        Raises:
            ValueError: if no such request is in flight.
        """
        cache = None if self._runner is None else self._runner.cache
        found = [g for g in self._plan.groups.values() if g.request.request_id == request_id]
        if not found:
            raise ValueError(f"request {request_id!r} is not in flight; it ended or never came")
        for sample in [s for group in found for s in self._plan.cancel(group, cache)]:
            done = sample.completion("cancelled", self._version)
            self._cancelled.append(Token(request_id, sample.index, -1, 0.0, done))

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces every weight in place by name; what begins later carries `version`.

        Raises:
            ValueError: naming the first tensor that is unexpected, misshapen or missing. Weights
                already copied stay, so the engine refuses to generate until a whole update.
        """
        self._fault = half_updated(version)
        copy_weights(self.model, stream)
        self.policy_version = version
        self._fault = ""

    def release(self) -> None:
        """Gives the cache's memory back; it is made again when needed.

        Raises:
            RuntimeError: if something is in flight.
        """
        if self._plan.num_in_flight:
            raise RuntimeError(
                f"engine: {self._plan.num_in_flight} samples are in flight; cancel them or wait "
                "for their end before release"
            )
        self._prefixes.clear(None)
        self._runner = self._flight = None

    def close(self) -> None:
        """Ends the engine and all that is in flight; the model stays as it is."""
        self._abandon()
        self.release()
        self._cancelled.clear()
        self._fault = "engine: it is closed; make a new one"

    def _step(self) -> list[tuple[Sample, Token]]:
        """One turn, inside `_working`."""
        if not self._plan.num_in_flight:
            return []
        if self._runner is None:
            self._runner = self._open()
        if not self._is_busy:
            self._runner.begin()
        with in_place_of_live(self._runner.rounded):
            told = self._turn(self._runner)
        self._is_busy = self._plan.num_in_flight > 0
        return told

    @contextmanager
    def _working(self) -> Iterator[None]:
        device = self.model.device.type
        precision = torch.autocast(
            device,
            dtype=self.autocast,
            enabled=self.autocast is not None,
            # a cast that a graph captured must not be left out because of an earlier one
            cache_enabled=not self._uses_graphs,
        )
        try:
            with torch.no_grad(), precision, evaluating(self.model):
                yield
        except BaseException:
            # what a broken turn left half done is not to be trusted
            self._abandon()
            self._prefixes.clear(None)
            self._runner = self._flight = None
            raise

    def _open(self) -> Runner:
        cache = DecodeCache(
            self.model.config,
            num_slots=self.limits.num_slots + 1,
            num_pages=self.limits.num_pages + 1,
            page_tokens=self.limits.page_tokens,
            dtype=self.model.dtype,
            device=self.model.device,
        )
        return Runner(
            self.model,
            cache,
            uses_graphs=self._uses_graphs,
            rounds_experts=self._rounds_experts,
            own_bits=self.own_bits,
            pads=self._pads,
        )

    def _turn(self, runner: Runner) -> list[tuple[Sample, Token]]:
        plan, cache = self._plan, runner.cache
        told: list[tuple[Sample, Token]] = []
        flight, self._flight = self._flight, None
        if flight is None or not flight.is_awaited:
            told = self._admit(runner)
            plan.make_room(cache, self._prefixes)
            if not plan.live:
                return told
            flight = runner.launch(plan.live)
        if self._looks_ahead and (staying := plan.staying(cache)):
            self._flight = runner.launch(staying, behind=flight)
        decoded = self._take(*runner.land(flight))
        plan.end([sample for sample, token in decoded if token.completion is not None], cache)
        return told + decoded

    def _admit(self, runner: Runner) -> list[tuple[Sample, Token]]:
        """Prefills who is new and gives the first tokens of those who start."""
        plan, cache = self._plan, runner.cache
        pieces, started = plan.admit(cache, self._prefixes)
        for piece in pieces:
            if piece.group.version is None:
                piece.group.version = self._version
        runner.prefill(pieces, self._prefixes, self.limits.prefill_tokens)
        told = self._take(started, runner.first_tokens(started)) if started else []
        ended = {sample for sample, token in told if token.completion is not None}
        for sample in started:
            group = sample.group
            takes_root = sample.index == group.request.num_samples - 1
            if sample not in ended:
                sample.slot = group.root if takes_root else cache.fork(group.root)
                plan.live.append(sample)
            elif takes_root:
                cache.free(group.root)
            if takes_root:
                group.root, group.logits = -1, None
        plan.end(list(ended), cache)
        return told

    def _take(
        self, samples: Sequence[Sample], columns: Sequence[Sequence[float]]
    ) -> list[tuple[Sample, Token]]:
        """Adds a token to each sample."""
        told = []
        for sample, token, logprob, *rest in zip(samples, *columns, strict=True):
            finish = sample.take(int(token), logprob, *rest, decode=self._text)
            done = None if finish is None else sample.completion(finish, self._version)
            request_id = sample.group.request.request_id
            told.append((sample, Token(request_id, sample.index, int(token), logprob, done)))
        return told

    def _abandon(self) -> None:
        cache = None if self._runner is None else self._runner.cache
        for group in self._plan.groups.values():
            self._plan.cancel(group, cache)
        self._is_busy = False

    def _check_alive(self) -> None:
        if self._fault:
            raise RuntimeError(self._fault)

    def _check_request(self, request: Request) -> None:
        refuse_unless_it_fits(request, self.limits)
        vocabulary = self.model.config.vocab_size
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocabulary:
            bad = next(token for token in request.prompt if not 0 <= token < vocabulary)
            raise ValueError(
                f"request {request.request_id!r}: token {bad} is outside the model's "
                f"vocabulary of {vocabulary}; render it with the model's own tokenizer"
            )
        if request.sampling.stop_strings and self._text is None:
            raise ValueError(
                f"request {request.request_id!r}: stop_strings = "
                f"{request.sampling.stop_strings} need text; give the engine `decode`"
            )
