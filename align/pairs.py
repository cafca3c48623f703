"""Labelled pairs under a reward model: what each label speaks about, by how much chosen leads.

A pair's label names a head, a dimension or the whole score; its *lead* is the value of the chosen
answer minus that of the rejected one there, in logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align.data.batch import Batch, Example, Pair
from align.losses.dpo import sequence_logprobs
from model import HybridForCausalLM
from model.packed import sent
from reward.curriculum import CurriculumConfig, PairFacts, difficulty
from reward.hierarchy import Hierarchy
from reward.model import RewardModel

BUCKETS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class PairAccuracy:
    """How often the chosen answer has the higher value, ties half.

    Args:
        leads: chosen minus rejected of each pair under its label, in pair order.
        accuracy: over all pairs.
        by_signal, by_difficulty: over the pairs of one label, or one of easy, medium, hard
            (thirds of the difficulty scale); groups without a pair are absent.
        num_pairs: pairs of each group, by the names above.
    """

    leads: tuple[float, ...]
    accuracy: float
    by_signal: Mapping[str, float]
    by_difficulty: Mapping[str, float]
    num_pairs: Mapping[str, int]


@torch.no_grad()
def pair_leads(
    model: RewardModel,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = 16384,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[float]:
    """Value of chosen minus value of rejected under each pair's own label, in logits.

    Args:
        precision: context of each forward pass, such as an autocast.

    Raises: ValueError if a pair is labelled with something that the tree does not hold.
    """
    check_labels(pairs, model.labels)
    was_training = model.training
    model.eval()
    leads: list[Tensor] = []
    for some in by_tokens([to_end_of_turn(pair) for pair in pairs], batch_tokens):
        packed = Batch.from_pairs(some).packed.to(model.values.weight.device)
        with precision():
            values = model(packed, prompt_lengths(some)).labelled
        leads.append(labelled_leads(values, some, model.labels))
    model.train(was_training)
    return torch.cat(leads).tolist() if leads else []


def labelled_leads(values: Tensor, pairs: Sequence[Pair], labels: Sequence[str]) -> Tensor:
    """[P]: chosen minus rejected, each under its own label.

    Args:
        values: [2P, L], sequences 2i and 2i + 1 are those of pair i.
    """
    columns = torch.tensor([[labels.index(pair.signal)] for pair in pairs])
    return (values[0::2] - values[1::2]).gather(1, sent(columns, values.device))[:, 0]


def pair_accuracy(
    model: RewardModel,
    pairs: Sequence[Pair],
    *,
    curriculum: CurriculumConfig | None = None,
    batch_tokens: int = 16384,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> PairAccuracy:
    """Accuracy of a reward model on labelled pairs, by label and by difficulty.

    Args:
        curriculum: how difficulty is measured; None takes the default weights.
        batch_tokens: tokens per forward pass; changes memory, not the result.
        precision: as in `pair_leads`.

    Raises: ValueError if there is no pair, or as `pair_leads`.
    """
    if not pairs:
        raise ValueError("pair_accuracy: no pairs, expected one or more; check the dev split")
    leads = pair_leads(model, pairs, batch_tokens=batch_tokens, precision=precision)
    wins = [won(lead) for lead in leads]
    signals: dict[str, list[float]] = {}
    buckets: dict[str, list[float]] = {}
    for pair, win in zip(pairs, wins, strict=True):
        signals.setdefault(pair.signal, []).append(win)
        buckets.setdefault(bucket(pair, model.hierarchy, curriculum), []).append(win)
    return PairAccuracy(
        leads=tuple(leads),
        accuracy=_mean(wins),
        by_signal={name: _mean(signals[name]) for name in sorted(signals)},
        by_difficulty={name: _mean(buckets[name]) for name in BUCKETS if name in buckets},
        num_pairs={name: len(group) for name, group in {**signals, **buckets}.items()},
    )


def won(lead: float) -> float:
    """1 if chosen leads, 0 if not, a half for a tie."""
    return 0.5 if lead == 0 else float(lead > 0)


def bucket(pair: Pair, tree: Hierarchy, curriculum: CurriculumConfig | None = None) -> str:
    """easy, medium or hard: the third of the difficulty scale that a pair lies in."""
    hard = difficulty(pair_facts(pair, tree), curriculum or CurriculumConfig())
    return BUCKETS[min(int(len(BUCKETS) * hard), len(BUCKETS) - 1)]


def pair_facts(pair: Pair, tree: Hierarchy, model_margin: float | None = None) -> PairFacts:
    """What the curriculum needs to know of a pair."""
    return PairFacts(
        place=pair.chosen.place,
        signal=pair.signal,
        row_difficulty=pair.difficulty,
        margin=pair.margin,
        chosen_tokens=pair.chosen.num_trained,
        rejected_tokens=pair.rejected.num_trained,
        model_margin=model_margin,
        phase=tree.phase(pair.signal),
        source=pair.source,
    )


def to_end_of_turn(pair: Pair) -> Pair:
    """The pair with whatever a template puts after the answers' end-of-turn token cut off.

    Values are read at the last token, and a policy's response ends at that one.
    """
    return replace(pair, chosen=_cut(pair.chosen), rejected=_cut(pair.rejected))


def prompt_lengths(pairs: Sequence[Pair]) -> list[int]:
    """Tokens before the first trained one, of chosen and rejected in turn."""
    return [_prompt_length(e) for pair in pairs for e in (pair.chosen, pair.rejected)]


def label_mask(pairs: Sequence[Pair], labels: Sequence[str]) -> Tensor:
    """[P, L] fp32, 1 in the column of each pair's label."""
    mask = torch.zeros(len(pairs), len(labels))
    for row, pair in enumerate(pairs):
        mask[row, labels.index(pair.signal)] = 1.0
    return mask


def check_labels(pairs: Sequence[Pair], labels: Sequence[str]) -> None:
    """Raises ValueError naming the first pair whose label the tree does not hold."""
    for pair in pairs:
        if pair.signal not in labels:
            raise ValueError(
                f"{pair.chosen.place}: signal = {pair.signal!r}, expected one of "
                f"{', '.join(labels)}; set the source's `signal` or add it to the hierarchy"
            )


@torch.no_grad()
def policy_margins(
    start: HybridForCausalLM, pairs: Sequence[Pair], batch_tokens: int
) -> list[float]:
    """Mean log-probability of chosen minus that of rejected under the starting policy, in nats."""
    margins: list[float] = []
    for some in by_tokens(pairs, batch_tokens):
        batch = Batch.from_pairs(some).to(start.device)
        logprobs = start(packed=batch.packed, targets=batch.targets).logprobs
        sums = sequence_logprobs(logprobs, batch.weights, batch.packed.lengths)
        counts = [e.num_trained for pair in some for e in (pair.chosen, pair.rejected)]
        means = sums / sums.new_tensor(counts)
        margins.extend((means[0::2] - means[1::2]).tolist())
    return margins


def by_tokens(pairs: Sequence[Pair], batch_tokens: int) -> list[list[Pair]]:
    """The pairs in order, in groups of at most so many tokens; a longer pair stands alone."""
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


def _cut(example: Example) -> Example:
    end = max(index for index, weight in enumerate(example.weights) if weight) + 1
    return replace(example, tokens=example.tokens[:end], weights=example.weights[:end])


def _prompt_length(example: Example) -> int:
    return next(index for index, weight in enumerate(example.weights) if weight)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
