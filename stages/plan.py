"""What a recipe will do, in numbers, without doing it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from align.data.sources import DataConfig
from stages.inputs import sources_of
from stages.recipe import Recipe, Stage

Numbers = dict[str, int | str]


def derived(stage: Stage) -> Numbers:
    """Numbers that follow from a stage's config, by name.

    Steps are told where they follow from the config: from max_steps, or from rows that are
    procedural and counted by the row. How many tokens the rows of an epoch have is known when they
    are rendered.
    """
    config: Mapping[str, Any] = stage.config.model_dump()
    numbers: Numbers = {}
    prompts, rows = config.get("prompts_per_step", 0), config.get("batch_items", 0)
    if prompts:
        numbers["prompts per step"] = prompts
        numbers["responses per step"] = prompts * config["group_size"]
        numbers["optimizer steps per rollout"] = config["updates_per_rollout"]
    elif rows:
        numbers["rows per step"] = rows
    elif "batch_sequences" in config:
        numbers["sequences per step"] = config["batch_sequences"]
        numbers["tokens per step, at most"] = config["sequence_tokens"] * config["batch_sequences"]
    if config.get("max_steps"):
        numbers["steps"] = config["max_steps"]
    elif "epochs" in config:
        numbers["epochs"] = config["epochs"]
        num_rows = _num_rows([source for _, source in sources_of(stage.config)])
        if num_rows and (prompts or rows):
            numbers["steps"] = config["epochs"] * math.ceil(num_rows / (prompts or rows))
    if "steps" in numbers and "tokens per step, at most" in numbers:
        numbers["tokens, at most"] = int(numbers["steps"]) * int(
            numbers["tokens per step, at most"]
        )
    if "num_samples" in config:
        numbers["responses per prompt"] = config["num_samples"] * len(config["temperatures"])
    if "optim" in config:
        optim = config["optim"]
        last = optim["lr"] if optim["schedule"] == "constant" else optim["min_lr"]
        numbers["learning rate"] = f"{optim['lr']:g} to {last:g}, {optim['schedule']}"
    return numbers


def _num_rows(sources: list[DataConfig]) -> int:
    """Rows of an epoch, if every source is procedural; else 0."""
    if not all(source.task for source in sources):
        return 0
    counts = (min(s.num_rows, s.limit or s.num_rows) * s.weight for s in sources)
    return sum(max(1, round(count)) for count in counts)


def plan(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe with each stage's derived numbers, as JSON values."""
    numbers = {stage.name: derived(stage) for stage in recipe.stages}
    return {"resolved": recipe.resolved(), "derived": numbers}


def plan_text(recipe: Recipe) -> str:
    """The plan for a person: a few lines per stage."""
    model = recipe.head.model
    origin = model.preset or model.base or model.path or f"{model.hub}@{model.revision}"
    lines = [f"{recipe.name}: starts from {origin}", f"evals: {', '.join(recipe.evals) or 'none'}"]
    for stage in recipe.stages:
        head = stage.head
        judge = f", judged by {head.reward}" if head.reward else ""
        lines.append(f"\n{stage.name}: {head.kind} from {head.start}{judge}")
        reads = ", ".join(_origin(source) for _, source in sources_of(stage.config))
        told = [("reads", reads)] if reads else []
        told += [(name, _readable(value)) for name, value in derived(stage).items()]
        told += [("aims at", ", ".join(head.evals))] if head.evals else []
        lines += [f"  {name}: {value}" for name, value in told]
    return "\n".join(lines)


def _origin(source: DataConfig) -> str:
    share = f" x {source.weight:g}" if source.weight != 1 else ""
    return f"{source.path or source.hub or source.task or f'stage {source.from_}'}{share}"


def _readable(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value
