"""How commands speak: options that several share, results as text or JSON, errors of one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

USER_ERROR, WORLD_ERROR = 2, 1

RecipeFile = Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="Artifact or checkpoint folder.", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value over the file, such as sft-short.optim.lr=2e-6."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")]


def show(value: Any) -> None:
    """Prints text, a table, or plain values as JSON."""
    if isinstance(value, dict | list):
        typer.echo(json.dumps(value, indent=1, sort_keys=True))
    elif isinstance(value, str):
        typer.echo(value)
    else:
        # In a file or a pipe there is no width to fit into; 120 columns hold every table.
        console = Console()
        (console if console.is_terminal else Console(width=120)).print(value)


@contextmanager
def guarded(traceback: bool) -> Iterator[None]:
    """An error becomes one line and an exit code: 2 for what the user can mend, 1 for the world."""
    try:
        _quiet()
        yield
    except (ValueError, RuntimeError, OSError) as error:
        if traceback:
            raise
        told = str(error)
        if isinstance(error, FileNotFoundError) and error.filename:
            told = f"{error.filename}: no such file or folder; check the path"
        first, *rest = told.splitlines() or [type(error).__name__]
        more = " (more with --traceback)" if rest else ""
        typer.echo(f"error: {first}{more}", err=True)
        code = USER_ERROR if isinstance(error, ValueError) else WORLD_ERROR
        raise typer.Exit(code) from error


@contextmanager
def extra(name: str, packages: tuple[str, ...]) -> Iterator[None]:
    """Says which extra brings a package that an import did not find."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        raise RuntimeError(
            f"{error.name} is not installed; run pip install -e '.[{name}]' in the project's folder"
        ) from error


def _quiet() -> None:
    """Turns off the progress bars of loading and saving; ours say what matters."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
