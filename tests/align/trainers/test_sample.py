"""Rows out of a policy's own responses: the right ones, all counted, and never sampled twice."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from align.course import Job
from align.data.rows import Origin, PromptRow
from align.data.sources import ROWS_FILE, DataConfig, read_rows
from align.policy import save_policy
from align.trainers.sample import Judged, SampleConfig, Sampler, choose, run
from model import Packed
from tests.align import small

DATA = (DataConfig(path="p.jsonl", split="all"),)


def config(**changes: Any) -> SampleConfig:
    given = {"data": DATA, "num_samples": 2, "max_new_tokens": 4, "prompts_per_part": 2}
    return SampleConfig(**(given | changes))


def row(number: int) -> PromptRow:
    message = {"role": "user", "content": f"question {number}"}
    return PromptRow((message,), Origin(f"p.jsonl:{number}"), verifier="exact", answer="x")


def group(*responses: tuple[float, str]) -> list[Judged]:
    return [Judged(f"said {i}", score, fault) for i, (score, fault) in enumerate(responses)]


GROUPS = [
    group((0.2, ""), (0.9, ""), (0.1, ""), (0.9, "")),
    group((0.5, ""), (0.55, "")),
    group((1.0, "unfinished"), (0.0, "unjudged"), (0.0, "malformed")),
    group((0.0, "malformed"), (0.3, ""), (1.0, "unfinished"), (0.8, "")),
]


def test_pairs_are_best_against_worst_of_what_can_be_a_row():
    rows, metrics = choose(config(), [row(i) for i in range(4)], GROUPS)
    told = [(r.chosen[0]["content"], r.rejected[0]["content"], r.origin.place) for r in rows]
    assert told == [("said 1", "said 2", "p.jsonl:0"), ("said 3", "said 1", "p.jsonl:3")]
    assert [r.margin for r in rows] == pytest.approx([0.8, 0.5])
    assert metrics == {
        "prompts": 4,
        "rows": 2,
        "responses": 13,
        "responses/unfinished": 2,
        "responses/unjudged": 1,
        "responses/malformed": 2,
        "prompts/below_min_gap": 1,
        "prompts/no_usable_response": 1,
        "score/mean": pytest.approx((0.2 + 0.9 + 0.1 + 0.9 + 0.5 + 0.55 + 1 + 0.3 + 1 + 0.8) / 10),
        "gap/mean": pytest.approx(0.65),
    }


def test_chats_are_the_best_response_above_the_least_score():
    settings = config(make="sft", min_score=0.6)
    rows, metrics = choose(settings, [row(i) for i in range(4)], GROUPS)
    assert [r.messages[-1]["content"] for r in rows] == ["said 1", "said 3"]
    assert [r.messages[0]["content"] for r in rows] == ["question 0", "question 3"]
    assert metrics["prompts/below_min_score"] == 1


def test_every_prompt_is_a_row_or_counted():
    for settings in (config(), config(make="sft"), config(min_score=0.95), config(min_gap=0.01)):
        rows, metrics = choose(settings, [row(i) for i in range(4)], GROUPS)
        lost = sum(v for k, v in metrics.items() if k.startswith("prompts/"))
        assert len(rows) + lost == 4


def write_prompts(folder: Path, number: int = 5) -> None:
    """Prompts of an instruction that a random policy follows now and then: say a t."""
    arguments = {
        "instruction_id_list": ["keywords:letter_frequency"],
        "kwargs": [{"letter": "t", "let_frequency": 1, "let_relation": "at least"}],
    }
    lines = [
        json.dumps(
            {
                "prompt": [{"role": "user", "content": f"the cat {'sat ' * i}"}],
                "answer": "",
                "verifier": "constraints",
                "arguments": arguments,
            }
        )
        for i in range(number)
    ]
    (folder / "p.jsonl").write_text("\n".join(lines) + "\n")


def likely_to_stop(folder: Path, seed: int = 0) -> Path:
    """A random policy whose responses often end within a few tokens."""
    model, tokenizer = small.model(seed), small.tokenizer()
    with torch.no_grad():
        hidden = model.model.run(Packed.from_sequences([list(range(20, 60))])).hidden.mean(0)
        model.lm_head.weight[tokenizer.eos_token_id] = 6 * hidden / hidden.square().sum()
    save_policy(model, tokenizer, folder)
    return folder


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_prompts(tmp_path)
    start = likely_to_stop(tmp_path / "start")
    folder = tmp_path / "stage"
    return small.job(folder, start, base=tmp_path, artifact=folder / "artifact.tmp")


def real(**changes: Any) -> SampleConfig:
    given = {"num_samples": 8, "max_new_tokens": 12, "temperatures": (0.8, 1.2)}
    return config(**(given | changes))


@pytest.mark.parametrize(("make", "kind"), [("dpo", "preference"), ("sft", "chat")])
def test_the_artifact_is_rows_that_the_next_stage_reads(job: Job, make: str, kind: str):
    outcome = run(real(make=make), job)
    source = DataConfig(**{"from": "pairs", "split": "all"})
    rows = read_rows(source, base=job.base, inputs={"pairs": job.artifact}, seed=0, kind=kind)
    assert len(rows) == outcome.metrics["rows"] > 0
    best = [r.chosen if make == "dpo" else r.messages[-1:] for r in rows]
    assert all("t" in messages[0]["content"] for messages in best)
    if make == "dpo":
        assert all("t" not in r.rejected[0]["content"] for r in rows)
    summary = json.loads((job.artifact / "summary.json").read_text())
    assert summary["metrics"] == outcome.metrics
    assert outcome.data[0]["rows"] == 5


class Killed(Exception):
    pass


def test_a_killed_stage_goes_on_where_it_was_and_ends_with_the_same_rows(
    job: Job, tmp_path: Path, monkeypatch: Any
):
    run(real(), job)
    whole = (job.artifact / ROWS_FILE).read_bytes()
    other = replace(job, folder=tmp_path / "killed", artifact=tmp_path / "killed" / "artifact.tmp")
    sampled: list[int] = []
    part = Sampler._part

    def counted(self: Sampler, start: int) -> Any:
        if len(sampled) == 2:
            raise Killed
        sampled.append(start)
        return part(self, start)

    monkeypatch.setattr(Sampler, "_part", counted)
    with pytest.raises(Killed):
        run(real(), other)
    assert sampled == [0, 2]
    sampled.clear()
    run(real(), other)
    assert sampled == [4]
    assert (other.artifact / ROWS_FILE).read_bytes() == whole
    sampled.clear()
    # what chooses among responses does not sample them anew
    assert run(real(make="sft", min_gap=0.5), other).metrics["rows"] > 0
    assert sampled == []


def test_parts_of_another_policy_seed_or_setting_are_not_reused(job: Job):
    run(real(), job)
    run(real(max_new_tokens=11), job)
    run(real(), replace(job, seed=1))
    likely_to_stop(job.start, seed=1)
    run(real(), job)
    assert len(list(job.folder.glob("parts-*"))) == 4


def test_no_row_at_all_is_an_error_with_the_counts(job: Job):
    with pytest.raises(
        ValueError, match=r"no prompt gives a row of make: dpo \(.*below_min_gap.*lower min_gap"
    ):
        run(real(min_gap=1.5), job)


def test_a_full_disk_is_one_line_and_earlier_parts_stay(job: Job, monkeypatch: Any):
    fsync = os.fsync
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"part-000001\.jsonl: cannot write .*No space left"):
        run(real(), job)
    assert [p.name for p in job.folder.glob("parts-*/*.jsonl")] == ["part-000000.jsonl"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"num_samples": 1}, "make = dpo compares responses, expected num_samples x temperatures"),
        ({"temperatures": (0.0,)}, "greater than 0"),
        ({"temperatures": ()}, "temperatures"),
        ({"min_gap": 0.0}, "min_gap"),
        ({"data": ()}, "data"),
    ],
)
def test_a_config_that_cannot_work_is_refused(bad: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        config(**bad)
