"""What a reward model is asked before it is trusted, on pairs that it was not trained on.

How often is it right, and is it as sure as it is right: by label, difficulty, length and source.
Does it prefer the longer answer because it is longer, is its value moved by where a sequence stands
in a batch or by a phrase that says nothing, and does it agree with rules where a rule decides.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.batch import Batch, Example, Pair
from align.pairs import (
    bucket,
    by_tokens,
    check_labels,
    labelled_leads,
    pair_leads,
    prompt_lengths,
    to_end_of_turn,
    won,
)
from reward.calibration import (
    CALIBRATION_FILE,
    Calibration,
    Method,
    Reliability,
    by_slice,
    cross_fitted,
    fit,
    reliability,
)
from reward.curriculum import CurriculumConfig
from reward.hierarchy import sigmoid
from reward.model import RewardModel
from reward.sandbox import Sandbox
from reward.verifiers import verify_all

QUESTIONS_FILE = "questions.json"
# Pairs from which a label has a temperature of its own, and from which anything is fitted.
MIN_PAIRS = 20
# Most pairs that are read again with something changed.
MAX_PROBED = 150
LENGTHS = (32, 128, 512, 2048)
# What says nothing about the answer: text before and after it.
EMPTY_PHRASES = {"opening": ("Certainly! ", ""), "bold": ("**", "**"), "closing": ("", " Enjoy!")}

Precision = Callable[[], AbstractContextManager[object]]


class HeadCalibration(BaseModel):
    """What stands in `calibration.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    """1; another number was written by another release."""
    overall: Calibration
    """Of the gate-weighted total, for the probability of an answer."""
    temperatures: dict[str, float]
    """By head; each head's weights were divided by it, so its sigmoid is a chance."""
    ece_as_trained: float
    """Expected calibration error of the sigmoid of the leads before any of this."""


@dataclass(frozen=True)
class LengthProbe:
    """Does it prefer what is longer?

    Args:
        longer_chosen: share of pairs of unequal length whose longer answer people chose.
        longer_ahead: share whose longer answer the model puts ahead; the gap to the first is bias.
        correlation: of the longer answer's lead with the log of the ratio of lengths, -1 to 1.
    """

    longer_chosen: float
    longer_ahead: float
    correlation: float


@dataclass(frozen=True)
class StyleProbe:
    """What an empty phrase around the rejected answer does.

    Args:
        shift: mean change of its value, in standard deviations of leads.
        flips: share of the pairs ranked right that it turns around.
    """

    shift: float
    flips: float


@dataclass(frozen=True)
class Questions:
    """Every answer; reliabilities are of chances fitted without the pairs they judge.

    Args:
        position: largest change of a lead when the two answers change places in the batch, logits.
        rules: by verifier, the share of pairs that it tells apart in which the label's value
            agrees, and their number.
    """

    all: Reliability
    by_label: Mapping[str, Reliability]
    by_difficulty: Mapping[str, Reliability]
    by_length: Mapping[str, Reliability]
    by_source: Mapping[str, Reliability]
    length: LengthProbe
    position: float
    style: Mapping[str, StyleProbe]
    rules: Mapping[str, tuple[float, int]]


def calibrate(
    model: RewardModel,
    pairs: Sequence[Pair],
    *,
    method: Method = "temperature",
    precision: Precision = nullcontext,
) -> HeadCalibration | None:
    """Divides each head's weights by its temperature, and fits the chance of the total.

    A head whose label has fewer than 20 pairs takes the temperature of all of them.

    Returns: None, and the model as it was, for fewer than 20 pairs.

    Raises: ValueError if a pair's label is none of the tree's.
    """
    if len(pairs) < MIN_PAIRS:
        return None
    leads = pair_leads(model, pairs, precision=precision)
    grouped: dict[str, list[float]] = {}
    for pair, lead in zip(pairs, leads, strict=True):
        grouped.setdefault(pair.signal, []).append(lead)
    # Of labels that are no head's too: the scale of the total is that of its heads.
    common = fit(leads).temperature
    temperatures = {
        name: fit(grouped[name]).temperature if len(grouped.get(name, [])) >= MIN_PAIRS else common
        for name in model.signals
    }
    with torch.no_grad():
        divisors = model.values.weight.new_tensor([temperatures[n] for n in model.signals])
        model.values.weight.div_(divisors[:, None])
    totals = _overall_leads(model, pairs, precision)
    return HeadCalibration(
        overall=fit(totals, method),
        temperatures=temperatures,
        ece_as_trained=reliability([sigmoid(lead) for lead in leads]).ece,
    )


def ask(
    model: RewardModel,
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: Method = "temperature",
    curriculum: CurriculumConfig | None = None,
    precision: Precision = nullcontext,
    sandbox: Sandbox | None = None,
) -> Questions:
    """All questions to a reward model.

    Args:
        curriculum: how difficulty is measured; None takes the default weights.
        sandbox: where a pair's programs run, if a rule needs it.

    Raises: ValueError for fewer than 20 pairs, or a label that is none of the tree's.
    """
    if len(pairs) < MIN_PAIRS:
        raise ValueError(f"{len(pairs)} held-out pairs, expected {MIN_PAIRS} or more to ask")
    check_labels(pairs, model.labels)
    ended = [to_end_of_turn(pair) for pair in pairs]
    leads = pair_leads(model, ended, precision=precision)
    chances = _chances(ended, leads, method)
    slices = partial(by_slice, chances)
    stride = -(-len(ended) // MAX_PROBED)
    probed, known = ended[::stride], leads[::stride]
    return Questions(
        all=reliability(chances),
        by_label=slices([pair.signal for pair in ended]),
        by_difficulty=slices([bucket(pair, model.hierarchy, curriculum) for pair in ended]),
        by_length=slices([_length_name(pair) for pair in ended], _length_place),
        by_source=slices([pair.source or "unnamed" for pair in ended]),
        length=_length(ended, leads),
        position=_position(model, probed, known, precision),
        style=_style(model, probed, known, tokenizer=tokenizer, precision=precision),
        rules=_rules(ended, leads, sandbox),
    )


def write_questions(folder: Path, found: Questions, calibration: HeadCalibration) -> None:
    """Both files of an artifact."""
    (folder / QUESTIONS_FILE).write_text(json.dumps(asdict(found), indent=1) + "\n")
    (folder / CALIBRATION_FILE).write_text(calibration.model_dump_json(indent=1) + "\n")


def read_calibration(folder: Path) -> HeadCalibration | None:
    """What the artifact holds; None if its reward stage had too few held-out pairs, or was told not
    to calibrate.

    Raises: ValueError if the file is not as this release writes it.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return None
    try:
        told = HeadCalibration.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot read it; train the reward stage anew") from error
    if told.format != 1:
        raise ValueError(f"{path}: format {told.format}, expected 1; use the release that wrote it")
    return told


def _chances(pairs: Sequence[Pair], leads: Sequence[float], method: Method) -> list[float]:
    """Cross-fitted by label where a label has pairs enough, else with all."""
    pooled = cross_fitted(leads, method)
    places: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.signal, []).append(place)
    for members in places.values():
        if len(members) >= MIN_PAIRS:
            own = cross_fitted([leads[i] for i in members], method)
            for place, chance in zip(members, own, strict=True):
                pooled[place] = chance
    return pooled


@torch.no_grad()
def _overall_leads(model: RewardModel, pairs: Sequence[Pair], precision: Precision) -> list[float]:
    as_whole = [replace(pair, signal=model.labels[-1]) for pair in pairs]
    return pair_leads(model, as_whole, precision=precision)


def _longest(pair: Pair) -> int:
    return max(pair.chosen.num_trained, pair.rejected.num_trained)


def _length_name(pair: Pair) -> str:
    size = _longest(pair)
    most = next((limit for limit in LENGTHS if size <= limit), 0)
    return f"to {most} tokens" if most else f"over {LENGTHS[-1]} tokens"


def _length_place(name: str) -> str:
    word, number, _ = name.split()
    return f"{int(number) + (word == 'over'):09d}"


def _length(pairs: Sequence[Pair], leads: Sequence[float]) -> LengthProbe:
    known = [
        (math.log(pair.chosen.num_trained / pair.rejected.num_trained), lead)
        for pair, lead in zip(pairs, leads, strict=True)
        if pair.chosen.num_trained != pair.rejected.num_trained
    ]
    if not known:
        return LengthProbe(0.5, 0.5, 0.0)
    # Seen from the longer answer, whichever was chosen.
    ratios = [abs(ratio) for ratio, _ in known]
    ahead = [lead if ratio > 0 else -lead for ratio, lead in known]
    return LengthProbe(
        longer_chosen=sum(ratio > 0 for ratio, _ in known) / len(known),
        longer_ahead=sum(won(lead) for lead in ahead) / len(known),
        correlation=_correlation(ratios, ahead),
    )


def _correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    x, y = torch.tensor(xs, dtype=torch.float64), torch.tensor(ys, dtype=torch.float64)
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else 0.0


@torch.no_grad()
def _position(
    model: RewardModel, pairs: Sequence[Pair], leads: Sequence[float], precision: Precision
) -> float:
    """The answers in the other order, and the pairs from last to first."""
    found: list[Tensor] = []
    for some in by_tokens(pairs[::-1], 16384):
        swapped = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in some]
        packed = Batch.from_pairs(swapped).packed.to(model.values.weight.device)
        with precision():
            values = model(packed, prompt_lengths(swapped)).labelled
        found.append(-labelled_leads(values, swapped, model.labels))
    again = torch.cat(found).tolist()[::-1]
    return max(abs(lead - other) for lead, other in zip(leads, again, strict=True))


def _style(
    model: RewardModel,
    pairs: Sequence[Pair],
    leads: Sequence[float],
    *,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
) -> dict[str, StyleProbe]:
    spread = float(torch.tensor(leads, dtype=torch.float64).std()) or 1.0
    found: dict[str, StyleProbe] = {}
    for name, phrases in EMPTY_PHRASES.items():
        before, after = (
            tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in phrases
        )
        dressed = [replace(p, rejected=_dressed(p.rejected, before, after)) for p in pairs]
        again = pair_leads(model, dressed, precision=precision)
        shifts = [lead - other for lead, other in zip(leads, again, strict=True)]
        right = [other for lead, other in zip(leads, again, strict=True) if lead > 0]
        found[name] = StyleProbe(
            shift=sum(shifts) / len(shifts) / spread,
            flips=sum(other < 0 for other in right) / max(len(right), 1),
        )
    return found


def _dressed(example: Example, before: tuple[int, ...], after: tuple[int, ...]) -> Example:
    """With these tokens around the last answer, inside its turn."""
    end = len(example.tokens) - 1
    start = max((i + 1 for i in range(end) if not example.weights[i]), default=1)
    tokens = (*example.tokens[:start], *before, *example.tokens[start:end], *after)
    weights = (*example.weights[:start], *(1.0,) * (len(tokens) + 1 - start))
    return replace(example, tokens=(*tokens, example.tokens[end]), weights=weights)


def _rules(
    pairs: Sequence[Pair], leads: Sequence[float], sandbox: Sandbox | None
) -> dict[str, tuple[float, int]]:
    ruled = [(p.rules, lead) for p, lead in zip(pairs, leads, strict=True) if p.rules is not None]
    verdicts = verify_all([item for items, _ in ruled for item in items], sandbox) if ruled else []
    agree: dict[str, list[float]] = {}
    for number, (items, lead) in enumerate(ruled):
        good, bad = verdicts[2 * number], verdicts[2 * number + 1]
        if good.valid and bad.valid and good.value != bad.value:
            ahead = lead if good.value > bad.value else -lead
            agree.setdefault(items[0].verifier, []).append(won(ahead))
    return {name: (sum(some) / len(some), len(some)) for name, some in sorted(agree.items())}
