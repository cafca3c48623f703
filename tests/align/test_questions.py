"""A reward model questioned: what is planted in it is what the answers say."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from align.data.batch import Example, Pair
from align.pairs import pair_accuracy, pair_leads
from align.questions import (
    ask,
    calibrate,
    read_calibration,
    write_questions,
)
from reward.hierarchy import Hierarchy
from reward.model import RewardModel
from reward.types import Item
from stages.question import question_tables, read_questions
from tests.align import small
from tests.stages.fakes import align

TREE = Hierarchy.model_validate(
    {
        "dimensions": {
            "correctness": {"signals": {"correctness": {"verifiers": ["exact"]}}},
            "helpfulness": {"signals": {"style": {}}},
        }
    }
)


def model(scale: float = 1.0) -> RewardModel:
    found = RewardModel(small.model().model, TREE)
    with torch.no_grad():
        found.values.weight.mul_(scale)
    return found


def pairs(count: int, *, longer: bool = False) -> list[Pair]:
    """Random answers: right by chance; `longer` makes every chosen answer the longer one."""
    rng = random.Random(3)
    found = []
    for index in range(count):
        prompt = tuple(rng.randrange(10, 260) for _ in range(4))
        sizes = sorted((rng.randrange(2, 9), rng.randrange(10, 16)), reverse=longer)
        sides = []
        for size in sizes:
            tokens = (*prompt, *(rng.randrange(10, 260) for _ in range(size)), 2)
            weights = tuple(float(i >= 4) for i in range(len(tokens)))
            sides.append(Example(tokens, weights, f"rows.jsonl:{index}"))
        signal = ("correctness", "style", "helpfulness", "overall")[index % 4]
        found.append(Pair(*sides, signal=signal, source="one" if index % 2 else "two"))
    return found


def test_calibration_makes_the_heads_chances_and_keeps_their_order():
    some, judge = pairs(120), model(scale=40.0)
    labelled = [pair for pair in some if pair.signal in judge.signals]
    before = pair_leads(judge, labelled)
    fitted = calibrate(judge, some)
    assert fitted is not None
    after = pair_leads(judge, labelled)
    for pair, lead, now in zip(labelled, before, after, strict=True):
        assert now == pytest.approx(lead / fitted.temperatures[pair.signal], rel=1e-4, abs=1e-5)
    # Labels are luck here: what was sure of itself no longer is.
    assert fitted.ece_as_trained > 0.2
    assert all(temperature > 5 for temperature in fitted.temperatures.values())
    assert calibrate(judge, some[:19]) is None


def test_the_answers_cover_every_pair_once_in_every_slicing(tmp_path):
    some, judge = pairs(80), model()
    fitted = calibrate(judge, some)
    assert fitted is not None
    found = ask(judge, some, small.tokenizer())
    for slices in (found.by_label, found.by_difficulty, found.by_length, found.by_source):
        assert sum(one.num_pairs for one in slices.values()) == 80
    accuracy = pair_accuracy(judge, some)
    assert found.all.accuracy == pytest.approx(accuracy.accuracy, abs=0.02)
    # A packed sequence does not know where it stands.
    assert found.position < 1e-4
    write_questions(tmp_path, found, fitted)
    assert read_calibration(tmp_path) == fitted
    told = read_questions(tmp_path)
    assert [table.row_count for table in question_tables(told)] == [
        1 + sum(map(len, (found.by_label, found.by_difficulty, found.by_length, found.by_source))),
        4 + len(found.style) + len(found.rules),
    ]
    shown = align("question", str(tmp_path))
    assert "label: overall" in shown.stdout
    assert json.loads(align("question", str(tmp_path), "--json").stdout) == told


class CountsTokens(RewardModel):
    """Likes length alone."""

    def forward(self, packed, prompt_lengths=None):
        out = super().forward(packed, prompt_lengths)
        lengths = torch.tensor([[float(n)] for n in packed.lengths])
        return replace(out, labelled=lengths.expand_as(out.labelled))


def test_a_love_of_length_is_seen():
    judge = CountsTokens(small.model().model, TREE)
    found = ask(judge, pairs(40), small.tokenizer())
    assert (found.length.longer_chosen, found.length.longer_ahead) == (0.0, 1.0)
    assert found.length.correlation > 0.5
    # Every empty phrase makes the answer longer, so better.
    assert all(style.shift > 0 for style in found.style.values())
    right = ask(judge, pairs(40, longer=True), small.tokenizer())
    assert (right.length.longer_chosen, right.length.longer_ahead) == (1.0, 1.0)
    assert right.all.accuracy == 1.0


def test_agreement_with_a_rule_is_counted_where_it_tells_the_answers_apart():
    prompt = ({"role": "user", "content": "2+2?"},)
    right, wrong = (Item(prompt, text, answer="4", verifier="exact") for text in ("4", "5"))
    some = pairs(40, longer=True)
    ruled = [
        replace(pair, rules=((right, wrong), (wrong, right), (right, right))[index % 3])
        for index, pair in enumerate(some[:30])
    ]
    judge = CountsTokens(small.model().model, TREE)
    found = ask(judge, [*ruled, *some[30:]], small.tokenizer())
    # The longer answer is always ahead: right for a third of the pairs, wrong for another.
    assert found.rules == {"exact": (0.5, 20)}


def test_too_few_pairs_and_no_answers_are_errors(tmp_path):
    with pytest.raises(ValueError, match="19 held-out pairs, expected 20 or more"):
        ask(model(), pairs(19), small.tokenizer())
    with pytest.raises(ValueError, match=r"no questions\.json; expected the artifact of a reward"):
        read_questions(tmp_path)
    assert read_calibration(tmp_path) is None
