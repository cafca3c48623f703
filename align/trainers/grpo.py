"""Kind `grpo`: online RL. Sample groups with the current policy, judge, learn from the difference.

A rollout covers `updates_per_rollout` optimizer steps of `prompts_per_step` prompts each. The first
of them is on-policy; what the others compare with, the behaviour log-probabilities, is fixed when
the rollout is made. The engine reads the trainer's own weights, or a copy or workers are sent them
and prove it; the version of a completion is the number of updates that its policy had seen.

A killed run continues exactly: samples depend on (seed, number of the prompt, sample), and
experience that waits for its step is in the checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Self

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.advantage import Scale, advantages
from align.course import Job, Outcome, Step
from align.data.batch import Batch, Example
from align.data.packing import pack
from align.data.sources import DataConfig
from align.engines import RolloutConfig, open_source
from align.experience import describe, examples_of
from align.ledger import entries
from align.loop import TrainConfig
from align.losses.policy import PolicyLossConfig, policy_count, policy_loss
from align.losses.types import Loss
from align.prompts import Prompts, end_of_turn, judged, open_scorer, read_prompts, requests_of
from align.sampler import Sampler, staleness
from align.trainers.dpo import reference_of
from align.trainers.lm import adapted, fit, open_start
from align.turns import Turns
from model import HybridForCausalLM
from reward.types import Scorer
from rollout.types import Request, Sampling


class GrpoConfig(TrainConfig):
    """Group-relative policy optimisation on prompts that somebody can judge."""

    data: tuple[DataConfig, ...] = Field(min_length=1)
    """Where the prompts come from."""
    prompts_per_step: int = Field(default=16, ge=1)
    """Prompts per optimizer step, over all processes."""
    group_size: int = Field(default=8, ge=2)
    """Responses sampled to each prompt."""
    updates_per_rollout: int = Field(default=1, ge=1)
    """Optimizer steps that one rollout is cut into; 1 keeps every step on-policy."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest response in tokens, the end-of-turn token counted."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling and of the policy that is trained."""
    loss: PolicyLossConfig = PolicyLossConfig()
    """Objective and its bounds."""
    scale: Scale = "group"
    """What advantages are divided by: the deviation of the group, of the batch, or nothing."""
    flat_groups: Literal["keep", "leave_out"] = "keep"
    """Groups of equal scores: kept, they count in the means; left out, they cost no training."""
    behaviour: Literal["trainer", "engine"] = "trainer"
    """Whose log-probabilities the ratio is taken to; trainer makes the first ratio exactly 1."""
    experts: Literal["router", "record", "replay"] = "router"
    """Whose choice of experts is trained: the router's; the same, with the engine's recorded to
    measure how often they agree; or the engine's, replayed and weighed by the router."""
    max_concurrent: int = Field(default=256, ge=1)
    """Responses decoded at once by one process; bounds memory, never changes a result."""
    rollout: RolloutConfig = RolloutConfig()
    """Who samples: the trainer itself, vLLM beside it, or workers."""

    @property
    def max_sequences(self) -> int:
        """Of a response each, at most."""
        return self.prompts_per_step * self.group_size

    @model_validator(mode="after")
    def _what_is_sampled_can_be_compared(self) -> Self:
        if self.rollout.max_staleness and self.behaviour != "engine":
            raise ValueError(
                f"rollout.max_staleness = {self.rollout.max_staleness} with behaviour = "
                f"{self.behaviour}, expected engine: the trainer has changed since, so its own "
                "numbers are not those of the policy that sampled; set behaviour: engine"
            )
        if self.experts != "router" and self.parallel.sequence > 1:
            raise ValueError(
                f"experts = {self.experts} with parallel.sequence = {self.parallel.sequence}, "
                "expected router: recorded experts are of whole rows; set one of the two back"
            )
        return self

    @model_validator(mode="after")
    def _samples_in_fp64(self) -> Self:
        if self.precision == "fp64" and (self.rollout.workers or self.rollout.backend != "native"):
            raise ValueError(
                "precision = fp64 with rollout.workers or rollout.backend = vllm, expected the "
                "native engine in the trainer: they sample in fp32; set one of the two back"
            )
        return self

    @model_validator(mode="after")
    def _steps_are_made_of_prompts(self) -> Self:
        unused = {"batch_sequences", "batch_items"} & self.model_fields_set
        if unused:
            raise ValueError(
                f"{sorted(unused)[0]} is not used by grpo, whose steps are made of prompts; "
                "remove it and set prompts_per_step"
            )
        if self.max_new_tokens >= self.sequence_tokens:
            raise ValueError(
                f"max_new_tokens = {self.max_new_tokens}, expected less than sequence_tokens = "
                f"{self.sequence_tokens}, which holds prompt and response"
            )
        return self


@dataclass(frozen=True)
class Tools:
    """What a course samples and judges with."""

    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer


class GrpoCourse:
    """Sampling and learning by turns; implements `align.course.Course`.

    Args:
        policy: the live model, possibly with adapters.
        reference: as `align.trainers.dpo.DpoCourse`; None if loss.beta is 0.
    """

    def __init__(
        self,
        config: GrpoConfig,
        job: Job,
        *,
        policy: HybridForCausalLM | PeftModel,
        reference: HybridForCausalLM | PeftModel | None,
        prompts: Prompts,
        tools: Tools,
    ) -> None:
        self.config, self.job = config, job
        self.policy, self.reference = policy, reference
        self.tools = tools
        self.turns = Turns(
            prompts.items,
            num_prompts=(
                config.max_steps * config.prompts_per_step
                if config.max_steps
                else config.epochs * len(prompts.items)
            ),
            per_step=config.prompts_per_step,
            steps_a_rollout=config.updates_per_rollout,
            seed=job.seed,
            shuffle=config.shuffle,
            process=(job.accelerator.process_index, job.accelerator.num_processes),
        )
        self.num_steps = self.turns.num_steps
        self.source = open_source(
            config.rollout,
            job,
            policy,
            max_concurrent=config.max_concurrent,
            max_tokens=prompts.max_tokens + config.max_new_tokens,
            autocast=torch.bfloat16 if config.has_autocast else None,
            is_shared=job.accelerator.is_fsdp2 or config.parallel.expert > 1,
        )
        self.sampler = Sampler(self.source, self.turns, group_size=config.group_size)
        # Experience of the rollout's later steps, the next one first; of all processes, so that a
        # checkpoint of it fits any number of them.
        self.waiting: list[list[Example]] = []
        self.is_on_policy = True

    def step(self, index: int) -> Step:
        """This process's share of step `index`; samples a new rollout when the last is used up."""
        place = index % self.config.updates_per_rollout
        metrics: dict[str, float] = {}
        if place == 0:
            self.waiting, metrics = self._rollout(index)
        if not self.waiting:
            raise RuntimeError(
                f"{self.job.name}: step {index + 1} lies inside a rollout that is not there; "
                "resume from a checkpoint of this run"
            )
        self.is_on_policy = place == 0
        row, rows = self._row
        return Step(self._batches(self.waiting.pop(0))[row::rows], metrics)

    def count(self, batch: Batch) -> float:
        return policy_count(batch.weights, batch.packed.lengths, self.config.loss)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        out = self._forward(model, batch)
        behaviour = _given(batch.behaviour_logprobs).to(out.logprobs)
        taught = _given(batch.advantages).to(out.logprobs)
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        maxima: dict[str, Tensor] = {}
        ledger: Tensor | None = None
        if self.is_on_policy:
            # Before any bound: how far the engine's numbers are from the trainer's.
            gap = ((out.logprobs.detach() - behaviour) * batch.weights).abs()
            metrics["engine/gap"] = (gap.sum(), batch.weights.sum())
            maxima["engine/gap_max"] = gap.max()
            ledger = entries(
                out.logprobs,
                behaviour,
                advantages=taught,
                weights=batch.weights,
                lengths=batch.packed.lengths,
                config=self.config.loss,
                experts=batch.experts,
                router_logits=out.router_logits,
            )
            if self.config.behaviour == "trainer":
                # The same numbers, so the ratio is 1 to the last bit.
                behaviour = out.logprobs.detach()
        loss = policy_loss(
            out.logprobs,
            behaviour=behaviour,
            advantages=taught,
            weights=batch.weights,
            lengths=batch.packed.lengths,
            config=self.config.loss,
            reference=self._reference_logprobs(batch),
            entropy=out.entropy,
            aux=out.aux_loss,
        )
        return replace(
            loss,
            metrics={**loss.metrics, **metrics},
            maxima={**loss.maxima, **maxima},
            ledger=ledger,
        )

    def state_dict(self) -> dict[str, Any]:
        """Experience that still waits for its step, as plain values."""
        return {
            "waiting": [
                [
                    (e.tokens, e.weights, e.place, e.behaviour_logprobs, e.advantages, e.experts)
                    for e in later
                ]
                for later in self.waiting
            ],
            "ahead": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.waiting = [[Example(*values) for values in later] for later in state["waiting"]]
        self.sampler.load_state_dict(state["ahead"])

    def _rollout(self, index: int) -> tuple[list[list[Example]], dict[str, float]]:
        """Experience of all processes for the steps from `index` on, in the prompts' order.

        Groups are judged against themselves; a deviation over the batch is over all processes. All
        processes sample, each prompts of its own, and are told what the others sampled.
        """
        config, accelerator = self.config, self.job.accelerator
        done = self.sampler.take(index, self._requests(index))
        later = index + config.updates_per_rollout
        if config.rollout.max_staleness and later < self.num_steps:
            self.sampler.begin(later, self._requests(later), version=index)
        groups = judged(
            self.turns.own(index), done, tokenizer=self.tools.tokenizer, scorer=self.tools.scorer
        )
        every = gather_object([groups]) if accelerator.num_processes > 1 else [groups]
        by_step = self.turns.in_order(index, every)
        together = [group for of_step in by_step for group in of_step]
        found = advantages([group.scores for group in together], config.scale)
        values = iter(found.values)
        if config.flat_groups == "leave_out":
            values = (v if any(v) else (None,) * len(v) for v in found.values)
        steps = [examples_of(of_step, list(islice(values, len(of_step)))) for of_step in by_step]
        metrics = describe(together, found) | staleness(together, index)
        if config.behaviour == "trainer":
            steps[1:] = [self._rescored(examples) for examples in steps[1:]]
        return steps, metrics

    def _requests(self, index: int) -> list[Request]:
        config = self.config
        return requests_of(
            self.turns.own(index),
            sampling=Sampling(
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                stop_token_ids=(end_of_turn(self.tools.tokenizer),),
            ),
            num_samples=config.group_size,
            return_experts=config.experts != "router",
        )

    def close(self) -> None:
        """Withdraws what is sampled ahead, and ends the engine."""
        self.sampler.close()

    @property
    def _row(self) -> tuple[int, int]:
        """Which of the rows computed at once this process has a part in, and how many there are."""
        parallel, accelerator = self.config.parallel, self.job.accelerator
        place = parallel.place(accelerator.process_index)
        return place, parallel.rows_at_once(accelerator.num_processes)

    def _batches(self, examples: Sequence[Example]) -> tuple[Batch, ...]:
        """Microbatches of a whole step, to be dealt out by turns."""
        lengths = [len(example.tokens) for example in examples]
        runs = pack(lengths, self.config.sequence_tokens)
        size = self.config.micro_sequences
        micro = [runs[i : i + size] for i in range(0, len(runs), size)]
        return tuple(Batch.from_examples(examples[m[0].start : m[-1].stop]) for m in micro)

    def _rescored(self, examples: Sequence[Example]) -> list[Example]:
        """The same examples with the trainer's own log-probabilities, packed as they will be."""
        batches = self._batches(examples)
        lengths = (length for batch in batches for length in batch.packed.lengths)
        logprobs = [x for batch in self._logprobs(batches) for x in batch]
        rescored: list[Example] = []
        start = 0
        for example, length in zip(examples, lengths, strict=True):
            shifted = (0.0, *logprobs[start : start + length - 1])
            weighed = zip(shifted, example.weights, strict=True)
            behaviour = tuple(x if weight else 0.0 for x, weight in weighed)
            rescored.append(replace(example, behaviour_logprobs=behaviour))
            start += length
        return rescored

    @torch.no_grad()
    def _logprobs(self, batches: Sequence[Batch]) -> list[list[float]]:
        """Of each batch; processes compute those that they will learn from and tell the others."""
        accelerator, (row, rows) = self.job.accelerator, self._row
        device = accelerator.device
        mine: dict[int, list[float]] = {}
        for first in range(0, len(batches), rows):
            # a process with no batch left joins in the last, so that collectives inside meet
            number = min(first + row, len(batches) - 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.config.has_autocast):
                out = self._forward(self.policy, batches[number].to(device))
            mine[number] = out.logprobs.tolist()
        every = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
        found = {number: logprobs for share in every for number, logprobs in share.items()}
        return [found[number] for number in range(len(batches))]

    def _forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(
            packed=batch.packed,
            targets=batch.targets,
            temperature=self.config.temperature,
            with_entropy=True,
            experts=batch.experts if self.config.experts == "replay" else None,
        )

    @torch.no_grad()
    def _reference_logprobs(self, batch: Batch) -> Tensor | None:
        if self.reference is None:
            return None
        with reference_of(self.reference) as reference:
            logprobs: Tensor = self._forward(reference, batch).logprobs
        return logprobs


def _given(extra: Tensor | None) -> Tensor:
    assert extra is not None, "experience holds advantages and behaviour log-probabilities"
    return extra


def run(config: GrpoConfig, job: Job) -> Outcome:
    """Trains job.start on its own judged responses and writes the policy to job.artifact.

    Raises:
        ValueError: if a row, a file or the starting policy is not what it should be, or the
            launch does not go with it.
        RuntimeError: as `align.loop.train`.
    """
    start, tokenizer = open_start(config, job)
    prompts = read_prompts(
        config.data,
        job=job,
        tokenizer=tokenizer,
        max_tokens=config.sequence_tokens - config.max_new_tokens,
    )
    policy = adapted(start, config, job)
    reference: HybridForCausalLM | PeftModel | None = None
    if config.loss.beta:
        reference = policy if config.lora else copy.deepcopy(start).requires_grad_(False)
    tools = Tools(tokenizer, open_scorer(job, tokenizer))
    course = GrpoCourse(
        config, job, policy=policy, reference=reference, prompts=prompts, tools=tools
    )
    try:
        metrics = fit(course, policy, tokenizer, config=config, job=job)
    finally:
        course.close()
    return Outcome(metrics, prompts.data)
