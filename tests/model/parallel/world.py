"""Runs a function on several gloo processes of one thread each, and gives what each returned."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@functools.cache
def forkserver() -> ForkServerContext:
    """Processes that have imported what is tested already; importing it takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.model.parallel.world", "align.trainers.grpo"])
    return context


def _run(
    rank: int, size: int, port: int, folder: Path, function: Callable[[Any], Any], given: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    dist.init_process_group("gloo")
    try:
        torch.save(function(given), folder / f"found-{rank}")
        dist.barrier()
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
    dist.destroy_process_group()


def world(size: int, function: Callable[[Any], Any], given: Any, folder: Path) -> list[Any]:
    """What `function(given)` returns on each of `size` ranks.

    Args:
        function: of a module, imported anew by each process.
        folder: temporary.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        forkserver().Process(target=_run, args=(rank, size, port, folder, function, given))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + 300
    while any(process.is_alive() for process in started) and time.monotonic() < deadline:
        if any(process.exitcode for process in started):
            # the others wait for one that is gone
            deadline = min(deadline, time.monotonic() + 2)
        time.sleep(0.02)
    for process in started:
        process.kill()
        process.join()
    told = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert all(process.exitcode == 0 for process in started), "\n".join(told)
    return [torch.load(folder / f"found-{rank}", weights_only=False) for rank in range(size)]
