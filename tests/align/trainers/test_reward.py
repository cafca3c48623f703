"""Kind `reward`: labels reach their head, accuracy rises, the artifact judges."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel, AutoTokenizer

from align.data.batch import Batch, Example, Pair
from align.data.loader import PackedData
from align.data.render import render_item, render_prompt
from align.data.sources import DataConfig
from align.data.supply import supply_pairs
from align.losses.dpo import sequence_logprobs
from align.optim import OptimConfig
from align.pairs import (
    pair_accuracy,
    pair_leads,
    policy_margins,
    prompt_lengths,
    to_end_of_turn,
)
from align.questions import QUESTIONS_FILE, read_calibration
from align.trainers.reward import REPORT_FILE, RewardConfig, RewardCourse, held_out, run
from model import HybridForCausalLM
from reward.curriculum import CurriculumConfig
from reward.hierarchy import Hierarchy
from reward.model import RewardModel
from reward.scorer import load_scorer
from reward.types import Item
from tests.align import small
from tests.helpers import assert_close, slow

TREE = {
    "dimensions": {
        "correctness": {"signals": {"correctness": {"verifiers": ["exact"]}}},
        "helpfulness": {"signals": {"style": {}}},
    }
}
COLUMNS = ("correctness", "style", "overall")
LABELS = ("correctness", "style", "helpfulness", "overall")
# Signal -> word of the chosen and of the rejected answer.
WORDS = {
    "correctness": ("cat", "hat"),
    "style": ("mat", "rat"),
    "helpfulness": ("mat", "rat"),
    "overall": ("cat mat", "hat rat"),
    "safety": ("mat", "rat"),
}


def write_pairs(path: Path, count: int, signals: tuple[str, ...] = COLUMNS) -> Path:
    rng = random.Random(0)
    lines = []
    for index in range(count):
        signal = signals[index % len(signals)]
        good, bad = WORDS[signal]
        filler = " ".join(rng.choice(["the", "on", "and"]) for _ in range(rng.randrange(1, 4)))
        row = {
            "prompt": [{"role": "user", "content": f"{filler} {index}"}],
            "chosen": [{"role": "assistant", "content": f"{filler} {good}"}],
            "rejected": [{"role": "assistant", "content": f"{bad} {filler}"}],
            "signal": signal,
        }
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    return path


def config(**changes: Any) -> RewardConfig:
    given: dict[str, Any] = {
        "data": [{"path": "pairs.jsonl", "dev_share": 0.3}],
        "hierarchy": TREE,
        "sequence_tokens": 64,
        "batch_items": 8,
        "optim": {"lr": 3e-3, "schedule": "constant"},
    }
    return RewardConfig.model_validate(given | changes)


def reward_model(seed: int = 0, gate: str = "declared", **changes: Any) -> RewardModel:
    tree = Hierarchy.model_validate({**TREE, "gate": gate})
    return RewardModel(small.model(seed, **changes).model, tree, seed=seed)


def labelled(count: int) -> list[Pair]:
    rows = small.pairs(count)
    return [
        replace(pair, signal=COLUMNS[index % 3], difficulty=index / count)
        for index, pair in enumerate(rows)
    ]


def course(pairs: list[Pair], tmp_path: Path, **changes: Any) -> RewardCourse:
    data = PackedData(pairs, sequence_tokens=64, shuffle=False)
    accelerator = small.job(tmp_path).accelerator
    return RewardCourse(data, accelerator, labels=LABELS, config=config(**changes))


def test_a_label_trains_its_own_head_and_no_other(tmp_path):
    pairs = [replace(pair, signal="style") for pair in labelled(3)]
    model = reward_model(gate="learned")
    loss = course(pairs, tmp_path).loss(model, Batch.from_pairs(pairs))
    loss.sum.backward()
    grad = model.values.weight.grad
    assert grad[1].abs().sum() > 0
    assert grad[0].abs().sum() == 0
    # In the graph with weight 0: data parallelism waits for every parameter's gradient.
    assert model.gate.weight.grad.abs().sum() == 0
    assert set(loss.metrics) >= {"accuracy", "accuracy/style", "accuracy/overall"}


def test_an_overall_label_trains_all_heads_where_the_gate_is_declared(tmp_path):
    pairs = [replace(pair, signal="overall") for pair in labelled(3)]
    model = reward_model()
    course(pairs, tmp_path).loss(model, Batch.from_pairs(pairs)).sum.backward()
    assert (model.values.weight.grad.abs().sum(1) > 0).all()


def test_an_overall_label_trains_a_learned_gate_and_no_head(tmp_path):
    pairs = [replace(pair, signal="overall") for pair in labelled(3)]
    model = reward_model(gate="learned")
    torch.nn.init.normal_(model.gate.weight)
    course(pairs, tmp_path).loss(model, Batch.from_pairs(pairs)).sum.backward()
    assert model.values.weight.grad.abs().sum() == 0
    # One prompt, one gate: it learns which dimension tells the answers apart.
    assert model.gate.weight.grad.abs().sum() > 0


def test_the_gate_moves_to_the_dimension_that_leads(tmp_path):
    pairs = [replace(pair, signal="overall") for pair in labelled(1)]
    model, batch = reward_model(gate="learned"), Batch.from_pairs(pairs)
    out = model(batch.packed, prompt_lengths(batch.pairs))
    leads = (out.values[0] - out.values[1]).tolist()
    course(pairs, tmp_path).loss(model, batch).sum.backward()
    # A step against the gradient: up for what leads by more than the mean of both, else down.
    moved = (-model.gate.bias.grad).tolist()
    assert (moved[0] > moved[1]) == (leads[0] > leads[1])
    assert sum(moved) == pytest.approx(0, abs=1e-6)


def test_the_gradient_does_not_depend_on_the_micro_batches(tmp_path):
    pairs, grads = labelled(6), []
    for size in (6, 2, 1):
        model = reward_model()
        whole = course(pairs, tmp_path, margin_scale=1.0)
        for start in range(0, 6, size):
            batch = Batch.from_pairs(pairs[start : start + size])
            (whole.loss(model, batch).sum / 6).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for grad in grads[1:]:
        assert_close("gradient", grad, grads[0], tolerance=1e-6)


def test_margin_scale_asks_for_a_lead(tmp_path):
    pairs = [replace(pair, margin=2.0) for pair in labelled(3)]
    batch, model = Batch.from_pairs(pairs), reward_model()
    plain = course(pairs, tmp_path).loss(model, batch).sum
    assert course(pairs, tmp_path, margin_scale=1.0).loss(model, batch).sum > plain


def test_pair_accuracy_reports_by_signal_and_difficulty_and_ignores_batching():
    model, pairs = reward_model(), labelled(9)
    report = pair_accuracy(model, pairs)
    one_by_one = pair_leads(model, pairs, batch_tokens=1)
    assert report.leads == pytest.approx(one_by_one, abs=1e-6)
    wins = [lead > 0 for lead in report.leads]
    assert report.accuracy == pytest.approx(sum(wins) / 9)
    assert report.by_signal["style"] == pytest.approx(sum(wins[1::3]) / 3)
    assert sum(report.num_pairs[name] for name in COLUMNS) == 9
    assert sum(report.num_pairs[name] for name in report.by_difficulty) == 9
    torch.nn.init.zeros_(model.values.weight)
    assert pair_accuracy(model, pairs).accuracy == 0.5


def test_values_are_read_at_the_end_of_the_turn():
    def example(*tokens: int) -> Example:
        weights = tuple(float(1 < place < 4) for place in range(len(tokens)))
        return Example(tokens, weights, "a:1")

    pair = Pair(example(11, 12, 13, 2, 198), example(11, 12, 14, 2))
    cut = to_end_of_turn(pair)
    assert cut.chosen.tokens == (11, 12, 13, 2)
    assert cut.rejected == pair.rejected
    model = reward_model()
    cut = replace(cut, signal="style")
    assert pair_leads(model, [replace(pair, signal="style")]) == pair_leads(model, [cut])


def test_refreshes_without_batch_items_are_refused():
    curriculum = CurriculumConfig(refreshes=1, model_weight=1.0)
    with pytest.raises(ValidationError, match="refreshes = 1 with batch_items = 0"):
        config(curriculum=curriculum, batch_items=0)


@pytest.mark.parametrize("lora", [None, *slow({"rank": 4})])
def test_a_run_raises_held_out_accuracy_and_leaves_a_judge(tmp_path, lora):
    write_pairs(tmp_path / "pairs.jsonl", 120)
    start = small.start(tmp_path / "start")
    job = small.job(tmp_path, start)
    optim = OptimConfig(lr=1e-2 if lora else 3e-3, schedule="constant")
    outcome = run(config(lora=lora, epochs=4, optim=optim), job)

    assert outcome.metrics["after/accuracy"] >= 0.9
    assert outcome.metrics["after/accuracy"] > outcome.metrics["before/accuracy"]
    assert {f"after/accuracy/{name}" for name in COLUMNS} <= set(outcome.metrics)
    assert outcome.data[0]["rows"] + outcome.data[0]["held_out"] == 120

    model = RewardModel.load(job.artifact)
    tokenizer = AutoTokenizer.from_pretrained(job.artifact)
    assert type(AutoModel.from_pretrained(job.artifact)).__name__ == "HybridModel"
    dev = held_out(config(), job, tokenizer)
    report = json.loads((job.artifact / REPORT_FILE).read_text())
    assert pair_accuracy(model, dev).accuracy == report["after"]["accuracy"]
    assert report["after"]["num_pairs"]["style"] == sum(pair.signal == "style" for pair in dev)

    lines = (job.artifact / "curriculum.jsonl").read_text().splitlines()
    places = Counter(json.loads(line)["place"] for line in lines)
    assert set(places.values()) == {4}
    assert not {pair.chosen.place for pair in dev} & set(places)

    judge = load_scorer(
        job.artifact,
        lambda item: render_item(item, tokenizer),
        encode_prompt=lambda item: render_prompt(item.messages, tokenizer),
    )
    prompt = ({"role": "user", "content": "the on 999"},)
    good, bad = judge.score([Item(prompt, "the cat mat"), Item(prompt, "hat rat the")])
    assert good.value > bad.value


def test_a_run_is_repeatable_and_none_is_another_order(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 40)
    start = small.start(tmp_path / "start")

    def trained(name: str, **changes: Any) -> tuple[RewardModel, list[str]]:
        job = small.job(tmp_path / name, start, base=tmp_path)
        run(config(**changes), job)
        lines = (job.artifact / "curriculum.jsonl").read_text().splitlines()
        return RewardModel.load(job.artifact), lines

    (one, seen), (two, again), (none, other) = (
        trained("one"),
        trained("two"),
        trained("none", curriculum="none"),
    )
    assert one.version == two.version
    assert seen == again
    assert none.version != one.version
    assert seen != other
    assert len(seen) == len(other)


def test_a_refreshed_run_asks_the_reward_model_and_records_what_it_said(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 60, ("correctness", "style", "helpfulness"))
    curriculum = {"pacing": "competence", "model_weight": 1.0, "refreshes": 2}
    job = small.job(tmp_path, small.start(tmp_path / "start"))
    run(config(curriculum=curriculum, epochs=2, log_every_steps=1), job)
    told = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    asked = [line["step"] for line in told if "refresh_tokens" in line]
    assert len(asked) == 2
    lines = [
        json.loads(one) for one in (job.artifact / "curriculum.jsonl").read_text().splitlines()
    ]
    # The finished model has learned them: later leads are wider than those that were trained.
    assert sum(line["later"] for line in lines) > sum(line["margin"] for line in lines) + len(lines)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    phases = [line["signal"] == "helpfulness" for line in lines]
    assert not any(phases[:8])


def test_a_dimensions_label_trains_its_heads_and_no_other(tmp_path):
    pairs = [replace(pair, signal="helpfulness") for pair in labelled(3)]
    model = reward_model()
    course(pairs, tmp_path).loss(model, Batch.from_pairs(pairs)).sum.backward()
    grad = model.values.weight.grad
    assert grad[0].abs().sum() == 0
    assert grad[1].abs().sum() > 0


def test_the_starting_policys_margins_are_mean_logprob_differences():
    policy, pairs = small.model().requires_grad_(False), labelled(4)
    expected = []
    for pair in pairs:
        batch = Batch.from_pairs([pair])
        logprobs = policy(packed=batch.packed, targets=batch.targets).logprobs
        chosen, rejected = sequence_logprobs(logprobs, batch.weights, batch.packed.lengths)
        expected.append(
            float(chosen / pair.chosen.num_trained - rejected / pair.rejected.num_trained)
        )
    assert policy_margins(policy, pairs, 64) == pytest.approx(expected, abs=1e-6)


def test_a_model_weight_asks_the_starting_policy(tmp_path, monkeypatch):
    write_pairs(tmp_path / "pairs.jsonl", 20)
    asked = []

    def margins(start: HybridForCausalLM, pairs: Any, batch_tokens: int) -> list[float]:
        asked.append(len(pairs))
        return [0.0] * len(pairs)

    monkeypatch.setattr("align.trainers.reward.policy_margins", margins)
    start = small.start(tmp_path / "start")
    curriculum = {"model_weight": 1.0}
    run(config(curriculum=curriculum, max_steps=1), small.job(tmp_path, start))
    assert len(asked) == 1


def test_a_task_holds_out_its_share_of_rows(tmp_path):
    job = small.job(tmp_path)
    tokenizer = small.tokenizer()
    source = DataConfig(task="arithmetic", num_rows=50, dev_share=0.2, ways=("near_miss",))
    data = [source.model_dump(by_alias=True, exclude_unset=True)]
    given = config(data=data, sequence_tokens=512)
    dev = held_out(given, job, tokenizer)
    train, _ = supply_pairs(given, job, tokenizer)
    assert (len(dev), len(train.items)) == (10, 50)

    def prompt(pair: Pair) -> tuple[int, ...]:
        return pair.chosen.tokens[: prompt_lengths([pair])[0]]

    assert not {prompt(pair) for pair in dev} & {prompt(pair) for pair in train.items}


def test_a_constitution_brings_its_own_heads_and_floor(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 40, ("correctness", "safety"))
    (tmp_path / "c.yaml").write_text("criteria: {safety: {text: Hurts nobody.}}\nfloor: 0.2\n")
    tree = {"dimensions": {"correctness": TREE["dimensions"]["correctness"]}}
    job = small.job(tmp_path, small.start(tmp_path / "start"))
    run(config(constitution={"path": "c.yaml"}, hierarchy=tree), job)
    judge = RewardModel.load(job.artifact)
    assert judge.signals == ("correctness", "safety")
    assert judge.hierarchy.dimensions["harmlessness"].floor == 0.2


def test_the_artifact_holds_its_calibration_unless_told_not_to(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 120)
    start = small.start(tmp_path / "start")
    for method in ("temperature", "isotonic", "none"):
        job = small.job(tmp_path / method, start, base=tmp_path)
        run(config(calibration=method, max_steps=2), job)
        fitted = read_calibration(job.artifact)
        assert (fitted.overall.method if fitted else "none") == method
        assert (job.artifact / QUESTIONS_FILE).exists() == (method != "none")


def expect(message: str, tmp_path: Path, **changes: Any) -> None:
    start = tmp_path / "start"
    if not start.exists():
        small.start(start)
    with pytest.raises(ValueError, match=message):
        run(config(**changes), small.job(tmp_path, start))


def test_what_cannot_be_trained_is_an_error(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 20)
    everything = [{"path": "pairs.jsonl", "split": "all"}]
    expect(r"dev = \[\] and no source of data has split: train", tmp_path, data=everything)
    tree = {"dimensions": {"helpfulness": {"signals": {"style": {}}}}}
    expect(
        r"pairs.jsonl:\d+: signal = 'correctness', expected one of style, helpfulness, overall",
        tmp_path,
        hierarchy=tree,
    )
    write_pairs(tmp_path / "pairs.jsonl", 20, ("style",))
    expect("no training pair labels correctness, which would stay random", tmp_path)
    learned = {**TREE, "gate": "learned"}
    expect(
        "no training pair labels overall, which alone trains the gate", tmp_path, hierarchy=learned
    )
    write_pairs(tmp_path / "pairs.jsonl", 20, ("style", "overall"))
    expect(r"labels correctness, .* \(with a learned gate overall", tmp_path, hierarchy=learned)


def test_no_pairs_have_no_accuracy():
    with pytest.raises(ValueError, match="pair_accuracy: no pairs"):
        pair_accuracy(reward_model(), [])


def test_a_misspelt_key_is_an_error():
    with pytest.raises(ValidationError, match="curiculum"):
        config(curiculum="none")
