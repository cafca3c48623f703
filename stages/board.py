"""What every eval says of every policy of a run, measured once each and kept.

A result is kept by what it depends on: the policy, its parent, the eval's config, the files and
artifacts that it reads and the seed. So a second run of a finished recipe measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.evals.types import Change, EvalResult, compare
from stages.artifact import Artifact, digest_of, write_atomic
from stages.inputs import FileDigests, sources_of
from stages.recipe import MODEL, Recipe, dump_json

RunEval = Callable[..., EvalResult]


@dataclass(frozen=True)
class Finished:
    """An artifact of the run and the folder to read it from.

    The folder is another than the artifact's own where the recipe's model stands elsewhere.
    """

    artifact: Artifact
    folder: Path


@dataclass(frozen=True)
class Row:
    """One line of the table: what a stage did to one eval.

    Args:
        before: the parent's value or the eval's baseline; None where there is neither.
        change: paired difference; None where there is no before.
        is_own: the stage names this eval as its aim.
    """

    stage: str
    eval: str
    before: float | None
    result: EvalResult
    change: Change | None
    is_own: bool

    def resolved(self) -> dict[str, Any]:
        """As JSON values."""
        change = self.change
        return {
            "stage": self.stage,
            "eval": self.eval,
            "metric": self.result.metric,
            "before": self.before,
            "after": self.result.value,
            "after_stderr": self.result.stderr,
            "num_items": self.result.num_items,
            "change": None if change is None else change.value,
            "change_stderr": None if change is None else change.stderr,
            "is_gain": change is not None and change.is_gain,
            "is_loss": change is not None and change.is_loss,
            "is_own": self.is_own,
        }


class Board:
    """Runs the recipe's evals on finished artifacts and remembers the results.

    Args:
        recipe: names the evals and who aims at which.
        folder: where results are kept, one JSON file each.
        base: folder that relative data paths are resolved against.
        run_eval: `align.evals.run_eval`.
        digests: of data files.
        say: told before each measurement.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        base: Path,
        run_eval: RunEval,
        digests: FileDigests,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.folder, self.base = recipe, folder, base
        self.run_eval, self.digests, self.say = run_eval, digests, say
        self.results: dict[tuple[str, str], EvalResult] = {}

    def measure(self, finished: Mapping[str, Finished]) -> None:
        """Runs what is due and can run by now; kept results are read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, artifact in finished.items():
            for config in self._due(name):
                if (name, config.name) in self.results:
                    continue
                inputs = self._inputs(name, finished)
                if "reward" in inputs or not needs_reward(config):
                    result = self._result(name, config, artifact, finished, inputs)
                    self.results[name, config.name] = result

    def rows(self) -> list[Row]:
        """The table, stage by stage in the recipe's order, evals in the recipe's order."""
        found = []
        for stage in self.recipe.stages:
            for name in self.recipe.evals:
                result = self.results.get((stage.name, name))
                if result is None:
                    continue
                parent = self.results.get((stage.head.start, name))
                parent = parent if stage.kind.gives == "policy" else None
                before = parent.value if parent else None
                before = before if result.baseline is None else result.baseline
                change = None if before is None else compare(parent, result)
                is_own = name in stage.head.evals
                found.append(Row(stage.name, name, before, result, change, is_own))
        return found

    def _due(self, name: str) -> list[Any]:
        """Evals that run on a stage: those it aims at, and on a policy the general ones from where
        they begin."""
        recipe = self.recipe
        due = set() if name == MODEL else set(recipe.stage(name).head.evals)
        if name == MODEL or recipe.stage(name).kind.gives == "policy":
            due |= {n for n in general_evals(recipe) if recipe.is_asked(n, name)}
        return [config for key, config in recipe.evals.items() if key in due]

    def _inputs(self, name: str, finished: Mapping[str, Finished]) -> dict[str, str]:
        """Stages by role that an eval of this one may read; the stage's own judge comes first."""
        own = "" if name == MODEL else self.recipe.stage(name).head.reward_stage
        rewards = [s.name for s in self.recipe.stages if s.kind.gives == "reward"]
        judges = [stage for stage in [own, *reversed(rewards)] if stage in finished]
        rows = {s.name: s.name for s in self.recipe.stages if s.kind.gives == "rows"}
        roles = {role: stage for role, stage in rows.items() if stage in finished}
        return roles | ({"reward": judges[0]} if judges else {})

    def _result(
        self,
        name: str,
        config: Any,
        policy: Finished,
        finished: Mapping[str, Finished],
        inputs: Mapping[str, str],
    ) -> EvalResult:
        start = None if name == MODEL else self.recipe.stage(name).head.start
        parent = finished[start] if start is not None else None
        used = {source.from_ for _, source in sources_of(config)}
        used |= {"reward"} if needs_reward(config) else set()
        read = {role: finished[stage] for role, stage in inputs.items() if role in used}
        key = {
            "eval": config.model_dump(mode="json", by_alias=True),
            "policy": policy.artifact.digest,
            "parent": parent.artifact.digest if parent else "",
            "inputs": {role: found.artifact.digest for role, found in read.items()},
            "data": self.digests.of_config(config, self.base),
            "seed": self.recipe.head.seed,
        }
        file = self.folder / f"{name}.{config.name}.{digest_of(key)[:12]}.json"
        if file.exists():
            return EvalResult.from_json(json.dumps(json.loads(file.read_text())["result"]))
        self.say(f"eval {config.name} on {name}")
        result = self.run_eval(
            config,
            policy=policy.folder,
            parent=parent.folder if parent else None,
            inputs={role: found.folder for role, found in read.items()},
            base=self.base,
            seed=self.recipe.head.seed,
            sandbox=self.recipe.head.sandbox,
        )
        kept = {"stage": name, "key": key, "result": json.loads(result.to_json())}
        write_atomic(file, dump_json(kept))
        return result


def general_evals(recipe: Recipe) -> set[str]:
    """Names of the evals that every policy can be asked.

    An eval of reward models, or one that compares a policy with its parent, speaks about the stages
    that aim at it and runs on no other.
    """
    stages = recipe.stages
    of_rewards = {n for s in stages if s.kind.gives == "reward" for n in s.head.evals}
    of_rewards -= {n for s in stages if s.kind.gives == "policy" for n in s.head.evals}
    return {n for n, config in recipe.evals.items() if not config.is_relative} - of_rewards


def needs_reward(config: Any) -> bool:
    """Whether an eval is judged by the run's reward model.

    Read from the config's values: which kinds of eval exist is known to `align.evals` alone.
    """
    return config.model_dump().get("judge") == "reward"
