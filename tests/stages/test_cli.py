"""The command itself: exit codes, one line on stderr, JSON, and the real kinds behind it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from tests.stages.fakes import align

ROOT = Path(__file__).resolve().parents[2]
TINY = "name: x\nmodel: {preset: tiny, tokenizer: {data: [{task: arithmetic}]}}\n"
SFT = TINY + "stages:\n  - name: sft\n    kind: sft\n    data: [{task: arithmetic}]\n"


def error_of(tmp_path: Path, text: str, *more: str) -> str:
    """What `align check` says on stderr about a bad recipe."""
    file = tmp_path / "r.yaml"
    file.write_text(text)
    result = align("check", str(file), *more)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = result.stderr.removesuffix("\n")
    assert "\n" not in line
    return line.removeprefix("error: ").replace(f"{tmp_path}/", "")


# With the real kinds: what a person really mistypes, and what they read then.
BAD = {
    "misspelt key": (
        SFT + "    optim: {learning_rate: 1e-5}\n",
        "r.yaml:7: sft.optim.learning_rate = 1e-05: unknown key; known: betas, clip_norm, eps, lr, "
        "min_lr, optimizer, schedule, warmup_share, warmup_steps, weight_decay, weights",
    ),
    "misspelt key of a data source": (
        SFT.replace("    data: [{task:", "    data: [{taks:"),
        "r.yaml:6: sft.data.0.taks = arithmetic: unknown key; did you mean 'task'?",
    ),
    "no data": (
        TINY + "stages:\n  - name: sft\n    kind: sft\n",
        "r.yaml:4: sft.data: is missing; add it",
    ),
    "two sources in one": (
        SFT.replace("    data: [{task:", "    data: [{path: a.jsonl, task:"),
        "r.yaml:6: sft.data.0: data names path and task; expected exactly one of path, hub, task, "
        "from",
    ),
    "min_lr above lr": (
        SFT + "    optim: {lr: 1e-5, min_lr: 2e-5}\n",
        "r.yaml:7: sft.optim: optim.min_lr = 2e-05, expected at most optim.lr = 1e-05; lower "
        "min_lr",
    ),
    "unknown schedule": (
        SFT + "    optim: {schedule: cosinus}\n",
        "r.yaml:7: sft.optim.schedule = cosinus: expected cosine, linear or constant; did you mean "
        "'cosine'?",
    ),
    "TRL for a kind that it has not": (
        SFT.replace("kind: sft", "kind: lm") + "    backend: trl\n",
        "r.yaml:7: sft.backend = trl: expected native; change it",
    ),
    "batch of packed sequences in grpo": (
        SFT + "  - {name: rl, kind: grpo, data: [{task: copy}], batch_sequences: 4}\n",
        "r.yaml:7: rl: batch_sequences is not used by grpo, whose steps are made of prompts; "
        "remove it and set prompts_per_step",
    ),
    "eval on rows that are trained": (
        SFT + "evals: [{name: copy, kind: task, data: [{task: copy}]}]\n",
        "r.yaml:7: evals.copy.data.0: data copy: split = 'train', expected dev in an eval; the "
        "rest may have been trained on",
    ),
    "eval without name": (
        SFT + "evals: [{kind: math}]\n",
        "r.yaml:7: evals.0.name: is missing; add it, stages and tables call the eval by it",
    ),
    "unknown way of being wrong": (
        TINY + "stages:\n  - name: dpo\n    kind: dpo\n    data: [{task: copy, ways: [wrong]}]\n",
        "r.yaml:6: dpo.data.0: ways = ['wrong'], expected of near_miss, other_answer, impolite for "
        "task copy",
    ),
    "missing file": (
        SFT.replace("    data: [{task: arithmetic}]\n", "    data: [{path: gone.jsonl}]\n"),
        "r.yaml:6: sft.data.0.path = gone.jsonl: no such file, folder of .jsonl, .json, .parquet, "
        f".txt, .jsonl.gz, .json.gz, .txt.gz or glob in {Path.cwd()}; check the path",
    ),
    "unknown stage": (
        SFT + "    from: lm\n",
        "r.yaml:7: sft.from = lm: no stage has this name; none is known here",
    ),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD.keys())
def test_a_bad_recipe_is_one_line_on_stderr_and_exit_code_2(
    tmp_path: Path, text: str, expected: str
):
    found = error_of(tmp_path, text)
    assert found == expected


def test_an_unknown_base_is_refused_with_what_is_shipped(tmp_path: Path):
    text = "name: x\nmodel: {base: huge}\n" + SFT.removeprefix(TINY)
    assert error_of(tmp_path, text).startswith("r.yaml:2: model.base = huge: no such base; ")


def test_a_bad_set_is_named_as_it_was_written(tmp_path: Path):
    assert error_of(tmp_path, SFT, "--set", "sft.optim.lrr=1") == (
        "--set sft.optim.lrr=1: sft.optim.lrr = 1: unknown key; did you mean 'lr'?"
    )


def test_a_missing_recipe_is_the_users_error():
    result = align("check", "gone.yaml")
    assert result.exit_code == 2
    assert result.stderr == "error: gone.yaml: No such file or directory; expected a recipe file\n"


def test_a_traceback_is_shown_only_when_asked_for(tmp_path: Path):
    result = align("check", "gone.yaml", "--traceback")
    assert isinstance(result.exception, ValueError)


def test_check_prints_the_plan_with_derived_numbers(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(SFT + "    sequence_tokens: 512\n    batch_sequences: 16\n")
    result = align("check", str(file), "--set", "sft.max_steps=10")
    assert result.exit_code == 0
    assert "tokens per step, at most: 8,192" in result.stdout
    assert "tokens, at most: 81,920" in result.stdout
    assert not (tmp_path / "runs").exists()


def test_check_as_json_is_the_resolved_recipe(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(SFT)
    plan = json.loads(align("check", str(file), "--json").stdout)
    assert plan["resolved"]["stages"][0]["optim"]["clip_norm"] == 1.0
    assert plan["derived"]["sft"]["epochs"] == 1


def test_the_world_is_exit_code_1(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(SFT)
    (tmp_path / "run").write_text("a file where the run folder should be")
    result = align("run", str(file), "--out", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert "File exists" in result.stderr


def test_help_names_every_command():
    result = align("--help")
    for command in ("run", "check", "eval", "generate", "score", "export"):
        assert command in result.stdout


def test_python_m_stages_is_the_same_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["stages", "check", "gone.yaml"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("stages", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == (
        "error: gone.yaml: No such file or directory; expected a recipe file"
    )


def test_processes_that_accelerate_did_not_start_are_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = tmp_path / "r.yaml"
    file.write_text(SFT)
    # what `accelerate launch --cpu --num_processes 2` leaves in the environment of its one process
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    result = align("run", str(file), "--out", str(tmp_path / "run"))
    assert result.exit_code == 1
    assert "started 1 process" in result.stderr
    assert "--config_file stages/launch/cpu.yaml" in result.stderr
    assert not (tmp_path / "run").exists()
