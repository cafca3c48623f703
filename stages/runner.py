"""Climbs a recipe: each stage is skipped, resumed or run, published, and measured.

Every process calls `climb`; the main one writes and talks, the others wait for what it decided.
Nothing trained is deleted: what no longer fits its inputs is renamed to `*.stale-<digest8>`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from align.course import Job
from serving.keys import key_of
from stages.artifact import (
    START,
    Artifact,
    Facts,
    Parent,
    digest_of,
    find_artifact,
    package_versions,
    publish,
    set_aside,
    write_atomic,
)
from stages.board import Board, Finished, Row, RunEval
from stages.checks import parents_of
from stages.inputs import FileDigests, stage_inputs, why_stale
from stages.lock import locked
from stages.recipe import MODEL, ModelConfig, Recipe, Stage, dump_json
from stages.spmd import lead
from stages.table import as_text, eval_table

Status = Literal["fresh", "resumed", "skipped"]
MakeStart = Callable[[ModelConfig, Path, Path], Path]
ORIGIN = "origin.json"


@dataclass(frozen=True)
class Ground:
    """Where and with what a run works.

    Args:
        run: the run folder.
        base: folder that relative data paths are resolved against.
        accelerator: owns devices and processes.
        run_eval: `align.evals.run_eval`.
        make_start: fills a folder with the recipe's first policy and gives the folder to read it
            from (`stages.start.make_start`).
        say: told what happens, in the main process only.
    """

    run: Path
    base: Path
    accelerator: Accelerator
    run_eval: RunEval
    make_start: MakeStart
    say: Callable[[str], None]


@dataclass(frozen=True)
class StageReport:
    """What became of one stage in this run.

    Args:
        why: why an earlier result was not good any more; "" if there was none or it was.
        wall_s: time of the stage itself, without its evals.
    """

    name: str
    kind: str
    status: Status
    why: str
    digest: str
    wall_s: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """A whole run: its stages, and what each did to each eval."""

    recipe: str
    stages: tuple[StageReport, ...]
    rows: tuple[Row, ...] = field(default=())

    def resolved(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "recipe": self.recipe,
            "stages": [asdict(stage) for stage in self.stages],
            "evals": [row.resolved() for row in self.rows],
        }


@dataclass(frozen=True)
class Decision:
    """What stands in a stage's folder, and so what to do."""

    status: Status
    why: str = ""
    artifact: Artifact | None = None


def climb(recipe: Recipe, ground: Ground, *, until: str = "") -> Report:
    """Runs a checked recipe, or what of it is not done yet.

    Args:
        until: name of the last stage to run; "" runs all.

    Returns: the report that also stands in `run/report.json` and, as a table, `run/table.txt`.

    Raises:
        ValueError: `until` names no stage.
        RuntimeError: another run holds the folder, or something there was tampered with.
    """
    last = recipe.stage(until).index if until else len(recipe.stages) - 1
    accelerator, run = ground.accelerator, ground.run
    with contextlib.ExitStack() as stack:
        lead(accelerator, lambda: run.mkdir(parents=True, exist_ok=True))
        lead(accelerator, lambda: stack.enter_context(locked(run)))
        lead(accelerator, lambda: write_atomic(run / "recipe.json", dump_json(recipe.resolved())))
        climber = _Climber(recipe, ground)
        climber.start()
        for stage in recipe.stages[: last + 1]:
            climber.climb(stage)
        return climber.report()


class _Climber:
    """The state of one climb; every process has one, and all agree."""

    def __init__(self, recipe: Recipe, ground: Ground) -> None:
        self.recipe, self.ground = recipe, ground
        self.digests = FileDigests(ground.run / "digests.json")
        self.finished: dict[str, Finished] = {}
        self.reports: list[StageReport] = []
        self.board = Board(
            recipe,
            ground.run / "evals",
            base=ground.base,
            run_eval=ground.run_eval,
            digests=self.digests,
            say=ground.say,
        )

    def start(self) -> None:
        """The recipe's own model, made or found."""
        self.finished[MODEL] = lead(self.ground.accelerator, self._start)
        lead(self.ground.accelerator, self._measure)

    def climb(self, stage: Stage) -> None:
        """One stage, then the evals that became due."""
        accelerator, began = self.ground.accelerator, time.monotonic()
        parents = {
            role: Parent(stage=name, digest=self.finished[name].artifact.digest)
            for role, name in parents_of(stage).items()
        }
        folder = self.ground.run / stage.name
        inputs = lead(accelerator, lambda: self._inputs(stage, parents))
        decision = lead(accelerator, lambda: self._decide(stage.name, folder, inputs, parents))
        metrics: Mapping[str, float] = {}
        artifact = decision.artifact
        if artifact is None:
            temporary = folder / "artifact.tmp"
            outcome = stage.run(self._job(stage, temporary))
            accelerator.wait_for_everyone()
            metrics = outcome.metrics
            facts = Facts(
                stage=stage.name,
                kind=stage.head.kind,
                gives=stage.kind.gives,
                inputs=inputs,
                parents=parents,
                data=outcome.data,
                metrics=outcome.metrics,
                versions=package_versions(),
            )
            artifact = lead(accelerator, lambda: publish(temporary, folder / "artifact", facts))
        self.finished[stage.name] = Finished(artifact, artifact.folder)
        self.reports.append(
            StageReport(
                name=stage.name,
                kind=stage.head.kind,
                status=decision.status,
                why=decision.why,
                digest=artifact.digest,
                wall_s=round(time.monotonic() - began, 3),
                metrics=metrics or artifact.manifest.metrics,
            )
        )
        lead(accelerator, self._measure)

    def report(self) -> Report:
        """The report as it stands; written by `_measure` after every stage."""
        return Report(self.recipe.name, tuple(self.reports), tuple(self.board.rows()))

    def _inputs(self, stage: Stage, parents: Mapping[str, Parent]) -> dict[str, Any]:
        digests = {role: parent.digest for role, parent in parents.items()}
        data = self.digests.of_config(stage.config, self.ground.base)
        return stage_inputs(stage, digests, data)

    def _decide(
        self, name: str, folder: Path, inputs: dict[str, Any], parents: Mapping[str, Parent]
    ) -> Decision:
        names = {role: parent.stage for role, parent in parents.items()}
        decision = decide(folder, inputs, names=names, run=self.ground.run)
        words = {"skipped": "nothing changed, skipped", "resumed": "goes on where it stopped"}
        if decision.why:
            self.ground.say(f"{name}: stale: {decision.why}")
        self.ground.say(f"{name}: {words.get(decision.status, 'begins')}")
        return decision

    def _job(self, stage: Stage, temporary: Path) -> Job:
        inputs = {r: self.finished[n].folder for r, n in parents_of(stage).items() if r != START}
        return Job(
            name=stage.name,
            folder=self.ground.run / stage.name,
            artifact=temporary,
            start=self.finished[stage.head.start].folder,
            base=self.ground.base,
            seed=stage.config.seed,
            accelerator=self.ground.accelerator,
            inputs=inputs,
            sandbox=self.recipe.head.sandbox,
            reward_url=stage.head.reward_url,
            reward_key=key_of(stage.head.reward_key_env, f"{stage.name}.reward_key_env"),
        )

    def _start(self) -> Finished:
        config, folder, base = self.recipe.head.model, self.ground.run / MODEL, self.ground.base
        outside = config.folder(base)
        inputs = {
            "kind": MODEL,
            "revision": 1,
            "config": config.model_dump(mode="json", by_alias=True),
            "parents": {},
            "data": self.digests.of_config(config, base) | self.digests.of_folder(outside),
        }
        temporary = folder / "artifact.tmp"
        decision = self._decide(MODEL, folder, inputs, {})
        if decision.artifact is not None:
            kept = json.loads((decision.artifact.folder / ORIGIN).read_text())["folder"]
            return Finished(decision.artifact, Path(kept) if kept else decision.artifact.folder)
        found = self.ground.make_start(config, temporary, base)
        elsewhere = str(found) if found != temporary else ""
        # With the digests in it, the artifact's own digest follows a checkpoint that changes.
        origin = {"folder": elsewhere, "files": inputs["data"]}
        write_atomic(temporary / ORIGIN, dump_json(origin))
        facts = Facts(
            stage=MODEL,
            kind=MODEL,
            gives="policy",
            inputs=inputs,
            parents={},
            versions=package_versions(),
        )
        artifact = publish(temporary, folder / "artifact", facts)
        return Finished(artifact, found if elsewhere else artifact.folder)

    def _measure(self) -> None:
        self.board.measure(self.finished)
        report = self.report()
        write_atomic(self.ground.run / "report.json", dump_json(report.resolved()))
        write_atomic(self.ground.run / "table.txt", as_text(eval_table(report.rows)))


def decide(
    folder: Path, inputs: dict[str, Any], *, names: Mapping[str, str], run: Path
) -> Decision:
    """What to do with a stage, its folder made ready for that.

    A finished artifact of the same inputs is kept. Anything made of other inputs, finished or not,
    is set aside. A half-done attempt of the same inputs stays for the trainer to resume from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest, why = digest_of(inputs), ""
    artifact = find_artifact(folder / "artifact")
    if artifact is not None and artifact.manifest.inputs_digest == digest:
        return Decision("skipped", artifact=artifact)
    if artifact is not None:
        why = why_stale(artifact.manifest.inputs, inputs, names=names, run=run)
        set_aside(artifact.folder, artifact.digest)
    elif (folder / "artifact").exists():
        set_aside(folder / "artifact", "unfinished")
    shutil.rmtree(folder / "artifact.tmp", ignore_errors=True)
    (folder / "artifact.tmp").mkdir()
    begun = folder / "inputs.json"
    if begun.exists():
        old = json.loads(begun.read_text())
        if digest_of(old) == digest and artifact is None:
            return Decision("resumed")
        why = why or why_stale(old, inputs, names=names, run=run)
        _set_attempt_aside(folder, digest_of(old))
    write_atomic(begun, dump_json(inputs))
    return Decision("fresh", why=why)


def _set_attempt_aside(folder: Path, digest: str) -> None:
    """Moves checkpoints, metrics and whatever else an attempt left into one folder."""
    kept = ("artifact", "artifact.tmp")
    old = [p for p in folder.iterdir() if ".stale-" not in p.name and p.name not in kept]
    attempt = folder / "attempt"
    attempt.mkdir()
    for path in old:
        path.rename(attempt / path.name)
    set_aside(attempt, digest)
