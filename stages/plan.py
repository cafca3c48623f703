"""What a recipe will do, in numbers, without doing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from stages.inputs import sources_of
from stages.recipe import Recipe, Stage


def derived(stage: Stage) -> dict[str, int | str]:
    """Numbers that follow from a stage's config, by name.

    What depends on the rows (steps of an epoch, tokens in all) is known when they are rendered; a
    stage with max_steps tells it here.
    """
    config: Mapping[str, Any] = stage.config.model_dump()
    numbers: dict[str, int | str] = {}
    prompts = config.get("prompts_per_step", 0)
    if prompts:
        numbers["prompts per step"] = prompts
        numbers["responses per step"] = prompts * config["group_size"]
    if config.get("batch_items"):
        numbers["rows per step"] = config["batch_items"]
    elif "batch_sequences" in config and not prompts:
        numbers["sequences per step"] = config["batch_sequences"]
        numbers["tokens per step"] = config["sequence_tokens"] * config["batch_sequences"]
    if config.get("max_steps"):
        numbers["steps"] = config["max_steps"]
        if "tokens per step" in numbers:
            numbers["tokens, at most"] = config["max_steps"] * int(numbers["tokens per step"])
    elif "epochs" in config:
        numbers["epochs"] = config["epochs"]
    optim = config.get("optim")
    if optim:
        numbers["learning rate"] = f"{optim['lr']:g} -> {_last_lr(optim):g}, {optim['schedule']}"
    return numbers


def _last_lr(optim: Mapping[str, Any]) -> float:
    return optim["lr"] if optim["schedule"] == "constant" else optim["min_lr"]


def plan(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe with each stage's derived numbers, as JSON values."""
    numbers = {stage.name: derived(stage) for stage in recipe.stages}
    return {"resolved": recipe.resolved(), "derived": numbers}


def plan_table(recipe: Recipe) -> Table:
    """One line per stage: where it starts, what it reads, its derived numbers."""
    table = Table(title=f"Plan of {recipe.name}")
    for name in ("stage", "kind", "from", "judge", "reads", "numbers", "aims at"):
        table.add_column(name, overflow="fold")
    for stage in recipe.stages:
        sources = [source for _, source in sources_of(stage.config)]
        reads = [s.path or s.hub or s.task or f"stage {s.from_}" for s in sources]
        numbers = [f"{name}: {_readable(value)}" for name, value in derived(stage).items()]
        table.add_row(
            stage.name,
            stage.head.kind,
            stage.head.start,
            stage.head.reward,
            "\n".join(reads),
            "\n".join(numbers),
            "\n".join(stage.head.evals),
        )
    return table


def _readable(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value
