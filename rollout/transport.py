"""A stream of weights between processes by way of files; `broadcast.py` is the other way.

    version-00000007/
        weights-00001.safetensors    shards of bounded size
        push.json                    version, what it holds, file and checksum of each tensor

A folder is written under a temporary name and renamed once whole, so a reader sees all or nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rollout.sync import Stream, checksums

PUSH = "push.json"
PREFIX = "version-"
TEMPORARY = ".writing-"
SHARD_BYTES = 4 << 30

Holds = Literal["weights", "adapter"]


@dataclass(frozen=True)
class Push:
    """What a folder of weights says of itself.

    Args:
        version: of the weights.
        holds: all weights, or an adapter to the base that the engine opened.
        adapter: peft's config of the adapter; empty for weights.
        files: file by tensor name, in the order of the stream.
        checksums: as `rollout.sync.checksums` of what was sent.
    """

    version: int
    holds: Holds
    files: Mapping[str, str]
    checksums: Mapping[str, str]
    adapter: Mapping[str, Any] = field(default_factory=dict)


def write_weights(
    folder: Path,
    stream: Stream,
    *,
    version: int,
    holds: Holds = "weights",
    adapter: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    keep: int = 2,
) -> Path:
    """Writes a stream as folder/version-N, whole or not at all; returns its path.

    Needs the host memory of one shard, or of one tensor that is larger.

    Args:
        keep: newest versions that stay; a worker may still read the one before.

    Raises:
        OSError: if it cannot be written; what was there before stays.
    """
    final = folder / f"{PREFIX}{version:08d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files: dict[str, str] = {}
    sums: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        name = f"weights-{len(set(files.values())) + 1:05d}.safetensors"
        save_file(shard, temporary / name)
        files.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    try:
        for name, tensor in stream:
            if shard and size + tensor.nbytes > shard_bytes:
                flush()
            sums |= checksums([(name, tensor)])
            # a copy: safetensors refuses tensors that share memory, as tied weights do
            shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
            size += tensor.nbytes
        flush()
        push = Push(version, holds, files, sums, adapter or {})
        (temporary / PUSH).write_text(json.dumps(asdict(push)), encoding="utf-8")
        for path in temporary.iterdir():
            _flush_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in sorted(path for path in folder.glob(f"{PREFIX}*") if path != final)[
        : -keep + 1 or None
    ]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_push(folder: Path) -> Push:
    """What a folder of weights says of itself.

    Raises:
        ValueError: if it is no such folder, or was not written whole.
    """
    try:
        return Push(**json.loads((folder / PUSH).read_text(encoding="utf-8")))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder}: no whole {PUSH} ({error}); expected a folder that write_weights made"
        ) from error


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The stream that was written, one tensor in memory at a time.

    Raises:
        ValueError: as `read_push`, or a file is missing.
    """
    push = read_push(folder)
    for file in dict.fromkeys(push.files.values()):
        try:
            opened = safe_open(folder / file, framework="pt")
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder / file}: {error}; push the weights again") from error
        with opened as tensors:
            for name in (name for name, where in push.files.items() if where == file):
                yield name, tensors.get_tensor(name)
