"""Files and hub datasets to raw records, each with its place.

Lines are decoded one by one and late, so that a broken one is a bad row with a line number and
not the end of the file.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from datasets import load_dataset
from pydantic import BaseModel, ConfigDict, Field

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz")


class NamedFile(BaseModel):
    """One file that a config reads beside its rows, or whose records are no rows of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(min_length=1)
    """File, relative to the run's base folder."""


@dataclass(frozen=True)
class Raw:
    """One record before it is understood: a line as bytes, or an object."""

    place: str
    data: Any


def parse(raw: Raw) -> Any:
    """The record's object.

    Raises:
        ValueError: if a line is not UTF-8 or not JSON, with the column.
    """
    if not isinstance(raw.data, bytes):
        return raw.data
    try:
        return json.loads(raw.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken JSON at column {error.colno}: {error.msg}; expected one object on the line"
        ) from error


def local_files(path: str, base: Path) -> list[tuple[str, Path]]:
    """Names (as the user wrote them) and paths of the files that a path, folder or glob means.

    Raises:
        ValueError: if there is none, or one is of a form that is not read.
    """
    full = base / path
    if full.is_file():
        found = [full]
    elif full.is_dir():
        found = sorted(each for each in full.iterdir() if each.name.endswith(SUFFIXES))
    else:
        found = sorted(each for each in base.glob(path) if each.is_file()) if _is_glob(path) else []
    if not found:
        raise ValueError(
            f"data.path = {path!r}: no such file, folder of {', '.join(SUFFIXES)} or glob in "
            f"{base}; check the path"
        )
    named = [(path if each == full else _shown(each, base), each) for each in found]
    for name, _ in named:
        if not name.endswith(SUFFIXES):
            raise ValueError(f"data.path = {name!r}: expected a file of {', '.join(SUFFIXES)}")
    return named


def read_file(name: str, path: Path, text_chars: int) -> Iterator[Raw]:
    """The records of one file; `name` is used in their places.

    Raises:
        ValueError: if the file as a whole cannot be read in the form that its name says.
    """
    form = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    if form == "parquet":
        yield from _parquet(name, path)
    elif form == "jsonl":
        for number, line in enumerate(_read(name, path).split(b"\n"), start=1):
            if line.strip():
                yield Raw(f"{name}:{number}", line)
    elif form == "json":
        yield from _json(name, _read(name, path))
    else:
        yield from _pieces(name, _read(name, path), text_chars)


def read_hub(dataset: str, config: str, split: str, revision: str) -> Iterator[Raw]:
    """The records of one split of a hub dataset, or of a folder that `datasets` can open.

    Raises:
        ValueError: if it cannot be loaded, with the library's reason.
    """
    place = f"{dataset}[{split}]"
    try:
        rows = load_dataset(dataset, config or None, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data.hub = {place}: datasets could not load it: {reason}") from error
    for number, row in enumerate(rows, start=1):
        yield Raw(f"{place}:{number}", dict(row))


def _read(name: str, path: Path) -> bytes:
    data = path.read_bytes()
    if not path.name.endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise ValueError(f"{name}: broken gzip file: {error}; fetch or write it again") from error


def _json(name: str, data: bytes) -> Iterator[Raw]:
    try:
        records = json.loads(data)
    except ValueError as error:
        raise ValueError(
            f"{name}: broken JSON: {error}; a file of lines is named .jsonl"
        ) from error
    if not isinstance(records, list):
        raise ValueError(f"{name}: a {type(records).__name__}, expected a list of objects")
    for number, record in enumerate(records, start=1):
        yield Raw(f"{name}[{number}]", record)


def _parquet(name: str, path: Path) -> Iterator[Raw]:
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: broken parquet file: {error}") from error
    for number, record in enumerate(table.to_pylist(), start=1):
        yield Raw(f"{name}[{number}]", record)


def _pieces(name: str, data: bytes, text_chars: int) -> Iterator[Raw]:
    """Text cut at empty lines into pieces of at least text_chars; nothing is lost between them."""
    try:
        lines = data.decode("utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start + 1} is not UTF-8") from error
    piece: list[str] = []
    size, start = 0, 1
    for number, line in enumerate(lines, start=1):
        piece.append(line)
        size += len(line)
        if text_chars and size >= text_chars and not line.strip():
            yield Raw(f"{name}:{start}", {"text": "".join(piece)})
            piece, size, start = [], 0, number + 1
    if "".join(piece).strip():
        yield Raw(f"{name}:{start}", {"text": "".join(piece)})


def _is_glob(path: str) -> bool:
    return not Path(path).is_absolute() and any(mark in path for mark in "*?[")


def _shown(path: Path, base: Path) -> str:
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
