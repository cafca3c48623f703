"""The end table: green for a stage's own gain, red for any loss, nothing hidden."""

from __future__ import annotations

from dataclasses import replace

import pytest

from align.evals.types import EvalResult, compare
from stages.board import Row
from stages.table import as_text, eval_table, verdict


def row(before: list[float], after: list[float], *, is_own: bool, higher: bool = True) -> Row:
    old, new = (
        replace(EvalResult.from_items("math", "accuracy", items), higher_is_better=higher)
        for items in (before, after)
    )
    return Row("sft", "math", old.value, new, compare(old, new), is_own)


LOW, HIGH, MIXED = [0.0] * 20, [1.0] * 20, [0.0, 1.0] * 10


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (row(LOW, HIGH, is_own=True), ("gain", "green")),
        (row(LOW, HIGH, is_own=False), ("gain", "")),
        (row(HIGH, LOW, is_own=False), ("LOSS", "bold red")),
        (row(HIGH, LOW, is_own=True), ("LOSS", "bold red")),
        (row(LOW, HIGH, is_own=False, higher=False), ("LOSS", "bold red")),
        (row(MIXED, MIXED, is_own=True), ("no gain", "yellow")),
        (row(MIXED, MIXED[::-1], is_own=False), ("", "")),
        (Row("rm", "pairs", None, EvalResult.from_items("p", "a", HIGH), None, True), ("", "")),
    ],
)
def test_the_verdict_follows_two_standard_errors(found: Row, expected: tuple[str, str]):
    assert verdict(found) == expected


def test_the_text_holds_every_number():
    text = as_text(eval_table([row(LOW, MIXED, is_own=True)]))
    for part in ("sft", "math *", "0.0000", "0.5000", "+0.5000", "20", "gain"):
        assert part in text
