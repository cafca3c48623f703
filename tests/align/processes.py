"""A script on several processes, as a launcher starts them: over gloo, or NCCL on GPUs.

TEST_DEVICE=cuda python -m pytest -m multi tests/align -k "two_processes and not killed"
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType

from tests.align import small
from tests.model.parallel.world import forkserver


def _run(script: str, arguments: Sequence[str], environment: dict[str, str], said: Path) -> None:
    with said.open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


def environments(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each process; one alone has no group."""
    shared = {"ACCELERATE_USE_CPU": "true"} if small.DEVICE == "cpu" else {}
    if processes == 1:
        return [shared]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def shard_weights(accelerator: Accelerator) -> None:
    """Makes an accelerator of several processes one that shards weights (FSDP2).

    accelerate offers FSDP only to accelerators, but what it calls runs on CPUs as well.
    """
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
    )


def launch(script: str, arguments: list[str], processes: int) -> list[str]:
    """Runs the script, one process alone without a group; returns what each wrote to stderr.

    Processes are forked from one that has imported what scripts train with: importing it takes
    longer than all that they do.
    """
    deadline = time.monotonic() + 240
    with tempfile.TemporaryDirectory() as folder:
        started: list[tuple[Any, Path]] = []
        for rank, environment in enumerate(environments(processes)):
            said = Path(folder) / str(rank)
            given = (script, arguments, environment, said)
            started.append((forkserver().Process(target=_run, args=given), said))
            started[-1][0].start()
        try:
            for rank, (process, _) in enumerate(started):
                process.join(max(0.0, deadline - time.monotonic()))
                assert process.exitcode is not None, f"process {rank} has not ended in 240 s"
        finally:
            for process, _ in started:
                process.kill()
                process.join()
        return [said.read_text() for _, said in started]
