"""What a finished stage leaves: a folder whose last written file says what is in it.

An artifact is filled in a temporary folder beside its place, then gets its manifest, then appears
in one rename. So a folder without a manifest was never finished, and one that differs from its
manifest was touched afterwards; neither is ever used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MANIFEST = "manifest.json"
START = "start"
PACKAGES = ("hybrid-align", "torch", "transformers", "accelerate", "peft", "trl", "tokenizers")


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    """Hex digest of the bytes."""
    size_bytes: int
    """Length of the file."""


class Parent(BaseModel):
    """An artifact that another was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    """Stage that made it, or `model`."""
    digest: str
    """Of the artifact."""


class Manifest(BaseModel):
    """Says what an artifact is, what it was made of and what came out; written last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    """Version of this file's own form."""
    stage: str
    """Name of the stage that made it."""
    kind: str
    """Kind of that stage."""
    gives: str
    """What the folder holds: policy, reward, rows or report."""
    digest: str
    """Of the files' bytes and of the policy they started from."""
    inputs: dict[str, Any]
    """Everything that the result depends on: config, parents' digests, data files' digests."""
    inputs_digest: str
    """Of `inputs`."""
    parents: dict[str, Parent]
    """Artifacts it was made from, by role (`start`, `reward`, or a stage's name)."""
    files: dict[str, FileEntry]
    """Every file of the folder but this one, by relative path."""
    data: list[dict[str, Any]] = Field(default_factory=list)
    """Sources with place, licence, rows and tokens."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Final numbers of the stage."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Packages that it was made with."""
    created: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> Artifact:
        """The artifact of a folder, its files' presence and sizes checked.

        Args:
            verify: also read every byte and compare digests.

        Raises:
            RuntimeError: no manifest, a broken one, or files that differ from it.
        """
        path = folder / MANIFEST
        try:
            manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RuntimeError(
                f"{folder}: no {MANIFEST}, so the stage never finished here; run it again"
            ) from None
        except (ValidationError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise RuntimeError(
                f"{path}: not a manifest ({first}); move the folder away and run the stage again"
            ) from error
        _compare(folder, manifest, verify)
        return cls(folder, manifest)


def find_artifact(folder: Path) -> Artifact | None:
    """The artifact of a folder, or None where nothing finished stands.

    Raises:
        RuntimeError: a manifest stands there but is broken or does not fit the files.
    """
    return Artifact.open(folder) if (folder / MANIFEST).exists() else None


def _compare(folder: Path, manifest: Manifest, verify: bool) -> None:
    found = {name: folder / name for name in _listed(folder)}
    for name in sorted(set(manifest.files) | set(found)):
        remedy = "move the folder away and run the stage again"
        if name not in found:
            raise RuntimeError(f"{folder / name}: listed in {MANIFEST} but missing; {remedy}")
        if name not in manifest.files:
            raise RuntimeError(f"{folder / name}: not listed in {MANIFEST}; remove it")
        entry, size = manifest.files[name], found[name].stat().st_size
        if size != entry.size_bytes:
            raise RuntimeError(
                f"{folder / name}: {size} bytes, expected {entry.size_bytes}; {remedy}"
            )
        if verify and file_digest(found[name]) != entry.sha256:
            raise RuntimeError(f"{folder / name}: its bytes differ from {MANIFEST}; {remedy}")


@dataclass(frozen=True)
class Facts:
    """What the runner knows of an artifact before its bytes are counted; as in `Manifest`."""

    stage: str
    kind: str
    gives: str
    inputs: Mapping[str, Any]
    parents: Mapping[str, Parent]
    data: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


def publish(temporary: Path, folder: Path, facts: Facts) -> Artifact:
    """Turns a filled temporary folder into the artifact `folder`, in one rename.

    Args:
        temporary: folder on the same file system, holding the files.
        folder: where the artifact shall appear; nothing may stand there.
        facts: for the manifest.

    Raises:
        RuntimeError: something stands at `folder`, the temporary folder is empty, or the disk
            refuses (full, read-only).
    """
    if folder.exists():
        raise RuntimeError(f"{folder}: something stands there already; move it away first")
    names = _listed(temporary)
    if not names:
        raise RuntimeError(f"{temporary}: the stage left no file for its artifact")
    files = {
        name: FileEntry(
            sha256=file_digest(temporary / name), size_bytes=(temporary / name).stat().st_size
        )
        for name in names
    }
    start = [parent.digest for role, parent in facts.parents.items() if role == START]
    manifest = Manifest(
        stage=facts.stage,
        kind=facts.kind,
        gives=facts.gives,
        digest=digest_of([start, {name: entry.sha256 for name, entry in files.items()}]),
        inputs=dict(facts.inputs),
        inputs_digest=digest_of(facts.inputs),
        parents=dict(facts.parents),
        files=files,
        data=[dict(source) for source in facts.data],
        metrics=dict(facts.metrics),
        versions=dict(facts.versions),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        for name in names:
            _sync(temporary / name)
        write_atomic(temporary / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        for inner in (path for path in temporary.rglob("*") if path.is_dir()):
            _sync(inner)
        _sync(temporary)
        os.rename(temporary, folder)
        _sync(folder.parent)
    except OSError as error:
        raise RuntimeError(
            f"{folder}: cannot be published: {error.strerror}; free the disk and run again, the "
            "stage goes on from its last checkpoint"
        ) from error
    return Artifact(folder, manifest)


def set_aside(path: Path, digest: str) -> Path:
    """Renames a file or folder to `<name>.stale-<digest8>`; nothing is ever deleted.

    Returns: where it stands now.
    """
    aside = path.with_name(f"{path.name}.stale-{digest[:8]}")
    again = 1
    while aside.exists():
        again += 1
        aside = path.with_name(f"{path.name}.stale-{digest[:8]}-{again}")
    path.rename(aside)
    return aside


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Hex digest of a JSON value, whatever the order of its keys.

    Example:
        >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
        True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _listed(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return sorted(name for name in names if name != MANIFEST)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def package_versions() -> dict[str, str]:
    """Versions of the packages that shape a result, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
