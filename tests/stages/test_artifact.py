"""An artifact is whole or absent, and says when it was touched."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from stages import artifact as module
from stages.artifact import (
    MANIFEST,
    Artifact,
    Facts,
    Parent,
    digest_of,
    find_artifact,
    publish,
    set_aside,
    write_atomic,
)


def facts(start: str = "0" * 64) -> Facts:
    return Facts(
        stage="sft",
        kind="sft",
        gives="policy",
        inputs={"config": {"lr": 1e-5}},
        parents={"start": Parent(stage="model", digest=start)},
        data=({"name": "gsm8k", "licence": "MIT", "rows": 3},),
        metrics={"loss": 0.5},
    )


def filled(folder: Path, text: str = "weights") -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "weights").write_text(text)
    (folder / "tokenizer/vocab.json").write_text("{}")
    return folder


def published(tmp_path: Path, name: str = "artifact", **changes: str) -> Artifact:
    return publish(filled(tmp_path / f"{name}.tmp", **changes), tmp_path / name, facts())


def test_what_is_published_opens_as_it_was_described(tmp_path: Path):
    made = published(tmp_path)
    opened = Artifact.open(tmp_path / "artifact", verify=True)
    assert opened == made
    assert opened.manifest.inputs == {"config": {"lr": 1e-5}}
    assert opened.manifest.metrics == {"loss": 0.5}
    assert sorted(opened.manifest.files) == ["tokenizer/vocab.json", "weights"]
    assert not (tmp_path / "artifact.tmp").exists()


def test_the_digest_is_of_bytes_and_start_and_of_nothing_else(tmp_path: Path):
    first = published(tmp_path, "a")
    assert published(tmp_path, "b").digest == first.digest
    assert published(tmp_path, "c", text="other").digest != first.digest
    elsewhere = publish(filled(tmp_path / "d.tmp"), tmp_path / "d", facts(start="1" * 64))
    assert elsewhere.digest != first.digest


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path):
    filled(tmp_path / "artifact")
    assert find_artifact(tmp_path / "artifact") is None
    assert find_artifact(tmp_path / "nothing") is None
    with pytest.raises(RuntimeError, match=r"no manifest\.json, so the stage never finished here"):
        Artifact.open(tmp_path / "artifact")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda f: (f / "weights").write_text("weight!"), r"weights: its bytes differ from"),
        (lambda f: (f / "weights").write_text("longer weights"), r"14 bytes, expected 7"),
        (lambda f: (f / "weights").unlink(), r"weights: listed in manifest\.json but missing"),
        (lambda f: (f / "extra").write_text(""), r"extra: not listed in manifest\.json; remove"),
        (lambda f: (f / MANIFEST).write_text("{"), r"manifest\.json: not a manifest"),
        (lambda f: (f / MANIFEST).write_text("{}"), r"not a manifest \(\d+ validation errors"),
    ],
)
def test_tampering_is_named_with_the_file(tmp_path: Path, tamper, message):
    published(tmp_path)
    tamper(tmp_path / "artifact")
    with pytest.raises(RuntimeError, match=message):
        Artifact.open(tmp_path / "artifact", verify=True)


def test_a_kill_between_manifest_and_rename_leaves_nothing_published(tmp_path: Path, monkeypatch):
    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        published(tmp_path)
    assert find_artifact(tmp_path / "artifact") is None
    assert (tmp_path / "artifact.tmp" / MANIFEST).exists()


def test_a_full_disk_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(RuntimeError, match=r"No space left on device; free the disk and run again"):
        published(tmp_path)
    assert find_artifact(tmp_path / "artifact") is None


def test_nothing_is_published_over_something_or_from_nothing(tmp_path: Path):
    published(tmp_path)
    with pytest.raises(RuntimeError, match="something stands there already; move it away"):
        publish(filled(tmp_path / "again.tmp"), tmp_path / "artifact", facts())
    (tmp_path / "empty.tmp").mkdir()
    with pytest.raises(RuntimeError, match="the stage left no file for its artifact"):
        publish(tmp_path / "empty.tmp", tmp_path / "empty", facts())


def test_setting_aside_twice_keeps_both(tmp_path: Path):
    for text in ("first", "second"):
        (tmp_path / "artifact").write_text(text)
        set_aside(tmp_path / "artifact", "abcdef0123456789")
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"artifact.stale-abcdef01": "first", "artifact.stale-abcdef01-2": "second"}


def test_an_atomic_write_leaves_the_old_text_or_the_new(tmp_path: Path, monkeypatch):
    file = tmp_path / "report.json"
    write_atomic(file, "old")

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(file, "new")
    assert file.read_text() == "old"


def test_a_digest_does_not_depend_on_the_order_of_keys():
    value = {"b": [1, 2.5, None], "a": {"d": "é", "c": True}}
    assert digest_of(value) == digest_of(json.loads(json.dumps(value, sort_keys=True)))
    assert digest_of(value) != digest_of({**value, "b": [2.5, 1, None]})
