"""Checkpoints that are whole or absent, and a resume that continues on any number of processes.

A checkpoint is written into a temporary folder, flushed, marked complete, and renamed; a reader
looks only at folders with the mark.

    step-N/sharded/       trained weights and optimizer: each process writes what it holds, and
                          reads what it will hold (torch.distributed.checkpoint)
    step-N/progress.pt    schedule, course and counters, the same for every process
    step-N/config.json    the resolved config
    step-N/complete.json  the mark

No random state is kept: every random number of a run is a function of seed, update and microbatch.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from align.stretches import in_boxes

MARK = "complete.json"
PREFIX = "step-"
TEMPORARY = ".writing-"
SHARDED = "sharded"
# Of what stands in a checkpoint; another number is not read.
LAYOUT = 2


@dataclass(frozen=True)
class Trained:
    """What a checkpoint saves and restores in place: the prepared model and what updates it."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler


@dataclass(frozen=True)
class Progress:
    """How far a run is; the same on all processes.

    Args:
        step: optimizer updates done.
        course: the course's own state: plain values and tensors.
        state: what else the loop carries: counters, sums since the last line.
    """

    step: int
    course: Mapping[str, Any]
    state: Mapping[str, Any]


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


def _lead(accelerator: Accelerator, work: Callable[[], object], *, doing: str) -> None:
    """Runs `work` on the main process; if it fails, every process raises the same line."""
    problem = ""
    try:
        if accelerator.is_main_process:
            work()
    except (OSError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
    problems = gather_object([problem]) if accelerator.num_processes > 1 else [problem]
    if any(problems):
        raise RuntimeError(f"{doing}: {next(p for p in problems if p)}")


def _contents(trained: Trained) -> dict[str, Any]:
    """Weights and optimizer states by name, each process's own parts of them."""
    options = StateDictOptions(ignore_frozen_params=True)
    return {
        "weights": get_model_state_dict(trained.model, options=options),
        "optimizer": get_optimizer_state_dict(trained.model, trained.optimizer, options=options),
    }


@contextmanager
def _alike() -> Iterator[None]:
    """Makes of torch's report of a failure, which every process gets, one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (first, _) = min(error.failures.items())
        told = next(iter(str(first).splitlines()), type(first).__name__)
        raise RuntimeError(f"process {rank}: {told}") from error


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

    Every process calls it; `folder` is one that all of them see.

    Raises:
        RuntimeError: if it cannot be written (disk full, no permission); earlier checkpoints stay.
    """
    final = folder / f"{PREFIX}{progress.step:08d}"
    temporary = folder / f"{TEMPORARY}{final.name}"

    def begin() -> None:
        temporary.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        own = {
            "scheduler": trained.scheduler.state_dict(),
            "course": dict(progress.course),
            "loop": dict(progress.state),
        }
        _write(temporary / "progress.pt", lambda file: torch.save(own, file))
        _write(temporary / "config.json", lambda file: file.write(config.encode()))

    def publish() -> None:
        mark = {
            "step": progress.step,
            "layout": LAYOUT,
            "num_processes": accelerator.num_processes,
        }
        _sync_folder(temporary / SHARDED)
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
        _lead(accelerator, begin, doing=doing)
        try:
            with _alike():
                # files of a process are flushed before it says that it is done
                writer = FileSystemWriter(temporary / SHARDED, sync_files=True)
                save_sharded(in_boxes(_contents(trained)), storage_writer=writer)
        except RuntimeError as error:
            raise RuntimeError(f"{doing}: {error}") from error
        _lead(accelerator, write, doing=doing)
        _lead(accelerator, publish, doing=doing)
    except RuntimeError:
        if accelerator.is_main_process:
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


def load(path: Path, trained: Trained, *, config: str) -> Progress:
    """Restores a checkpoint in place and returns how far it was; every process calls it.

    The processes may be more or fewer than those that wrote it, and share rows, experts or
    parameters in another way.

    Raises:
        RuntimeError: if it was written by another version, with another config, or for other
            weights, or cannot be read.
    """
    mark = json.loads((path / MARK).read_text(encoding="utf-8"))
    if mark.get("layout") != LAYOUT:
        raise RuntimeError(
            f"{path}: layout {mark.get('layout', 1)}, expected {LAYOUT}: another version of this "
            "package wrote it; go on with that one, or move the checkpoints aside to start anew"
        )
    _check_config(path, config)
    contents = _contents(trained)
    reader = FileSystemReader(path / SHARDED)
    _check_names(path, contents["weights"], reader)
    try:
        with _alike():
            # in place
            load_sharded(in_boxes(contents), storage_reader=reader)
    except RuntimeError as error:
        raise RuntimeError(f"{path}: cannot be read ({error}); move it aside") from error
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_model_state_dict(trained.model, contents["weights"], options=options)
    set_optimizer_state_dict(
        trained.model, trained.optimizer, contents["optimizer"], options=options
    )
    own = torch.load(path / "progress.pt", weights_only=True)
    trained.scheduler.load_state_dict(own["scheduler"])
    return Progress(step=mark["step"], course=own["course"], state=own["loop"])


def _check_names(path: Path, wanted: Mapping[str, torch.Tensor], reader: FileSystemReader) -> None:
    prefix = "weights."
    found = {
        name.removeprefix(prefix): entry.size
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    for name in sorted(wanted.keys() | found.keys()):
        here, there = wanted.get(name), found.get(name)
        if here is None or there is None or here.shape != there:
            raise RuntimeError(
                f"{path}: {name} is {'absent' if there is None else tuple(there)} in the "
                f"checkpoint and {'absent' if here is None else tuple(here.shape)} in the model; "
                "move the checkpoints aside to start anew"
            )


# These may change between a run and its continuation: they change no weight, but for the rounding
# of sums that other processes make.
FREE = {
    *("save_every_steps", "keep_checkpoints", "log_every_steps", "report_to"),
    # where workers are, and how long to wait for them, not what they are asked
    *("rollout.workers", "rollout.folder", "rollout.api_key_env", "rollout.deadline_s"),
    "rollout.canary_bound",
}
# Keys of `parallel`: over how many processes a row and the experts are shared.
SHARED_OVER = {"sequence", "expert", "expert_tensor"}


def _check_config(path: Path, config: str) -> None:
    there, here = (
        _binding(json.loads(text))
        for text in ((path / "config.json").read_text(encoding="utf-8"), config)
    )
    changed = [
        f"{key} {there.get(key)!r} -> {here.get(key)!r}"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if changed:
        raise RuntimeError(
            f"{path}: written under another config ({'; '.join(changed)}); "
            "put it back, or move the checkpoints aside to start anew"
        )


def _binding(config: Mapping[str, Any]) -> dict[str, Any]:
    free = FREE | {f"parallel.{key}" for key in SHARED_OVER}
    return {key: value for key, value in _by_key(config).items() if key not in free}


def _by_key(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Values by dotted key; a list is one value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inner = _by_key(value, f"{before}{key}.") if isinstance(value, dict) else {}
        found |= inner or {f"{before}{key}": value}
    return found
