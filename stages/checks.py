"""Checks that need more than one part of a recipe, all in one function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.data.files import NamedFile, local_files
from align.launches import Launch, idle, misfit
from align.loop import TrainConfig
from model.config import PRESETS, preset
from stages.artifact import START
from stages.board import general_evals, needs_reward
from stages.document import Document, Keys, nearest
from stages.inputs import models_of, sources_of
from stages.recipe import BASES, MODEL, Recipe, Stage

RESERVED = (MODEL, START, "vars", "name", "seed", "precision", "sandbox", "evals", "stages")
UNKNOWN = Launch()
# What a stage makes of sampled rows: a sample stage's `make` has to be the same.
ROWS_FOR = {"sft": "sft", "dpo": "dpo", "reward": "dpo"}


def parents_of(stage: Stage) -> dict[str, str]:
    """Names of the stages that a stage reads, by role.

    Example roles: `start`, `reward`, and for rows the name of the stage that sampled them.
    """
    head = stage.head
    rows = [source.from_ for _, source in sources_of(stage.config) if source.from_]
    rewards = {"reward": head.reward_stage} if head.reward_stage else {}
    return {START: head.start} | rewards | {name: name for name in rows}


def cross_check(
    recipe: Recipe, base: Path, *, with_files: bool = True, launch: Launch = UNKNOWN
) -> None:
    """Checks what no single value shows: references, files, names.

    Args:
        base: folder that relative paths are resolved against.
        with_files: False leaves out whether data files and checkpoints exist.
        launch: of the run, whose processes share rows and experts.

    Raises:
        ConfigError: one line with place, key, value and remedy.
    """
    _check_names(recipe)
    _check_cycles(recipe)
    for stage in recipe.stages:
        _check_references(recipe, stage)
    _check_evals(recipe)
    _check_model(recipe, base, with_files)
    experts = _experts(recipe, base)
    for stage in recipe.stages:
        _check_launch(recipe, stage, launch, experts)
    document = recipe.document
    evals = enumerate(recipe.evals.values())
    parts: list[tuple[Keys, Any]] = [((MODEL,), recipe.head.model)]
    parts += [(("evals", index), config) for index, config in evals]
    parts += [(("stages", stage.index), stage.config) for stage in recipe.stages]
    for keys, config in parts:
        for inner, source in sources_of(config, keys):
            if with_files and source.path:
                _check_file(document, (*inner, "path"), source.path, base)
        for inner, named in models_of(config, NamedFile, keys):
            if with_files and not (base / named.path).is_file():
                raise document.error((*inner, "path"), "no such file; check the path")


def _check_file(document: Document, keys: Keys, path: str, base: Path) -> None:
    try:
        local_files(path, base)
    except ValueError as error:
        raise document.error(keys, str(error).partition(": ")[2]) from error


def _check_names(recipe: Recipe) -> None:
    seen: dict[str, int] = {}
    for stage in recipe.stages:
        keys = ("stages", stage.index, "name")
        if stage.name in seen:
            first = recipe.document.place(("stages", seen[stage.name], "name"))
            raise recipe.document.error(
                keys, f"a stage of this name stands at {first}; give one another name"
            )
        is_role = stage.name == "reward" and stage.kind.gives != "reward"
        if stage.name in RESERVED or is_role:
            raise recipe.document.error(keys, "this name has a meaning of its own; choose another")
        seen[stage.name] = stage.index


def _check_cycles(recipe: Recipe) -> None:
    parents = {stage.name: list(parents_of(stage).values()) for stage in recipe.stages}
    for stage in recipe.stages:
        path = _path_back(stage.name, stage.name, parents, ())
        if path:
            raise recipe.document.error(
                ("stages", stage.index, "from"),
                f"the stages go in a circle: {' <- '.join(path)}; start one of them from {MODEL}",
            )


def _path_back(
    name: str, goal: str, parents: dict[str, list[str]], path: tuple[str, ...]
) -> tuple[str, ...]:
    if name in path:
        return (*path, name) if name == goal else ()
    found = (_path_back(p, goal, parents, (*path, name)) for p in parents.get(name, []))
    return next((way for way in found if way), ())


def _check_references(recipe: Recipe, stage: Stage) -> None:
    keys: Keys = ("stages", stage.index)
    if stage.wants_trl and stage.kind.run_trl is None:
        raise recipe.document.error(
            (*keys, "backend"),
            f"kind {stage.head.kind} cannot run on TRL; use backend: native",
        )
    if stage.head.start != MODEL:
        _check_parent(recipe, stage, (*keys, "from"), stage.head.start, gives="policy")
    if stage.head.reward:
        if not stage.kind.takes_reward:
            raise recipe.document.error(
                (*keys, "reward"), f"a stage of kind {stage.head.kind} has no judge; remove the key"
            )
        if stage.head.reward_stage:
            _check_parent(recipe, stage, (*keys, "reward"), stage.head.reward, gives="reward")
    for inner, source in sources_of(stage.config, keys):
        if source.from_:
            parent = _check_parent(recipe, stage, (*inner, "from"), source.from_, gives="rows")
            wanted = ROWS_FOR.get(stage.head.kind, "")
            made = parent.config.model_dump().get("make", "")
            if wanted and made != wanted:
                raise recipe.document.error(
                    (*inner, "from"),
                    f"that stage has make: {made}, but kind {stage.head.kind} reads "
                    f"make: {wanted}; change one",
                )


def _check_parent(recipe: Recipe, stage: Stage, keys: Keys, name: str, *, gives: str) -> Stage:
    document = recipe.document
    fitting = [s.name for s in recipe.stages if s.kind.gives == gives and s.name != stage.name]
    known = {s.name: s for s in recipe.stages}
    words = {"policy": "trains a policy", "reward": "is a reward stage", "rows": "samples rows"}
    if name not in known:
        raise document.error(keys, f"no stage has this name; {nearest(name, fitting)}")
    parent = known[name]
    if parent.kind.gives != gives:
        raise document.error(
            keys,
            f"this stage is of kind {parent.head.kind}, expected one that {words[gives]}; "
            f"{_choices(fitting)}",
        )
    if parent.index > stage.index:
        raise document.error(
            keys, f"this stage stands below {stage.name}; move {stage.name} behind it"
        )
    return parent


def _choices(names: list[str]) -> str:
    return f"choose from: {', '.join(names)}" if names else "the recipe has none yet; add one"


def _check_evals(recipe: Recipe) -> None:
    has_reward = any(stage.kind.gives == "reward" for stage in recipe.stages)
    for index, config in enumerate(recipe.evals.values()):
        if needs_reward(config) and not has_reward:
            raise recipe.document.error(
                ("evals", index, "judge"),
                "no stage of the recipe gives a reward model; add one or use judge: verifier",
            )
    for stage in recipe.stages:
        for index, name in enumerate(stage.head.evals):
            if name not in recipe.evals:
                raise recipe.document.error(
                    ("stages", stage.index, "evals", index),
                    f"no eval of the recipe has this name; {nearest(name, recipe.evals)}",
                )
    _check_first_asked(recipe)


def _check_first_asked(recipe: Recipe) -> None:
    """An eval's `from` is a policy's, means something, and leaves no aim without a number before
    it."""
    general = general_evals(recipe)
    policies = [stage.name for stage in recipe.stages if stage.kind.gives == "policy"]
    for index, (name, first) in enumerate(recipe.asked_from.items()):
        keys: Keys = ("evals", index, "from")
        if first != MODEL and first not in policies:
            raise recipe.document.error(
                keys, f"no stage of this name trains a policy; {nearest(first, policies)}"
            )
        if first != MODEL and name not in general:
            raise recipe.document.error(
                keys, "this eval runs on the stages that aim at it only; remove the key"
            )
    for stage in recipe.stages:
        for index, name in enumerate(stage.head.evals):
            if name in general and not recipe.is_asked(name, stage.head.start):
                raise recipe.document.error(
                    ("stages", stage.index, "evals", index),
                    f"is asked from {recipe.asked_from[name]} on, so {stage.head.start} has no "
                    f"number to rise from; set the eval's `from` to {stage.head.start}",
                )


def _check_model(recipe: Recipe, base: Path, with_files: bool) -> None:
    config, document = recipe.head.model, recipe.document
    shipped = [path.name for path in BASES.iterdir()] if BASES.exists() else []
    if config.preset and config.preset not in PRESETS:
        raise document.error(
            (MODEL, "preset"), f"no such preset; {nearest(config.preset, PRESETS)}"
        )
    if config.base and with_files and config.base not in shipped:
        raise document.error((MODEL, "base"), f"no such base; {nearest(config.base, shipped)}")
    for keys, folder, file in (
        ((MODEL, "path"), config.path, "config.json"),
        ((MODEL, "tokenizer", "path"), _tokenizer_path(document), "tokenizer.json"),
    ):
        if folder and with_files and not (base / folder / file).is_file():
            raise document.error(keys, f"no {file} in this folder; expected a saved checkpoint")


def _check_launch(recipe: Recipe, stage: Stage, launch: Launch, experts: tuple[int, int]) -> None:
    if not isinstance(stage.config, TrainConfig):
        return
    num_experts, width = experts
    found = misfit(stage.config, launch, num_experts=num_experts, expert_width=width)
    if found:
        keys = found[0].split(".")
        raise recipe.document.error(("stages", stage.index, *keys), found[1])


def _experts(recipe: Recipe, base: Path) -> tuple[int, int]:
    """Experts a layer of the recipe's model and their width; 0 if not known on this machine."""
    config = recipe.head.model
    if config.preset:
        shape = preset(config.preset)
        return int(shape.num_local_experts), int(shape.intermediate_size)
    folder = config.folder(base)
    file = folder / "config.json" if folder else None
    if file is None or not file.is_file():
        return 0, 0
    told = json.loads(file.read_text(encoding="utf-8"))
    return int(told.get("num_local_experts", 0)), int(told.get("intermediate_size", 0))


def idle_processes(recipe: Recipe, launch: Launch) -> list[str]:
    """A line for each stage whose steps have fewer microbatches than processes."""
    told = {
        stage.name: idle(stage.config, launch)
        for stage in recipe.stages
        if isinstance(stage.config, TrainConfig)
    }
    return [f"{name}: {line}" for name, line in told.items() if line]


def _tokenizer_path(document: Document) -> str:
    tokenizer = document.data[MODEL].get("tokenizer") or {}
    return str(tokenizer.get("path", ""))
