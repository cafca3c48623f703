"""The end of a run as a table: what each stage did to each eval."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.board import Row


def eval_table(rows: Sequence[Row]) -> Table:
    """One line per stage and eval: before, after, change with its standard error.

    A stage's own eval that rose by more than two standard errors is green; any eval that fell by
    more than two is red, whether the stage aimed at it or not. A star marks a stage's own evals.
    """
    table = Table(title="Evals by stage", caption="* aim of the stage; change ± standard error")
    for name in ("stage", "eval", "metric"):
        table.add_column(name)
    for name in ("before", "after", "change", "items"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    last = ""
    for row in rows:
        if last and row.stage != last:
            table.add_section()
        words, style = verdict(row)
        change = row.change
        cells = (
            row.stage if row.stage != last else "",
            f"{row.eval}{' *' if row.is_own else ''}",
            row.result.metric,
            "-" if row.before is None else f"{row.before:.4f}",
            f"{row.result.value:.4f} ± {row.result.stderr:.4f}",
            "-" if change is None else f"{change.value:+.4f} ± {change.stderr:.4f}",
            str(row.result.num_items),
            words,
        )
        table.add_row(*(Text(cell, style=style) for cell in cells))
        last = row.stage
    return table


def verdict(row: Row) -> tuple[str, str]:
    """A word and a style for a row; the word says the same where there are no colours."""
    if row.change is None:
        return "", ""
    if row.change.is_loss:
        return "LOSS", "bold red"
    if row.change.is_gain:
        return ("gain", "green") if row.is_own else ("gain", "")
    return ("no gain", "yellow") if row.is_own else ("", "")


def as_text(table: Table) -> str:
    """The table without colours, for a file."""
    file = io.StringIO()
    Console(file=file, width=120, no_color=True).print(table)
    return file.getvalue()
