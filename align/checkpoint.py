"""Checkpoints that are whole or absent, and a resume that continues bit for bit.

A checkpoint is written into a temporary folder, flushed, marked complete, and renamed; a reader
looks only at folders with the mark. It holds the trained weights, optimizer, schedule, the random
states and course of every process, counters, and the resolved config.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

MARK = "complete.json"
PREFIX = "step-"
TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Trained:
    """What a checkpoint saves and restores in place: the prepared model and what updates it."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        step: optimizer updates done.
        course: the course's own state on this process: plain values and tensors.
        state: what else the loop carries (counters, sums since the last line), the same on all
            processes or this process's own.
    """

    step: int
    course: Mapping[str, Any]
    state: Mapping[str, Any]


def random_state() -> dict[str, Any]:
    """State of every random generator of this process: python, numpy, torch, CUDA devices."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None; half-written ones do not count."""
    complete = [path.parent for path in folder.glob(f"{PREFIX}*/{MARK}")]
    return max(complete, key=lambda path: path.name, default=None)


def _write(path: Path, write: Callable[[Any], object]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _together(accelerator: Accelerator, work: Callable[[], object], *, doing: str) -> None:
    """Runs `work` on each process; if it fails on one, every process raises the same line."""
    problem = ""
    try:
        work()
    except (OSError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
    problems = gather_object([problem]) if accelerator.num_processes > 1 else [problem]
    if any(problems):
        raise RuntimeError(f"{doing}: {next(p for p in problems if p)}")


def save(
    folder: Path,
    trained: Trained,
    progress: Progress,
    *,
    config: str,
    keep: int,
    accelerator: Accelerator,
) -> Path:
    """Writes folder/step-N whole, then removes all but the newest `keep`; returns its path.

    Raises:
        RuntimeError: if it cannot be written (disk full, no permission); earlier checkpoints stay.
    """
    final = folder / f"{PREFIX}{progress.step:08d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    # Collective under a sharded model, so it stands outside of what may fail on one process.
    weights = get_model_state_dict(trained.model, options=options)
    moments = get_optimizer_state_dict(trained.model, trained.optimizer, options=options)

    def write() -> None:
        temporary.mkdir(parents=True, exist_ok=True)
        own = {"random": random_state(), "course": dict(progress.course), "loop": progress.state}
        rank = accelerator.process_index
        _write(temporary / f"rank-{rank}.pt", lambda file: torch.save(own, file))
        if rank == 0:
            shared = {"optimizer": moments, "scheduler": trained.scheduler.state_dict()}
            _write(temporary / "weights.pt", lambda file: torch.save(weights, file))
            _write(temporary / "optimizer.pt", lambda file: torch.save(shared, file))
            _write(temporary / "config.json", lambda file: file.write(config.encode()))

    def publish() -> None:
        if accelerator.process_index == 0:
            mark = {"step": progress.step, "num_processes": accelerator.num_processes}
            _sync_folder(temporary)
            _write(temporary / MARK, lambda file: file.write(json.dumps(mark).encode()))
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            _sync_folder(folder)
            _remove_old(folder, keep)

    earlier = latest(folder)
    doing = (
        f"{final}: cannot write the checkpoint (earlier one: {earlier or 'none'}, untouched); "
        "free disk space and run again"
    )
    try:
        _together(accelerator, write, doing=doing)
        _together(accelerator, publish, doing=doing)
    except RuntimeError:
        if accelerator.process_index == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _remove_old(folder: Path, keep: int) -> None:
    complete = sorted(path.parent for path in folder.glob(f"{PREFIX}*/{MARK}"))
    for path in complete[:-keep]:
        # The mark goes first, so that a removal cut short leaves nothing that looks complete.
        (path / MARK).unlink()
        shutil.rmtree(path)


def clean(folder: Path) -> None:
    """Removes what a killed run left half-written; call on one process."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)
    for path in folder.glob(f"{PREFIX}*"):
        if not (path / MARK).exists():
            shutil.rmtree(path)


def load(path: Path, trained: Trained, *, config: str, accelerator: Accelerator) -> Progress:
    """Restores a checkpoint in place and returns how far it was.

    Raises:
        RuntimeError: if it was written by another number of processes, with another config, or
            for other weights.
    """
    mark = json.loads((path / MARK).read_text(encoding="utf-8"))
    if mark["num_processes"] != accelerator.num_processes:
        raise RuntimeError(
            f"{path}: written by {mark['num_processes']} processes, this run has "
            f"{accelerator.num_processes}; use as many, or move the checkpoints aside"
        )
    _check_config(path, config)
    own = torch.load(path / f"rank-{accelerator.process_index}.pt", weights_only=True)
    shared = torch.load(path / "optimizer.pt", weights_only=True, mmap=True)
    weights = torch.load(path / "weights.pt", weights_only=True, mmap=True)
    _check_names(path, trained.model, weights)
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    set_optimizer_state_dict(trained.model, trained.optimizer, shared["optimizer"], options=options)
    trained.scheduler.load_state_dict(shared["scheduler"])
    set_model_state_dict(trained.model, weights, options=options)
    set_random_state(own["random"])
    return Progress(step=mark["step"], course=own["course"], state=own["loop"])


def _check_names(path: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    options = StateDictOptions(ignore_frozen_params=True)
    wanted = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    for name in sorted(wanted.keys() | weights.keys()):
        here, there = wanted.get(name), weights.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise RuntimeError(
                f"{path}: {name} is {'absent' if there is None else tuple(there.shape)} in the "
                f"checkpoint and {'absent' if here is None else tuple(here.shape)} in the model; "
                "move the checkpoints aside to start anew"
            )


# These may change between a run and its continuation without changing a single weight.
FREE = {
    *("save_every_steps", "keep_checkpoints", "log_every_steps", "report_to"),
    # where workers are, and how long to wait for them, not what they are asked
    *("rollout.workers", "rollout.folder", "rollout.api_key_env", "rollout.deadline_s"),
    "rollout.canary_bound",
}


def _check_config(path: Path, config: str) -> None:
    there = _by_key(json.loads((path / "config.json").read_text(encoding="utf-8")))
    here = _by_key(json.loads(config))
    changed = [
        f"{key} {there.get(key)!r} -> {here.get(key)!r}"
        for key in sorted((there.keys() | here.keys()) - FREE)
        if there.get(key) != here.get(key)
    ]
    if changed:
        raise RuntimeError(
            f"{path}: written under another config ({'; '.join(changed)}); "
            "put it back, or move the checkpoints aside to start anew"
        )


def _by_key(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Values by dotted key; a list is one value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inner = _by_key(value, f"{before}{key}.") if isinstance(value, dict) else {}
        found |= inner or {f"{before}{key}": value}
    return found
