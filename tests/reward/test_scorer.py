"""InProcessScorer end to end with a tiny model: rules, heads, limits, and independence."""

from __future__ import annotations

import random

import pytest
import torch

from model import Packed
from model.kernels.cpu import passes
from reward.hierarchy import HIERARCHY
from reward.model import RewardModel
from reward.scorer import InProcessScorer, load_scorer
from reward.types import Item, Scorer, Verdict
from tests.reward.test_model import LEARNED, tiny

PROMPT = ({"role": "user", "content": "2+3?"},)


def item(response: str, **changes) -> Item:
    return Item(PROMPT, response, **changes)


def encode(what: Item) -> tuple[int, ...]:
    """A tokenizer of one letter a token; 31 ends the turn."""
    return (*encode_prompt(what), *(ord(letter) % 30 for letter in what.response), 31)


def encode_prompt(what: Item) -> tuple[int, ...]:
    return tuple(ord(letter) % 30 for message in what.messages for letter in message["content"])


def scorer(model: RewardModel | None = None, **changes) -> InProcessScorer:
    model = model or tiny()
    return InProcessScorer(model.hierarchy, model, encode, encode_prompt=encode_prompt, **changes)


def test_rules_alone_need_no_model():
    judge: Scorer = InProcessScorer()
    right, wrong, nothing = judge.score(
        [item("5", answer="5", verifier="math"), item("6", answer="5", verifier="math"), item("6")]
    )
    assert (right.value, wrong.value) == (1.0, 0.0)
    assert (nothing.valid, nothing.reason) == (False, "no signal has a verdict")
    assert judge.version == right.version == HIERARCHY.version


def test_heads_and_rules_meet_in_the_tree():
    model = tiny()
    judge = scorer(model)
    right, free = judge.score([item("5", answer="5", verifier="math"), item("5")])
    assert set(free.signals) == {f"head:{name}" for name in HIERARCHY.heads}
    assert set(right.signals) == {*free.signals, "rule:math"}
    assert right.dimensions["correctness"] == 1.0
    assert 0 < free.dimensions["correctness"] < 1
    assert right.version == judge.version == model.version


@pytest.mark.parametrize("hierarchy", [HIERARCHY, LEARNED])
def test_a_score_is_the_tree_of_the_models_own_forward(hierarchy):
    model, items = tiny(hierarchy), [item(text) for text in ("5", "no", "no, 7")]
    packed = Packed.from_sequences([encode(each) for each in items])
    with torch.no_grad():
        out = model(packed, [len(encode_prompt(each)) for each in items])
    gates = [None] * 3 if out.gate is None else out.gate.tolist()
    found = scorer(model).score(items)
    for score, values, gate in zip(found, out.values.tolist(), gates, strict=True):
        heads = {f"head:{name}": value for name, value in zip(model.signals, values, strict=True)}
        assert {name: each.value for name, each in score.signals.items()} == pytest.approx(heads)
        shares = gate and dict(zip(hierarchy.dimensions, gate, strict=True))
        tree = hierarchy.score({name: Verdict(value) for name, value in heads.items()}, shares)
        assert score.value == pytest.approx(tree.value)
    assert len({score.value for score in found}) == 3


def test_a_score_does_not_depend_on_batching():
    items = [item("5" * length) for length in (1, 7, 3, 12, 2)]
    whole = scorer().score(items)
    for size in (1, 12, 30):
        for one, other in zip(whole, scorer(batch_tokens=size).score(items), strict=True):
            assert one.value == pytest.approx(other.value, abs=1e-6)
    assert scorer().score([]) == []


@pytest.mark.skipif(passes.library() is None, reason="model/kernels/cpu was not built")
@pytest.mark.parametrize("hierarchy", [HIERARCHY, LEARNED])
def test_on_a_cpu_no_bit_of_a_score_depends_on_its_company(hierarchy):
    judge = scorer(tiny(hierarchy))
    lengths = random.Random(0).choices(range(1, 300), k=40)
    items = [item("".join(map(chr, range(65, 65 + n)))) for n in lengths]
    whole = judge.score(items)
    for size in (1, 3, 16):
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        assert [score for part in parts for score in judge.score(part)] == whole
    assert judge.score(items[::-1])[::-1] == whole


def test_equal_conversations_are_read_once_and_score_the_same(monkeypatch):
    judge = scorer(batch_tokens=30)
    read, inner = [], judge.read_heads
    monkeypatch.setattr(judge, "read_heads", lambda batch: read.extend(batch) or inner(batch))
    items = [item(text) for text in ("55", "7", "55", "555555", "7", "55")]
    scores = judge.score(items)
    assert [len(one.tokens) for one in read] == [7, 6, 11]
    assert scores[0] == scores[2] == scores[5]
    assert scores[1] == scores[4]
    alone = [scorer().score([one])[0].value for one in items]
    assert [score.value for score in scores] == pytest.approx(alone, abs=1e-6)


def test_a_conversation_longer_than_the_limit_is_not_scored():
    short, long = scorer(max_tokens=10).score([item("5"), item("5" * 20)])
    assert short.valid
    assert (long.valid, long.reason) == (False, "25 tokens, longer than the limit of 10")
    by_model = scorer()
    by_model._model.trunk.config.max_position_embeddings = 10
    assert not scorer(by_model._model).score([item("5" * 20)])[0].valid


def test_a_failed_rule_leaves_the_item_without_a_score():
    score = scorer().score([item("5", answer=r"\text{}", verifier="math")])[0]
    assert (score.valid, score.reason) == (
        False,
        r"math: cannot read the reference answer '\\text{}'",
    )


def test_a_learned_gate_needs_a_prompt_to_read():
    with pytest.raises(ValueError, match="prompt of 0 tokens in a conversation of 2, expected"):
        scorer().score([Item(({"role": "user", "content": ""},), "5")])


def test_an_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="'maths', expected one of"):
        scorer().score([item("5", verifier="maths")])


def test_a_saved_model_scores_the_same(tmp_path):
    model = tiny()
    model.save(tmp_path)
    items = [item("5", answer="5", verifier="math"), item("a tea")]
    loaded = load_scorer(tmp_path, encode, encode_prompt=encode_prompt)
    assert loaded.score(items) == scorer(model).score(items)


def test_what_is_missing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="a reward model needs `encode`"):
        InProcessScorer(LEARNED, tiny())
    with pytest.raises(ValueError, match="gate = learned needs `encode_prompt`"):
        InProcessScorer(LEARNED, tiny(), encode)
    with pytest.raises(
        ValueError, match=r"is not the reward model's .* pass reward_model.hierarchy"
    ):
        InProcessScorer(HIERARCHY, tiny(LEARNED), encode, encode_prompt=encode_prompt)
    with pytest.raises(ValueError, match=r"no reward\.json"):
        load_scorer(tmp_path, encode)
