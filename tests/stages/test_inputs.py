"""What decides between skip and stale, and how a difference is told."""

from __future__ import annotations

from pathlib import Path

from stages.inputs import FileDigests, differences, sources_of, why_stale
from tests.stages.fakes import LADDER, load


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("{}")
    kept = tmp_path / "digests.json"
    first = FileDigests(kept).of(file)
    stamp = file.stat().st_mtime_ns
    again = FileDigests(kept)
    again.known[str(file.resolve())][2] = "remembered"
    assert again.of(file) == "remembered"
    file.write_text("[]")
    assert stamp <= file.stat().st_mtime_ns
    assert FileDigests(kept).of(file) != first


def test_the_digests_of_a_config_go_by_the_names_in_it(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(LADDER)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "rows").mkdir(exist_ok=True)
        (tmp_path / "rows" / name).write_text("{}")
    recipe = load(tmp_path / "r.yaml", "grpo.data=[{path: rows/*.jsonl}, {task: copy}]")
    digests = FileDigests(tmp_path / "digests.json").of_config(
        recipe.stage("grpo").config, tmp_path
    )
    assert sorted(digests) == ["rows/a.jsonl", "rows/b.jsonl"]


def test_sources_are_found_with_their_keys(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(LADDER)
    recipe = load(tmp_path / "r.yaml")
    found = sources_of(recipe.stage("dpo-short").config, ("stages", 4))
    assert [(keys, source.from_) for keys, source in found] == [(("stages", 4, "data", 0), "pairs")]
    assert [keys for keys, _ in sources_of(recipe.head.model)] == [("tokenizer", "data", 0)]


def test_lists_of_values_differ_as_a_whole_and_tables_by_key():
    old = {"betas": [0.9, 0.95], "data": [{"path": "a", "weight": 1.0}]}
    new = {"betas": [0.9, 0.99], "data": [{"path": "a", "weight": 0.5}, {"path": "b"}]}
    assert differences(old, new) == {
        "betas": ([0.9, 0.95], [0.9, 0.99]),
        "data.0.weight": (1.0, 0.5),
        "data.1.path": (None, "b"),
    }


def test_reasons_are_short_and_read_as_in_a_recipe(tmp_path: Path):
    old = {"config": {"lr": 1e-5, "a": 1, "b": 1, "c": 1}, "data": {"x.jsonl": "0"}, "parents": {}}
    new = {"config": {"lr": 2e-5, "a": 2, "b": 2, "c": 2}, "data": {}, "parents": {}}
    told = why_stale(old, new, names={}, run=tmp_path)
    assert told == "a 1 -> 2, b 1 -> 2, c 1 -> 2 and 2 more"
    only = why_stale(
        {"config": {"lr": 1e-5}, "revision": 1}, {"config": {"lr": 1e-5}, "revision": 2},
        names={}, run=tmp_path,
    )  # fmt: skip
    assert only == "revision 1 -> 2"
    removed = why_stale({"data": {"x.jsonl": "0"}}, {"data": {}}, names={}, run=tmp_path)
    assert removed == "data x.jsonl removed"


def test_a_parent_without_history_is_told_by_its_digests(tmp_path: Path):
    told = why_stale(
        {"parents": {"start": "a" * 64}},
        {"parents": {"start": "b" * 64}},
        names={"start": "sft"},
        run=tmp_path,
    )
    assert told == "sft changed (aaaaaaaa -> bbbbbbbb)"
