from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerFast

import align.evals.constraints
import align.evals.sampling
import align.evals.win_rate
from align.data.render import render_chat, render_preference
from align.data.rows import ChatRow, PreferenceRow
from align.data.sources import DataConfig, read_rows
from align.data.tokenizer import train_tokenizer
from align.evals import EVALS, EvalConfig, EvalResult, run_eval
from align.evals.sampling import Answers, SampledEval, respond
from align.evals.win_rate import duel
from align.policy import save_policy
from model import HybridForCausalLM, HybridModel, Packed
from model.config import HybridConfig, preset
from reward.hierarchy import HIERARCHY
from reward.model import RewardModel

TASK = {"task": "arithmetic", "split": "dev", "num_rows": 12}
CONFIG: TypeAdapter[Any] = TypeAdapter(EvalConfig)


def small() -> HybridConfig:
    layers = ["linear_attention", "full_attention"]
    return preset(
        "tiny",
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=layers,
        head_dim=8,
        rotary_dim=4,
        initializer_range=0.2,
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    rows = read_rows(DataConfig(task="arithmetic", num_rows=50), base=Path(), inputs={}, seed=0)
    texts = [m["content"] for row in rows if isinstance(row, ChatRow) for m in row.messages]
    return train_tokenizer(texts, 300)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("artifacts")
    found = {}
    for seed, name in enumerate(("policy", "parent")):
        torch.manual_seed(seed)
        save_policy(HybridForCausalLM(small()), tokenizer, root / name)
        found[name] = root / name
    RewardModel(HybridModel(small()), HIERARCHY).save(root / "reward")
    tokenizer.save_pretrained(root / "reward")
    return {**found, "reward": root / "reward"}


@pytest.fixture
def ask(folders: Mapping[str, Path], tmp_path: Path) -> Callable[..., EvalResult]:
    def run(
        config: Mapping[str, Any],
        policy: str = "policy",
        parent: str | None = "parent",
        inputs: Mapping[str, Path] | None = None,
    ) -> EvalResult:
        return run_eval(
            CONFIG.validate_python(config),
            policy=folders[policy],
            parent=None if parent is None else folders[parent],
            inputs=inputs or {},
            base=tmp_path,
            seed=3,
        )

    return run


def answering(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
    text: Callable[[Any, Path], str],
) -> None:
    """Every policy answers what `text` says."""

    def fake(folder: Path, rows: Any, *, config: SampledEval, seed: int) -> Answers:
        texts = tuple((text(row, folder),) * config.num_samples for row in rows)
        return Answers(texts, unfinished=0.25, tokenizer=tokenizer)

    for module in (align.evals.sampling, align.evals.constraints, align.evals.win_rate):
        monkeypatch.setattr(module, "respond", fake)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (lambda row, _: row.answer, 1.0),
        (lambda row, _: "none", 0.0),
        # No legal turn of the assistant, so no judge is asked.
        (lambda row, _: "  ", 0.0),
        (lambda row, _: f"{row.answer} <|user|>", 0.0),
    ],
)
def test_accuracy_is_the_mean_verdict(
    text: Any,
    value: float,
    ask: Any,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    answering(monkeypatch, tokenizer, text)
    data = [TASK, {"task": "sort", "split": "dev", "num_rows": 8}]
    result = ask({"kind": "task", "data": data, "num_samples": 2})
    assert (result.name, result.metric) == ("arithmetic+sort", "accuracy")
    assert (result.value, result.num_items, result.stderr) == (value, 20, 0.0)
    assert result.details["unfinished"] == 0.25
    assert result.details["accuracy/sort"] == value


def test_answers_depend_on_row_and_seed_only(folders: Mapping[str, Path]) -> None:
    source = DataConfig(task="arithmetic", split="dev", num_rows=5)
    rows = read_rows(source, base=Path(), inputs={}, seed=0, kind="prompt")
    config = SampledEval(max_new_tokens=6, num_samples=2)
    wide = respond(folders["policy"], rows, config=config, seed=1)
    narrow = config.model_copy(update={"max_concurrent": 2})
    assert respond(folders["policy"], rows, config=narrow, seed=1).texts == wide.texts
    first = respond(folders["policy"], rows[:2], config=config, seed=1)
    assert first.texts == wide.texts[:2]
    assert respond(folders["policy"], rows, config=config, seed=2).texts != wide.texts
    assert wide.texts[0][0] != wide.texts[0][1]


def test_the_untrained_policy_is_measured_end_to_end(ask: Any) -> None:
    result = ask({"kind": "math", "data": [TASK], "max_new_tokens": 4})
    assert (result.name, result.num_items, result.value) == ("math", 12, 0.0)


@pytest.mark.parametrize("kind", ["needle", "multi_needle", "recall"])
def test_retrieval_prompts_have_the_asked_length(
    kind: str, ask: Any, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths: list[int] = []

    def text(row: Any, folder: Path) -> str:
        lengths.append(sum(len(message["content"].split()) for message in row.prompt))
        return row.answer or " ".join(row.arguments["answers"])

    answering(monkeypatch, tokenizer, text)
    for tokens in (512, 1024):
        result = ask({"kind": kind, "context_tokens": tokens, "num_items": 4})
        assert (result.name, result.value) == (f"{kind}@{tokens}", 1.0)
    assert max(lengths[:4]) < min(lengths[4:])


def test_a_prompt_counts_only_if_all_its_instructions_hold(
    ask: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = '["punctuation:no_comma", "change_case:english_lowercase"]'
    row = (
        '{{"prompt": [{{"role": "user", "content": "Say {}."}}], "verifier": "constraints", '
        f'"arguments": {{{{"instruction_id_list": {ids}, "kwargs": [{{{{}}}}, {{{{}}}}]}}}}}}}}\n'
    )
    (tmp_path / "rows.jsonl").write_text("".join(row.format(word) for word in ("a", "b")))
    answering(monkeypatch, tokenizer, lambda row, _: "a word, said in lowercase english")
    config = {"kind": "constraints", "data": [{"path": "rows.jsonl", "split": "all"}]}
    whole = ask(config)
    share = ask({**config, "all_followed": False})
    assert (whole.value, share.value) == (0.0, 0.5)
    assert whole.details["instructions"] == 0.5


def test_nll_is_per_token_over_all_rows(
    ask: Any, folders: Mapping[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = {"kind": "lm", "data": [TASK]}
    result = ask(config)
    assert ask({**config, "batch_tokens": 1}).items == pytest.approx(result.items, rel=1e-5)
    model = HybridForCausalLM.from_pretrained(folders["policy"]).eval()
    nll, tokens = 0.0, 0
    source = DataConfig(task="arithmetic", split="dev", num_rows=12)
    for row in read_rows(source, base=Path(), inputs={}, seed=3, kind="chat"):
        assert isinstance(row, ChatRow)
        example = render_chat(row, tokenizer)
        ids = torch.tensor([example.tokens])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits.log_softmax(-1)
        for place, weight in enumerate(example.weights):
            if weight:
                nll -= float(logprobs[0, place - 1, example.tokens[place]])
                tokens += 1
    assert result.value == pytest.approx(nll / tokens, rel=1e-5)
    assert result.value == pytest.approx(math.fsum(result.items) / 12)
    assert (result.higher_is_better, result.details["tokens"]) == (False, tokens)


def pairs(tokenizer: PreTrainedTokenizerFast) -> list[Any]:
    source = DataConfig(task="arithmetic", split="dev", num_rows=12)
    rows = read_rows(source, base=Path(), inputs={}, seed=3, kind="preference")
    return [render_preference(row, tokenizer) for row in rows if isinstance(row, PreferenceRow)]


def lead(model: HybridForCausalLM, pair: Any) -> float:
    sums = []
    for side in (pair.chosen, pair.rejected):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([side.tokens])).logits.log_softmax(-1)
        trained = [i for i, weight in enumerate(side.weights) if weight]
        sums.append(sum(float(logprobs[0, i - 1, side.tokens[i]]) for i in trained))
    return sums[0] - sums[1]


def test_margins_of_a_policy_are_against_its_parent(
    ask: Any, folders: Mapping[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    policy = HybridForCausalLM.from_pretrained(folders["policy"]).eval()
    parent = HybridForCausalLM.from_pretrained(folders["parent"]).eval()
    expected = [lead(policy, pair) - lead(parent, pair) for pair in pairs(tokenizer)]
    margin = ask({"kind": "preference", "data": [TASK], "metric": "margin"})
    assert margin.items == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert margin.baseline == 0.0
    accuracy = ask({"kind": "preference", "data": [TASK]})
    assert accuracy.value == sum(item > 0 for item in expected) / 12
    assert "accuracy/correctness" in accuracy.details
    alone = ask({"kind": "preference", "data": [TASK], "metric": "margin", "reference": "none"})
    assert alone.items == pytest.approx([lead(policy, p) for p in pairs(tokenizer)], rel=1e-4)
    assert alone.baseline is None


@pytest.mark.parametrize("parent", [None, "policy"])
def test_a_policy_against_itself_has_moved_nothing(parent: str | None, ask: Any) -> None:
    for config in (
        {"kind": "preference", "data": [TASK]},
        {"kind": "win_rate", "data": [TASK], "max_new_tokens": 3},
    ):
        result = ask(config, parent=parent)
        assert (result.value, result.stderr, result.baseline) == (0.5, 0.0, 0.5)


def test_a_reward_model_ranks_pairs_by_the_labelled_head(
    ask: Any, folders: Mapping[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    result = ask({"kind": "preference", "data": [TASK], "metric": "margin"}, policy="reward")
    model = RewardModel.load(folders["reward"])
    for item, pair in zip(result.items, pairs(tokenizer), strict=True):
        packed = Packed.from_sequences([pair.chosen.tokens, pair.rejected.tokens])
        prompt = pair.chosen.weights.index(1.0)
        values = model(packed, [prompt, prompt]).values
        gap = (values[0] - values[1]).detach()
        assert item == pytest.approx(float(gap[model.signals.index(pair.signal)]), abs=1e-5)
    assert result.baseline == 0.0
    overall = {**TASK, "signal": "overall"}
    assert ask({"kind": "preference", "data": [overall]}, policy="reward").num_items == 12


def test_wins_count_one_and_ties_half(
    ask: Any,
    folders: Mapping[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    def text(row: Any, folder: Path) -> str:
        right = folder == folders["policy"] or int(float(row.answer)) % 2
        return row.answer if right else "none"

    answering(monkeypatch, tokenizer, text)
    result = ask({"kind": "win_rate", "data": [TASK]})
    assert set(result.items) == {0.5, 1.0}
    assert duel([0.0, 1.0], [1.0, math.nan]) == 0.0


def test_win_rate_may_be_judged_by_the_reward_model(ask: Any, folders: Mapping[str, Path]) -> None:
    config = {"kind": "win_rate", "data": [TASK], "judge": "reward", "max_new_tokens": 4}
    result = ask(config, inputs={"reward": folders["reward"]})
    assert 0 <= result.value <= 1
    assert result.num_items == 12
    with pytest.raises(ValueError, match="judge = 'reward' needs a reward artifact"):
        ask(config)


def test_the_table_holds_every_kind() -> None:
    kinds = {"task", "math", "constraints", "needle", "multi_needle", "recall"}
    assert set(EVALS) == kinds | {"lm", "preference", "refusal", "win_rate"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "task", "data": [{"task": "sort"}]}, "split = 'train', expected dev in an eval"),
        ({"kind": "lm", "data": [{"path": "a.txt"}]}, "expected dev or all in an eval"),
        ({"kind": "task", "data": [{**TASK, "weight": 2.0}]}, "weight is for training"),
        ({"kind": "tasks", "data": []}, "does not match any of the expected tags"),
        ({"kind": "math", "temperature": -1}, "greater than or equal to 0"),
        ({"kind": "math", "tempreature": 1}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_config_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CONFIG.validate_python(config)


def test_wrong_rows_are_refused(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"prompt": "Say a.", "answer": "a"}\n')
    one = {"path": "one.jsonl", "split": "all"}
    with pytest.raises(ValueError, match="eval task: 1 rows, expected two or more"):
        ask({"kind": "task", "data": [one]})
    with pytest.raises(ValueError, match=r"one.jsonl:1 names no verifier"):
        ask({"kind": "task", "data": [one, one]})
    with pytest.raises(ValueError, match="is a PreferenceRow, expected chat rows"):
        ask({"kind": "lm", "data": [{**TASK, "as": "preference"}]})


def test_wrong_artifacts_are_refused(ask: Any) -> None:
    with pytest.raises(ValueError, match="is a reward model, expected a policy"):
        ask({"kind": "math"}, policy="reward")
    pair = {**TASK, "signal": "beauty"}
    with pytest.raises(ValueError, match="signal = 'beauty', expected one of"):
        ask({"kind": "preference", "data": [pair]}, policy="reward")
