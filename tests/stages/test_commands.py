"""generate, score, export and eval on artifacts of a tiny policy and a tiny reward model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from align.policy import load_policy
from model import Packed
from tests.stages.fakes import align


def test_generate_answers_and_is_the_same_under_a_seed(policy: Path):
    options = ("--max-new-tokens", "5", "--num-samples", "3", "--json", "--system", "be kind")
    first, again, other = (
        json.loads(align("generate", str(policy), "what is two?", *options, "--seed", s).stdout)
        for s in ("1", "1", "2")
    )
    assert first == again != other
    assert len(first) == 3
    assert all(found["mean_logprob"] < 0 for found in first)


def test_generate_prints_the_text_alone(policy: Path):
    result = align("generate", str(policy), "what?", "--max-new-tokens", "3", "--temperature", "0")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout.endswith("\n")


def test_a_folder_that_is_no_policy_is_the_users_error(tmp_path: Path):
    result = align("generate", str(tmp_path), "what?")
    assert result.exit_code == 2
    assert "no config.json, expected a policy" in result.stderr


def test_export_merges_what_was_trained_into_a_plain_checkpoint(
    policy: Path, adapter: Path, tmp_path: Path
):
    out = tmp_path / "checkpoint"
    result = align("export", str(adapter), str(out))
    assert result.exit_code == 0, result.stderr
    packed = Packed.from_sequences([[5, 6, 7, 8]])
    targets = packed.tokens.roll(-1)
    merged = AutoModelForCausalLM.from_pretrained(out)(packed=packed, targets=targets)
    chain = load_policy(adapter)[0](packed=packed, targets=targets)
    base = load_policy(policy)[0](packed=packed, targets=targets)
    assert torch.equal(merged.logprobs, chain.logprobs)
    assert not torch.allclose(merged.logprobs, base.logprobs, atol=1e-3)
    again = align("export", str(policy), str(out))
    assert again.exit_code == 2
    assert again.stderr == f"error: {out}: is not empty; choose a new folder\n"


def test_score_gives_a_line_per_item_down_to_the_signals(judge: Path, tmp_path: Path):
    asked = [{"role": "user", "content": "two and three?"}]
    right = {"messages": asked, "response": "5", "answer": "5", "verifier": "math"}
    items = tmp_path / "items.jsonl"
    lines = [right, {**right, "response": "6"}, {"messages": asked, "response": "five"}]
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = align("score", str(judge), str(items))
    assert result.exit_code == 0, result.stderr
    scores = [json.loads(line) for line in result.stdout.splitlines()]
    assert [score["dimensions"]["correctness"] for score in scores[:2]] == [1.0, 0.0]
    assert "rule:math" not in scores[2]["signals"]
    assert all(score["valid"] for score in scores)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"messages": []', "Expecting ',' delimiter"),
        ('{"messages": []}', "'response'"),
        ("3", "'int' object is not subscriptable"),
    ],
)
def test_a_bad_item_is_named_with_file_and_line(judge: Path, tmp_path: Path, line, problem):
    items = tmp_path / "items.jsonl"
    good = {"messages": [{"role": "user", "content": "hi"}], "response": "ho"}
    items.write_text(f"{json.dumps(good)}\n{line}\n")
    result = align("score", str(judge), str(items))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {items}:2: not an item ({problem}")
    assert result.stderr.endswith("expected a JSON object with messages and response\n")


def test_eval_runs_the_recipes_evals_on_any_policy(policy: Path, tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: x\nmodel: {path: nowhere}\n"
        "evals:\n"
        "  - {name: short, kind: lm, data: [{task: copy, split: dev, num_rows: 5, as: chat}]}\n"
        "  - {name: math, kind: math}\n"
        "stages:\n  - {name: sft, kind: sft, data: [{task: copy}]}\n"
    )
    result = align("eval", str(recipe), str(policy), "--only", "short", "--json")
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert (found["name"], found["metric"], found["num_items"]) == ("short", "nll", 5)
    shown = align("eval", str(recipe), str(policy), "--only", "short")
    assert f"{found['value']:.4f}" in shown.stdout
    wrong = align("eval", str(recipe), str(policy), "--only", "shrot")
    assert wrong.stderr == "error: --only shrot: no such eval; did you mean 'short'?\n"
