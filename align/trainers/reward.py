"""Kind `reward`: preference pairs to a reward model with one head per signal.

Each pair trains the head its label speaks about (Bradley-Terry); a pair labelled `overall` trains
the gate-weighted total of all heads. Heads are read where the response's turn ends, the gate where
the prompt ends. The artifact is a reward folder (`reward.model`) with the tokenizer, the held-out
report and the record of which pair was seen when.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Self

import torch
from accelerate.utils import DistributedType
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.course import Job, Outcome
from align.data.batch import Batch, Example, Pair
from align.data.loader import PackedData
from align.data.sources import DataConfig
from align.data.supply import supply_pairs
from align.loop import TrainConfig, train
from align.lora import apply_lora
from align.losses.dpo import sequence_logprobs
from align.losses.reward import reward_loss
from align.losses.types import Loss
from align.trainers.lm import FixedCourse, open_start
from model import HybridForCausalLM
from model.packed import sent
from reward.curriculum import OVERALL, CurriculumConfig, PairFacts, difficulty, order, record
from reward.hierarchy import HIERARCHY, Hierarchy
from reward.model import RewardModel

REPORT_FILE = "held_out.json"
RECORD_FILE = "curriculum.jsonl"
BUCKETS = ("easy", "medium", "hard")


class RewardConfig(TrainConfig):
    """A reward model from preference rows."""

    data: tuple[DataConfig, ...] = Field(min_length=1)
    """Pairs to train on; each row's `signal` names the head that its label trains."""
    dev: tuple[DataConfig, ...] = ()
    """Held-out pairs; empty takes the `dev` split of every source that trains on its `train`
    (of a task, dev_share times its num_rows)."""
    hierarchy: Hierarchy = HIERARCHY
    """Signals, dimensions and gate; stored with the model and returned with every score."""
    curriculum: CurriculumConfig | Literal["none"] = CurriculumConfig()
    """Order from easy to hard; `none` draws in random order at the same cost."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a label is wrong."""
    centring: float = Field(default=0.01, ge=0)
    """Weight of the squared sum of a pair's two values, which keeps them around 0."""
    margin_scale: float = Field(default=0.0, ge=0)
    """The chosen answer should lead by this times the label's margin, in logits."""

    @model_validator(mode="after")
    def _holds_all_experts(self) -> Self:
        if self.parallel.expert > 1:
            raise ValueError(
                f"parallel.expert = {self.parallel.expert}, expected 1: a reward model is measured "
                "and saved with all experts; share rows (parallel.sequence) instead"
            )
        return self


@dataclass(frozen=True)
class RewardCourse(FixedCourse):
    """Bradley-Terry per head over packed pairs; counts pairs."""

    columns: tuple[str, ...]
    config: RewardConfig

    def count(self, batch: Batch) -> float:
        return float(len(batch.pairs))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Every pair labels one column: one of the heads, or the last, their total."""
        out = model(batch.packed, prompt_lengths(batch.pairs))
        values = torch.cat([out.values, out.overall[:, None]], dim=1)
        mask = sent(label_mask(batch.pairs, self.columns), values.device)
        margins = [self.config.margin_scale * pair.margin for pair in batch.pairs]
        return reward_loss(
            values[0::2],
            values[1::2],
            mask=mask,
            margin=sent(torch.tensor(margins, dtype=values.dtype), values.device),
            label_smoothing=self.config.label_smoothing,
            centring=self.config.centring,
            heads=self.columns,
            aux=out.aux_loss,
        )


@dataclass(frozen=True)
class PairAccuracy:
    """How often the chosen answer has the higher value, ties half.

    Args:
        leads: chosen minus rejected of each pair under its label's head, in pair order.
        accuracy: over all pairs.
        by_signal, by_difficulty: over the pairs of one signal, or one of easy, medium, hard
            (thirds of the difficulty scale); groups without a pair are absent.
        num_pairs: pairs of each group, by the names above.
    """

    leads: tuple[float, ...]
    accuracy: float
    by_signal: Mapping[str, float]
    by_difficulty: Mapping[str, float]
    num_pairs: Mapping[str, int]


def pair_leads(
    model: RewardModel, pairs: Sequence[Pair], *, batch_tokens: int = 16384
) -> list[float]:
    """Value of chosen minus value of rejected under each pair's own head, in logits.

    Raises: ValueError if a pair is labelled with a signal that the model has no head for.
    """
    columns = (*model.signals, OVERALL)
    check_labels(pairs, columns)
    was_training = model.training
    model.eval()
    leads: list[float] = []
    with torch.no_grad():
        for some in _by_tokens([to_end_of_turn(pair) for pair in pairs], batch_tokens):
            packed = Batch.from_pairs(some).packed.to(model.values.weight.device)
            out = model(packed, prompt_lengths(some))
            values = torch.cat([out.values, out.overall[:, None]], dim=1)
            lead = (values[0::2] - values[1::2]) * label_mask(some, columns).to(values.device)
            leads.extend(lead.sum(1).tolist())
    model.train(was_training)
    return leads


def pair_accuracy(
    model: RewardModel,
    pairs: Sequence[Pair],
    *,
    curriculum: CurriculumConfig | None = None,
    batch_tokens: int = 16384,
) -> PairAccuracy:
    """Accuracy of a reward model on labelled pairs, by signal and by difficulty.

    Args:
        curriculum: how difficulty is measured; None takes the default weights.
        batch_tokens: tokens per forward pass; changes memory, not the result.

    Raises: ValueError if there is no pair, or as `pair_leads`.
    """
    if not pairs:
        raise ValueError("pair_accuracy: no pairs, expected one or more; check the dev split")
    leads = pair_leads(model, pairs, batch_tokens=batch_tokens)
    wins = [0.5 if lead == 0 else float(lead > 0) for lead in leads]
    measured = curriculum or CurriculumConfig()
    signals: dict[str, list[float]] = {}
    buckets: dict[str, list[float]] = {}
    for pair, win in zip(pairs, wins, strict=True):
        hard = difficulty(pair_facts(pair), measured)
        signals.setdefault(pair.signal, []).append(win)
        buckets.setdefault(BUCKETS[min(int(3 * hard), 2)], []).append(win)
    return PairAccuracy(
        leads=tuple(leads),
        accuracy=_mean(wins),
        by_signal={name: _mean(signals[name]) for name in sorted(signals)},
        by_difficulty={name: _mean(buckets[name]) for name in BUCKETS if name in buckets},
        num_pairs={name: len(group) for name, group in {**signals, **buckets}.items()},
    )


def run(config: RewardConfig, job: Job) -> Outcome:
    """Trains heads and trunk from job.start on pairs and writes the reward folder to job.artifact.

    Raises:
        ValueError: if a row, a label, a file or the starting policy is not what it should be, or
            nothing is held out.
        RuntimeError: as `align.loop.train`.
    """
    if job.accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(f"{job.name}: kind reward is not sharded yet; launch with cpu or ddp")
    start, tokenizer = open_start(config, job)
    supplied, sources = supply_pairs(config, job, tokenizer)
    dev = held_out(config, job, tokenizer)
    trained = replace(supplied, items=tuple(to_end_of_turn(pair) for pair in _pairs(supplied)))
    facts = _facts(config, start, _pairs(trained))
    data, drawn = arranged(config, trained, facts, seed=job.seed)

    adapters = None if config.lora is None else apply_lora(start.model, config.lora, seed=job.seed)
    # peft puts its adapters into the trunk itself, so the reward model needs no wrapper.
    model = RewardModel(start.model, config.hierarchy, seed=job.seed)
    columns = (*model.signals, OVERALL)
    check_labels((*_pairs(trained), *dev), columns)
    _check_heads(config, _pairs(trained), model.signals)
    before = pair_accuracy(model, dev, curriculum=_measure(config))
    course = RewardCourse(
        data,
        job.accelerator,
        columns=columns,
        config=config,
        ranks_per_row=config.parallel.sequence,
    )
    metrics = train(course, model, config=config, job=job)
    if adapters is not None:
        # fp32: small updates vanish when added in bf16.
        adapters.float()
        model.trunk = adapters.merge_and_unload(safe_merge=True)
    after = pair_accuracy(model, dev, curriculum=_measure(config))
    if job.accelerator.is_main_process:
        model.save(job.artifact)
        tokenizer.save_pretrained(job.artifact)
        _write_report(job.artifact / REPORT_FILE, before, after)
        seen = record(facts, _measure(config), _steps(data, drawn))
        lines = (json.dumps(asdict(line)) + "\n" for line in seen)
        (job.artifact / RECORD_FILE).write_text("".join(lines), encoding="utf-8")
    job.accelerator.wait_for_everyone()
    return Outcome({**metrics, **_told("before", before), **_told("after", after)}, sources)


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


def arranged(
    config: RewardConfig, data: PackedData, facts: Sequence[PairFacts], *, seed: int
) -> tuple[PackedData, tuple[int, ...]]:
    """The pairs in the curriculum's order, and which pair of `data` each draw is.

    With max_steps the pacing spans all epochs that the run begins, so that they hold enough steps.
    """
    pairs = _pairs(data)
    if config.curriculum == "none":
        return data, tuple(range(len(pairs)))
    per_epoch = replace(data, epochs=1, max_steps=0).num_steps
    epochs = -(-data.max_steps // per_epoch) if data.max_steps else data.epochs
    while True:
        drawn = tuple(order(facts, config.curriculum, epochs=epochs, seed=seed))
        whole = replace(data, items=[pairs[i] for i in drawn], shuffle=False, epochs=1, max_steps=0)
        if whole.num_steps >= data.max_steps:
            return replace(whole, max_steps=data.max_steps), drawn
        epochs += 1


def to_end_of_turn(pair: Pair) -> Pair:
    """The pair with whatever a template puts after the answers' end-of-turn token cut off.

    Values are read at the last token, and a policy's response ends at that one.
    """
    return replace(pair, chosen=_cut(pair.chosen), rejected=_cut(pair.rejected))


def prompt_lengths(pairs: Sequence[Pair]) -> list[int]:
    """Tokens before the first trained one, of chosen and rejected in turn."""
    return [_prompt_length(e) for pair in pairs for e in (pair.chosen, pair.rejected)]


def label_mask(pairs: Sequence[Pair], columns: Sequence[str]) -> Tensor:
    """[P, N] fp32, 1 in the column that each pair's label speaks about."""
    mask = torch.zeros(len(pairs), len(columns))
    for row, pair in enumerate(pairs):
        mask[row, columns.index(pair.signal)] = 1.0
    return mask


def check_labels(pairs: Sequence[Pair], columns: Sequence[str]) -> None:
    """Raises ValueError naming the first pair whose label no column stands for."""
    for pair in pairs:
        if pair.signal not in columns:
            raise ValueError(
                f"{pair.chosen.place}: signal = {pair.signal!r}, expected one of "
                f"{', '.join(columns)}; set the source's `signal` or add it to the hierarchy"
            )


def pair_facts(pair: Pair, model_margin: float | None = None) -> PairFacts:
    """What the curriculum needs to know of a pair."""
    return PairFacts(
        place=pair.chosen.place,
        signal=pair.signal,
        row_difficulty=pair.difficulty,
        margin=pair.margin,
        chosen_tokens=pair.chosen.num_trained,
        rejected_tokens=pair.rejected.num_trained,
        model_margin=model_margin,
    )


def _pairs(data: PackedData) -> tuple[Pair, ...]:
    return tuple(item for item in data.items if isinstance(item, Pair))


def _cut(example: Example) -> Example:
    end = max(index for index, weight in enumerate(example.weights) if weight) + 1
    return replace(example, tokens=example.tokens[:end], weights=example.weights[:end])


def _prompt_length(example: Example) -> int:
    return next(index for index, weight in enumerate(example.weights) if weight)


def _measure(config: RewardConfig) -> CurriculumConfig:
    return CurriculumConfig() if config.curriculum == "none" else config.curriculum


def _facts(
    config: RewardConfig, start: HybridForCausalLM, pairs: Sequence[Pair]
) -> list[PairFacts]:
    if config.curriculum == "none" or not config.curriculum.model_weight:
        return [pair_facts(pair) for pair in pairs]
    margins = policy_margins(start, pairs, config.sequence_tokens)
    return [pair_facts(pair, margin) for pair, margin in zip(pairs, margins, strict=True)]


@torch.no_grad()
def policy_margins(
    start: HybridForCausalLM, pairs: Sequence[Pair], batch_tokens: int
) -> list[float]:
    """Mean log-probability of chosen minus that of rejected under the starting policy, in nats."""
    margins: list[float] = []
    for some in _by_tokens(pairs, batch_tokens):
        batch = Batch.from_pairs(some).to(start.device)
        logprobs = start(packed=batch.packed, targets=batch.targets).logprobs
        sums = sequence_logprobs(logprobs, batch.weights, batch.packed.lengths)
        counts = [e.num_trained for pair in some for e in (pair.chosen, pair.rejected)]
        means = sums / sums.new_tensor(counts)
        margins.extend((means[0::2] - means[1::2]).tolist())
    return margins


def _check_heads(config: RewardConfig, pairs: Sequence[Pair], signals: Sequence[str]) -> None:
    labels = {pair.signal for pair in pairs}
    idle = [name for name in signals if name not in labels]
    if idle and OVERALL not in labels:
        raise ValueError(
            f"no training pair labels {', '.join(idle)}, which would stay random and add noise to "
            f"every score; labels are {', '.join(sorted(labels))}: set head: false or drop these "
            f"signals from hierarchy {config.hierarchy.name!r}"
        )


def _by_tokens(pairs: Sequence[Pair], batch_tokens: int) -> list[list[Pair]]:
    batches: list[list[Pair]] = []
    room = 0
    for pair in pairs:
        size = len(pair.chosen.tokens) + len(pair.rejected.tokens)
        if not batches or size > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(pair)
        room -= size
    return batches


def _steps(data: PackedData, drawn: Sequence[int]) -> list[list[int]]:
    return [
        [drawn[index] for sequence in data.step_items(step) for index in sequence]
        for step in range(data.num_steps)
    ]


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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
