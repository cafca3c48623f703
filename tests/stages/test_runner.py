"""Skip, resume, stale: the laws of climbing, with kinds that count instead of training."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from reward.sandbox import SandboxConfig
from stages.artifact import Artifact
from stages.lock import locked
from stages.recipe import Stage
from stages.runner import Report, climb
from tests.stages.fakes import LADDER, ground, load


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "fake.yaml"
    file.write_text(LADDER)
    return file


def run(file: Path, *sets: str, until: str = "") -> tuple[Report, list[str]]:
    said: list[str] = []
    return climb(load(file, *sets), ground(file.parent, said), until=until), said


def statuses(report: Report) -> dict[str, str]:
    return {stage.name: stage.status for stage in report.stages}


def test_every_stage_starts_from_its_parent_and_reads_its_inputs(recipe: Path):
    run(recipe)
    at = recipe.parent / "run"
    assert (at / "sft-long/artifact/weights").read_text() == "tiny>1e-05>1e-05"
    assert "'reward': 'tiny>1e-05>1e-05'" in (at / "pairs/artifact/weights").read_text()
    assert "'pairs':" in (at / "dpo-short/artifact/weights").read_text()


def test_a_finished_run_is_skipped_as_a_whole_and_measures_nothing_again(recipe: Path):
    first, said = run(recipe)
    assert set(statuses(first).values()) == {"fresh"}
    assert any(line.startswith("eval depth on sft-short") for line in said)
    second, said = run(recipe)
    assert set(statuses(second).values()) == {"skipped"}
    assert not [line for line in said if line.startswith("eval")]
    assert [row.resolved() for row in second.rows] == [row.resolved() for row in first.rows]
    assert [s.digest for s in second.stages] == [s.digest for s in first.stages]
    assert [s.metrics for s in second.stages] == [s.metrics for s in first.stages]


def test_a_changed_value_makes_exactly_the_downstream_stale_and_says_why(recipe: Path):
    run(recipe)
    report, said = run(recipe, "sft-long.optim.lr=2e-5")
    assert statuses(report) == {
        "sft-short": "skipped",
        "sft-long": "fresh",
        "reward": "skipped",
        "pairs": "fresh",
        "dpo-short": "fresh",
        "grpo": "fresh",
    }
    assert "sft-long: stale: optim.lr 1e-5 -> 2e-5" in said
    assert "pairs: stale: sft-long changed (optim.lr 1e-5 -> 2e-5)" in said
    assert "dpo-short: stale: sft-long changed (optim.lr 1e-5 -> 2e-5)" in said
    assert "grpo: stale: sft-long changed (optim.lr 1e-5 -> 2e-5)" in said


def test_a_stage_that_comes_out_the_same_spares_what_follows(recipe: Path):
    run(recipe)
    report, _ = run(recipe, "sft-short.epochs=2")
    assert statuses(report)["sft-short"] == "fresh"
    assert set(list(statuses(report).values())[1:]) == {"skipped"}


def test_the_reason_reaches_back_over_runs_and_over_stages(recipe: Path):
    run(recipe)
    run(recipe, "sft-short.optim.lr=3e-5", until="sft-long")
    report, said = run(recipe, "sft-short.optim.lr=3e-5")
    assert statuses(report)["sft-long"] == "skipped"
    assert "reward: stale: sft-short changed (optim.lr 1e-5 -> 3e-5)" in said


def test_a_changed_data_file_makes_its_readers_stale(recipe: Path):
    file = recipe.parent / "rows.jsonl"
    file.write_text("{}\n")
    data = 'sft-long.data=[{path: "rows.jsonl"}]'
    run(recipe, data)
    report, said = run(recipe, data)
    assert statuses(report)["sft-long"] == "skipped"
    file.write_text('{"other": 1}\n')
    report, said = run(recipe, data)
    assert "sft-long: stale: data rows.jsonl changed" in said
    assert statuses(report)["reward"] == "skipped"


def test_another_model_makes_everything_stale(recipe: Path):
    run(recipe)
    report, said = run(recipe, "model.preset=small")
    assert set(statuses(report).values()) == {"fresh"}
    assert "grpo: stale: model changed (preset tiny -> small)" in said


def test_what_is_stale_is_moved_aside_and_nothing_is_deleted(recipe: Path):
    run(recipe)
    at = recipe.parent / "run/sft-long"
    old = Artifact.open(at / "artifact")
    run(recipe, "sft-long.optim.lr=2e-5")
    aside = Artifact.open(at / f"artifact.stale-{old.digest[:8]}", verify=True)
    assert aside.digest == old.digest
    attempt = at / f"attempt.stale-{old.manifest.inputs_digest[:8]}"
    assert sorted(path.name for path in attempt.iterdir()) == [
        "checkpoints",
        "inputs.json",
        "metrics.jsonl",
    ]


def test_a_half_done_stage_resumes_and_its_axis_goes_on(recipe: Path):
    # The fake stops itself; the second run has to have the same inputs, so it fails by the world.
    at = recipe.parent / "run"
    run(recipe, until="sft-short")
    folder = at / "sft-long"
    (folder / "artifact").parent.mkdir()
    run(recipe, until="sft-long")
    artifact = folder / "artifact"
    weights = (artifact / "weights").read_text()
    for path in (artifact / "weights", artifact / "manifest.json"):
        path.unlink()
    artifact.rmdir()
    (folder / "checkpoints/3").unlink()
    report, said = run(recipe, until="sft-long")
    assert statuses(report)["sft-long"] == "resumed"
    assert "sft-long: goes on where it stopped" in said
    assert (artifact / "weights").read_text() == weights
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 3]


def test_a_half_done_stage_of_other_inputs_begins_anew_and_keeps_the_old_attempt(recipe: Path):
    with pytest.raises(RuntimeError, match="sft-long: fails at step 2"):
        run(recipe, "sft-long.fail_at=2")
    report, said = run(recipe, until="sft-long")
    assert statuses(report)["sft-long"] == "fresh"
    assert "sft-long: stale: fail_at 2 -> 0" in said
    kept = list((recipe.parent / "run/sft-long").glob("attempt.stale-*/checkpoints/1"))
    assert len(kept) == 1


def test_an_artifact_without_manifest_counts_as_absent(recipe: Path):
    run(recipe)
    (recipe.parent / "run/grpo/artifact/manifest.json").unlink()
    report, _ = run(recipe)
    assert statuses(report)["grpo"] == "resumed"
    assert (recipe.parent / "run/grpo/artifact.stale-unfinish/weights").exists()


def test_a_broken_manifest_stops_the_run_with_the_remedy(recipe: Path):
    run(recipe)
    manifest = recipe.parent / "run/sft-long/artifact/manifest.json"
    manifest.write_text(manifest.read_text()[:-30])
    with pytest.raises(RuntimeError, match=r"not a manifest .*; move the folder away and run"):
        run(recipe)


def test_until_stops_after_a_stage_and_an_unknown_name_is_refused(recipe: Path):
    report, _ = run(recipe, until="sft-long")
    assert list(statuses(report)) == ["sft-short", "sft-long"]
    with pytest.raises(ValueError, match=r"no stage is named 'sft-lang'.*did you mean 'sft-long'"):
        run(recipe, until="sft-lang")


def test_two_runs_do_not_share_a_folder(recipe: Path):
    (recipe.parent / "run").mkdir()
    with (
        locked(recipe.parent / "run"),
        pytest.raises(RuntimeError, match=f"process {os.getpid()} is running in this folder"),
    ):
        run(recipe)
    run(recipe, until="sft-short")


def test_a_lock_left_by_a_dead_process_locks_nothing(recipe: Path):
    (recipe.parent / "run").mkdir()
    (recipe.parent / "run/.lock").write_text("999999\n")
    run(recipe, until="sft-short")
    assert (recipe.parent / "run/sft-short/artifact").is_dir()


def test_a_start_that_stands_elsewhere_is_used_in_place_and_watched(recipe: Path):
    outside = recipe.parent / "checkpoint"
    outside.mkdir()
    (outside / "weights").write_text("outside")
    sets = ("model={path: checkpoint}",)
    run(recipe, *sets)
    assert (recipe.parent / "run/sft-short/artifact/weights").read_text() == "outside>1e-05"
    (outside / "weights").write_text("changed")
    report, said = run(recipe, *sets)
    assert set(statuses(report).values()) == {"fresh"}
    assert "model: stale: data weights changed" in said


def test_the_table_marks_gains_losses_and_aims(recipe: Path):
    report, _ = run(recipe)
    rows = {(row.stage, row.eval): row for row in report.rows}
    assert rows["sft-short", "depth"].is_own
    assert rows["sft-short", "depth"].change.value == pytest.approx(1.0)
    assert rows["sft-short", "depth"].change.is_gain
    # Judged by the reward model, which came later: measured once it was there.
    assert rows["sft-short", "judged"].result.value > 0
    assert rows["reward", "pairs-held-out"].before is None
    assert ("sft-short", "pairs-held-out") not in rows
    assert ("pairs", "depth") not in rows
    text = (recipe.parent / "run/table.txt").read_text()
    assert "depth *" in text
    kept = json.loads((recipe.parent / "run/report.json").read_text())
    assert kept["evals"] == [row.resolved() for row in report.rows]
    assert [stage["name"] for stage in kept["stages"]][-1] == "grpo"


def test_an_eval_is_asked_from_its_first_policy_on(recipe: Path):
    report, said = run(recipe, "evals.depth.from=sft-short", "sft-short.evals=[]")
    rows = {(row.stage, row.eval): row for row in report.rows}
    assert "eval depth on model" not in said
    assert rows["sft-short", "depth"].change is None
    assert rows["sft-long", "depth"].change.value == pytest.approx(1.0)
    assert rows["grpo", "depth"].change is not None
    changed, said = run(recipe, "evals.depth.from=dpo-short", "sft-short.evals=[]")
    assert {row.stage for row in changed.rows if row.eval == "depth"} == {"dpo-short", "grpo"}
    assert not [line for line in said if line.startswith("eval depth")]


def test_the_manifest_says_what_the_artifact_is_made_of(recipe: Path):
    run(recipe)
    at = recipe.parent / "run"
    manifest = Artifact.open(at / "dpo-short/artifact", verify=True).manifest
    parents = {role: parent.stage for role, parent in manifest.parents.items()}
    assert parents == {"start": "sft-long", "pairs": "pairs"}
    assert manifest.parents["start"].digest == Artifact.open(at / "sft-long/artifact").digest
    assert manifest.data == [{"name": "rows", "licence": "MIT"}]
    assert manifest.versions["torch"]


def test_the_recipes_sandbox_reaches_stages_and_evals(recipe: Path, monkeypatch):
    recipe.write_text(recipe.read_text() + "sandbox: {allow_unisolated: true, max_parallel: 3}\n")
    wanted = SandboxConfig(allow_unisolated=True, max_parallel=3)
    loaded = load(recipe)
    assert loaded.head.sandbox == wanted
    assert loaded.resolved()["sandbox"]["max_parallel"] == 3
    seen: list[object] = []
    place = ground(recipe.parent)

    def watched(config, **given):
        seen.append(given["sandbox"])
        return place.run_eval(config, **given)

    run_stage = Stage.run
    monkeypatch.setattr(
        Stage, "run", lambda s, job: (seen.append(job.sandbox), run_stage(s, job))[1]
    )
    climb(loaded, dataclasses.replace(place, run_eval=watched))
    assert len(seen) > len(loaded.stages)
    assert all(each == wanted for each in seen)
