"""Rows that an eval may use: only those that no stage of the project trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from align.data.records import Kind
from align.data.rows import Row
from align.data.sources import DataConfig, read_source
from align.evals.types import Context

RowType = TypeVar("RowType", bound=Row)

TRAINING_ONLY = ("weight", "too_long")


def check_held_out(source: DataConfig) -> DataConfig:
    """The source itself, if an eval may read it.

    Raises:
        ValueError: if its split may have been trained on, or a key means nothing to an eval.
    """
    good = ("dev",) if source.task else ("dev", "all")
    if source.split not in good:
        raise ValueError(
            f"data {source.label}: split = {source.split!r}, expected {' or '.join(good)} in an "
            "eval; the rest may have been trained on"
        )
    if unused := [key for key in TRAINING_ONLY if key in source.model_fields_set]:
        raise ValueError(
            f"data {source.label}: {unused[0]} is for training, an eval reads every row once; "
            "remove it"
        )
    return source


HeldOut = Annotated[DataConfig, AfterValidator(check_held_out)]


def read_held_out(
    sources: Sequence[DataConfig],
    row_type: type[RowType] | tuple[type[RowType], ...],
    *,
    kind: Kind,
    name: str,
    context: Context,
) -> tuple[list[RowType], dict[str, float]]:
    """Rows of all sources in order, and how many were skipped by their own leave.

    Raises:
        ValueError: if a row is not of the wanted type, or there are fewer than two.
    """
    rows: list[RowType] = []
    skipped = 0
    for source in sources:
        found, report = read_source(
            source, base=context.base, inputs=context.inputs, seed=context.seed, kind=kind
        )
        skipped += report.skipped
        for row in found:
            if not isinstance(row, row_type):
                raise ValueError(
                    f"eval {name}: {row.origin} is a {type(row).__name__}, expected {kind} rows; "
                    "set `as` on this source, or use another kind of eval"
                )
            rows.append(row)
    if len(rows) < 2:
        raise ValueError(f"eval {name}: {len(rows)} rows, expected two or more")
    return rows, {"skipped": float(skipped)} if skipped else {}
