"""Kind `reward`: preference pairs to a reward model with one head per signal.

Each pair trains what its label speaks about (Bradley-Terry): one head, the weighted mean of a
dimension's heads, or (`overall`) the gate-weighted total of all; a learned gate is trained by the
last of these, and then they train nothing else. Heads are read where the
response's turn ends, the gate where the prompt ends. The artifact is a reward folder
(`reward.model`) with the tokenizer, the held-out report and the record of which pair was seen when.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.course import Job, Outcome, Step
from align.data.batch import Batch, Pair
from align.data.files import NamedFile
from align.data.loader import PackedData
from align.data.sources import DataConfig
from align.data.supply import supply_pairs
from align.lessons import Lessons
from align.loop import TrainConfig, train
from align.lora import apply_lora
from align.losses.reward import reward_loss
from align.losses.types import Loss
from align.pairs import (
    PairAccuracy,
    check_labels,
    label_mask,
    labelled_leads,
    pair_accuracy,
    pair_facts,
    pair_leads,
    policy_margins,
    prompt_lengths,
    to_end_of_turn,
)
from align.questions import HeadCalibration, Questions, ask, calibrate, write_questions
from align.shared_reward import settled, shard_heads
from align.trainers.lm import FixedCourse, open_start
from model import HybridForCausalLM
from model.packed import sent
from reward.calibration import Method
from reward.constitution import read_constitution
from reward.curriculum import CurriculumConfig, PairFacts
from reward.hierarchy import HIERARCHY, OVERALL, Hierarchy
from reward.model import RewardModel
from reward.sandbox import Sandbox

REPORT_FILE = "held_out.json"
RECORD_FILE = "curriculum.jsonl"


class RewardConfig(TrainConfig):
    """A reward model from preference rows."""

    data: tuple[DataConfig, ...] = Field(min_length=1)
    """Pairs to train on; each row's `signal` names the head that its label trains."""
    dev: tuple[DataConfig, ...] = ()
    """Held-out pairs; empty takes the `dev` split of every source that trains on its `train`
    (of a task, dev_share times its num_rows)."""
    hierarchy: Hierarchy = HIERARCHY
    """Signals, dimensions and gate; stored with the model and returned with every score."""
    constitution: NamedFile | None = None
    """File whose criteria take the place of the tree's harmlessness; absent keeps the tree's."""
    curriculum: CurriculumConfig | Literal["none"] = CurriculumConfig()
    """Order from easy to hard; `none` draws in random order at the same cost."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong."""
    centring: float = Field(default=0.01, ge=0)
    """Weight of the squared sum of a pair's two values, which keeps them around 0."""
    calibration: Method | Literal["none"] = "temperature"
    """How chances are fitted on the held-out pairs: heads by a temperature, the total by this."""
    margin_scale: float = Field(default=0.0, ge=0)
    """The chosen answer should lead by this times the label's margin, in logits."""

    @model_validator(mode="after")
    def _refreshes_in_steps(self) -> Self:
        if self.curriculum != "none" and self.curriculum.refreshes and not self.batch_items:
            raise ValueError(
                f"curriculum.refreshes = {self.curriculum.refreshes} with batch_items = 0: the "
                "number of steps has to be known before the first; set batch_items"
            )
        return self


@dataclass(frozen=True)
class RewardCourse(FixedCourse):
    """Bradley-Terry per head over packed pairs; counts pairs."""

    labels: tuple[str, ...]
    config: RewardConfig

    def count(self, batch: Batch) -> float:
        return float(len(batch.pairs))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Every pair trains what its label speaks about."""
        out = model(batch.packed, prompt_lengths(batch.pairs))
        values = out.labelled
        self._noted(batch, labelled_leads(values.detach(), batch.pairs, self.labels))
        mask = sent(label_mask(batch.pairs, self.labels), values.device)
        margins = [self.config.margin_scale * pair.margin for pair in batch.pairs]
        return reward_loss(
            values[0::2],
            values[1::2],
            mask=mask,
            margin=sent(torch.tensor(margins, dtype=values.dtype), values.device),
            label_smoothing=self.config.label_smoothing,
            centring=self.config.centring,
            heads=self.labels,
            aux=out.aux_loss,
        )

    def _noted(self, batch: Batch, leads: Tensor) -> None:
        """Told by how much each pair of a microbatch led."""


@dataclass(frozen=True)
class LessonCourse(RewardCourse):
    """The same over pairs in the curriculum's order; keeps by how much each one led when trained.

    Args:
        lessons: which pairs each step sees.
        model: asked where the curriculum refreshes.
        ledger: filled on the way; step, places and leads of each microbatch.
    """

    lessons: Lessons
    model: RewardModel
    ledger: Ledger

    @property
    def num_steps(self) -> int:
        return self.lessons.num_steps

    def step(self, index: int) -> Step:
        metrics: dict[str, float] = {}
        if self.lessons.is_due(index):
            margins = self._margins() if index else []
            metrics["competence"] = self.lessons.draw(margins)
            if margins:
                metrics["refresh_tokens"] = float(self.data.num_tokens)
        accelerator = self.accelerator
        rank = accelerator.process_index // self.ranks_per_row
        world = accelerator.num_processes // self.ranks_per_row
        self.ledger.step = index
        return Step(self.lessons.batches(index, rank, world), metrics)

    def _noted(self, batch: Batch, leads: Tensor) -> None:
        self.ledger.add(batch.pairs, leads)

    def _margins(self) -> list[float]:
        """Leads of all pairs as the model is now; rank 0's, so that all draw alike."""
        leads = pair_leads(
            self.model,
            self.lessons.pairs,
            batch_tokens=self.config.sequence_tokens * self.config.micro_sequences,
            precision=partial(autocast, self.config, self.accelerator),
        )
        shared: list[Any] = [leads]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(shared)
        return list(shared[0])

    def state_dict(self) -> dict[str, Any]:
        # one process's state is kept, for all of them to load
        margins = _gathered(self.ledger.margins(), self.accelerator)
        return {**self.lessons.state_dict(), "ledger": margins}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lessons.load_state_dict(state)
        self.ledger.load(state["ledger"])


class Ledger:
    """By how much each pair led in the step that trained it; read from the device once, at the end.

    Example:
        >>> ledger = Ledger()
        >>> ledger.margins()
        {}
    """

    def __init__(self) -> None:
        self.step = 0
        self._read: dict[tuple[int, str], float] = {}
        self._waiting: list[tuple[int, tuple[str, ...], Tensor]] = []

    def add(self, pairs: Sequence[Pair], leads: Tensor) -> None:
        places = tuple(pair.chosen.place for pair in pairs)
        self._waiting.append((self.step, places, leads.detach()))

    def load(self, margins: Mapping[tuple[int, str], float]) -> None:
        self._read = dict(margins)

    def margins(self) -> dict[tuple[int, str], float]:
        """Lead in logits by step and place; of this process's pairs."""
        for step, places, leads in self._waiting:
            for place, lead in zip(places, leads.tolist(), strict=True):
                # A filler repeats a pair of the step; the first forward was the trained one.
                self._read.setdefault((step, place), lead)
        self._waiting.clear()
        return dict(self._read)


def autocast(config: TrainConfig, accelerator: Accelerator) -> AbstractContextManager[object]:
    """What forward passes of training run in."""
    if not config.has_autocast:
        return nullcontext()
    return torch.autocast(accelerator.device.type, dtype=torch.bfloat16)


def run(config: RewardConfig, job: Job) -> Outcome:
    """Trains heads and trunk from job.start on pairs and writes the reward folder to job.artifact.

    Raises:
        ValueError: if a row, a label, a file or the starting policy is not what it should be, or
            nothing is held out.
        RuntimeError: as `align.loop.train`.
    """
    if config.constitution is not None:
        told = read_constitution(job.base / config.constitution.path)
        config = config.model_copy(update={"hierarchy": told.over(config.hierarchy)})
    start, tokenizer = open_start(config, job)
    supplied, sources = supply_pairs(config, job, tokenizer)
    dev = held_out(config, job, tokenizer)
    trained = replace(supplied, items=tuple(to_end_of_turn(pair) for pair in _pairs(supplied)))
    pairs = _pairs(trained)
    lessons = Lessons(trained, _facts(config, start, pairs), config.curriculum)

    adapters = None if config.lora is None else apply_lora(start.model, config.lora, seed=job.seed)
    # peft puts its adapters into the trunk itself, so the reward model needs no wrapper.
    model = RewardModel(start.model, config.hierarchy, seed=job.seed)
    check_labels((*pairs, *dev), model.labels)
    _check_heads(config, pairs)
    measure = None if config.curriculum == "none" else config.curriculum
    precision = partial(autocast, config, job.accelerator)
    before = pair_accuracy(model, dev, curriculum=measure, precision=precision)
    course = LessonCourse(
        trained,
        job.accelerator,
        ranks_per_row=config.parallel.sequence,
        config=config,
        labels=model.labels,
        lessons=lessons,
        model=model,
        ledger=Ledger(),
    )
    if job.accelerator.is_fsdp2:
        shard_heads(model)
    metrics = train(course, model, config=config, job=job)
    model = settled(model, adapters)
    answers = _questioned(config, job, model, dev, tokenizer=tokenizer)
    after = pair_accuracy(model, dev, curriculum=measure, precision=precision)
    then = _gathered(course.ledger.margins(), job.accelerator)
    later = pair_leads(model, pairs, precision=precision)
    if job.accelerator.is_main_process:
        model.save(job.artifact)
        tokenizer.save_pretrained(job.artifact)
        _write_report(job.artifact / REPORT_FILE, before, after)
        if answers is not None:
            write_questions(job.artifact, *answers)
        lines = (json.dumps(asdict(line)) + "\n" for line in lessons.record(then, later))
        (job.artifact / RECORD_FILE).write_text("".join(lines), encoding="utf-8")
    job.accelerator.wait_for_everyone()
    return Outcome({**metrics, **_told("before", before), **_told("after", after)}, sources)


def _questioned(
    config: RewardConfig,
    job: Job,
    model: RewardModel,
    dev: Sequence[Pair],
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Questions, HeadCalibration] | None:
    """Calibrates the heads in place and asks; None where calibration is not wanted or possible."""
    if config.calibration == "none":
        return None
    precision = partial(autocast, config, job.accelerator)
    calibration = calibrate(model, dev, method=config.calibration, precision=precision)
    if calibration is None:
        return None
    found = ask(
        model,
        dev,
        tokenizer,
        method=config.calibration,
        curriculum=None if config.curriculum == "none" else config.curriculum,
        precision=precision,
        sandbox=Sandbox(job.sandbox),
    )
    return found, calibration


def held_out(
    config: RewardConfig, job: Job, tokenizer: PreTrainedTokenizerBase
) -> tuple[Pair, ...]:
    """The pairs that measure the model and never train it.

    Raises: ValueError if no source holds anything out.
    """
    dev = config.dev or tuple(_dev_source(s) for s in config.data if s.split == "train")
    if not dev:
        raise ValueError(
            f"{job.name}: dev = [] and no source of data has split: train, so nothing is held "
            "out; set split: train on a source or name held-out pairs in dev"
        )
    return _pairs(supply_pairs(config.model_copy(update={"data": dev}), job, tokenizer)[0])


def _dev_source(source: DataConfig) -> DataConfig:
    """The other side of a source that trains; a task makes dev_share as many rows."""
    num_rows = max(1, round(source.num_rows * source.dev_share))
    return source.model_copy(update={"split": "dev", "weight": 1.0, "num_rows": num_rows})


def _pairs(data: PackedData) -> tuple[Pair, ...]:
    return tuple(item for item in data.items if isinstance(item, Pair))


def _facts(
    config: RewardConfig, start: HybridForCausalLM, pairs: Sequence[Pair]
) -> list[PairFacts]:
    if config.curriculum == "none" or not config.curriculum.model_weight:
        return [pair_facts(pair, config.hierarchy) for pair in pairs]
    margins = policy_margins(start, pairs, config.sequence_tokens)
    return [
        pair_facts(pair, config.hierarchy, margin)
        for pair, margin in zip(pairs, margins, strict=True)
    ]


def _check_heads(config: RewardConfig, pairs: Sequence[Pair]) -> None:
    tree, labels = config.hierarchy, {pair.signal for pair in pairs}
    shown = ", ".join(sorted(labels))
    is_learned = tree.gate == "learned"
    if is_learned and OVERALL not in labels:
        raise ValueError(
            f"hierarchy.gate = learned, but no training pair labels {OVERALL}, which alone trains "
            f"the gate; labels are {shown}: add such pairs or set gate: declared"
        )
    whole = set() if is_learned else {OVERALL}
    idle = [
        signal
        for name, dimension in tree.dimensions.items()
        for signal in dimension.head_shares
        if not {signal, name, *whole} & labels
    ]
    if idle:
        raise ValueError(
            f"no training pair labels {', '.join(idle)}, which would stay random and add noise to "
            f"every score; labels are {shown}: set head: false or drop these signals from "
            f"hierarchy {tree.name!r}"
            + (f" (with a learned gate {OVERALL} trains no head)" if is_learned else "")
        )


def _gathered(
    margins: Mapping[tuple[int, str], float], accelerator: Accelerator
) -> dict[tuple[int, str], float]:
    """The margins of all processes' pairs."""
    if accelerator.num_processes == 1:
        return dict(margins)
    return dict(gather_object(list(margins.items())))


def _write_report(path: Path, before: PairAccuracy, after: PairAccuracy) -> None:
    told = {name: asdict(report) for name, report in (("before", before), ("after", after))}
    for report in told.values():
        del report["leads"]
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _told(when: str, report: PairAccuracy) -> dict[str, float]:
    groups = {**report.by_signal, **report.by_difficulty}
    return {
        f"{when}/accuracy": report.accuracy,
        **{f"{when}/accuracy/{name}": value for name, value in groups.items()},
    }
