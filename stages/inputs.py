"""What a stage's result depends on, and why two such lists differ, in words.

`inputs` is a JSON value; its digest decides between skip, resume and stale. What is not in it
(where the run folder stands, when it ran, how many processes, what they share) never makes a stage
stale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from align.checkpoint import SHARED_OVER
from align.data.files import NamedFile, local_files
from align.data.sources import DataConfig
from align.loop import TrainConfig
from stages.artifact import MANIFEST, Manifest, file_digest, write_atomic
from stages.document import Keys
from stages.recipe import Stage

Model = TypeVar("Model", bound=BaseModel)


def models_of(value: Any, kind: type[Model], keys: Keys = ()) -> list[tuple[Keys, Model]]:
    """Every model of one kind in a config, however deep, with the keys that lead to it."""
    if isinstance(value, kind):
        return [(keys, value)]
    if isinstance(value, BaseModel):
        # A model iterates over its fields by their own names; a recipe writes the aliases.
        named = {n: f.alias or n for n, f in type(value).model_fields.items()}
        return [s for n, inner in value for s in models_of(inner, kind, (*keys, named[n]))]
    if isinstance(value, tuple | list):
        return [s for i, inner in enumerate(value) for s in models_of(inner, kind, (*keys, i))]
    return []


def sources_of(value: Any, keys: Keys = ()) -> list[tuple[Keys, DataConfig]]:
    """Every data source in a config, as `models_of`."""
    return models_of(value, DataConfig, keys)


class FileDigests:
    """Digests of data files, kept by size and time so that a file is read once per change.

    Args:
        path: JSON file that keeps them between runs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[Any]] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, file: Path) -> str:
        """Hex sha256 of the file as it stands now."""
        status = file.stat()
        key, stamp = str(file.resolve()), [status.st_size, status.st_mtime_ns]
        if self.known.get(key, [])[:2] != stamp:
            self.known[key] = [*stamp, file_digest(file)]
            write_atomic(self.path, json.dumps(self.known, indent=1, sort_keys=True))
        return str(self.known[key][2])

    def of_config(self, config: Any, base: Path) -> dict[str, str]:
        """Digests of all local files that a config reads, by name as written in the config."""
        paths = {source.path for _, source in sources_of(config) if source.path}
        files = sorted({named for path in paths for named in local_files(path, base)})
        files += [(named.path, base / named.path) for _, named in models_of(config, NamedFile)]
        return {name: self.of(file) for name, file in files}

    def of_folder(self, folder: Path | None) -> dict[str, str]:
        """Digests of all files of a folder, by path in it; {} for None."""
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
        return {path.relative_to(folder or path).as_posix(): self.of(path) for path in files}


def stage_inputs(
    stage: Stage, parents: Mapping[str, str], data: Mapping[str, str]
) -> dict[str, Any]:
    """What the result of a stage depends on.

    Args:
        parents: digests of the artifacts it reads, by role.
        data: digests of the files it reads, by name as written in the config.
    """
    config = stage.config.model_dump(mode="json", by_alias=True)
    if stage.head.reward_url:
        # A service tells what it is only when it is asked; the URL is what is known beforehand.
        config["reward"] = stage.head.reward_url
    if isinstance(stage.config, TrainConfig):
        config["parallel"] = {k: v for k, v in config["parallel"].items() if k not in SHARED_OVER}
    return {
        "kind": stage.head.kind,
        "revision": stage.kind.revision,
        "config": config,
        "parents": dict(parents),
        "data": dict(data),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Old and new value by dotted key, only where they differ; an absent side is None.

    Example:
        >>> differences({"config": {"lr": 1, "seed": 0}}, {"config": {"lr": 2, "seed": 0}})
        {'config.lr': (1, 2)}
    """
    before, after = _flat(old), _flat(new)
    keys = sorted(before.keys() | after.keys())
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def why_stale(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    names: Mapping[str, str],
    run: Path,
) -> str:
    """Why inputs differ, in words, followed up the ladder to the value that was changed.

    Args:
        names: stage names by role, for the parents.
        run: the run folder, where parents set aside still tell what they were made of.
    """
    own: list[str] = []
    upstream: list[str] = []
    for key, (before, after) in differences(old, new).items():
        table, _, rest = key.partition(".")
        if table == "parents":
            upstream.append(_why_parent_changed(names.get(rest, rest), before, after, run))
        elif table == "data":
            own.append(f"data {rest} {_what_happened(before, after)}")
        elif table == "config":
            own.append(f"{rest} {_shown(before)} -> {_shown(after)}")
        else:
            own.append(f"{key} {_shown(before)} -> {_shown(after)}")
    reasons = own or list(dict.fromkeys(upstream)) or ["its inputs changed"]
    return ", ".join(reasons[:3]) + (f" and {len(reasons) - 3} more" if len(reasons) > 3 else "")


def _why_parent_changed(stage: str, before: str | None, after: str | None, run: Path) -> str:
    if before is None or after is None:
        return f"{stage} {_what_happened(before, after)}"
    old = _manifest_of(run / stage, before)
    new = _manifest_of(run / stage, after)
    if old is None or new is None:
        return f"{stage} changed ({before[:8]} -> {after[:8]})"
    names = {role: parent.stage for role, parent in new.parents.items()}
    reason = why_stale(old.inputs, new.inputs, names=names, run=run)
    # The root is named alone: the stages between it and here only passed the change on.
    return reason if " changed (" in reason else f"{stage} changed ({reason or 'trained again'})"


def _manifest_of(stage_folder: Path, digest: str) -> Manifest | None:
    """Manifest of the artifact with this digest, current or set aside."""
    for path in sorted(stage_folder.glob(f"artifact*/{MANIFEST}")):
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
        if manifest.digest == digest:
            return manifest
    return None


def _what_happened(before: Any, after: Any) -> str:
    if before is None:
        return "added"
    return "removed" if after is None else "changed"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key in value for k, v in _flat(value[key], f"{prefix}{key}.").items()}
    # A list of plain values is one value; a list of tables is compared table by table.
    if isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        return {k: v for i, x in enumerate(value) for k, v in _flat(x, f"{prefix}{i}.").items()}
    return {prefix[:-1]: value}


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    # 1e-5 as it is written in a recipe, not 1e-05.
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = text.replace("e-0", "e-") if isinstance(value, float) else text
    return text if len(text) <= 40 else f"{text[:37]}..."
