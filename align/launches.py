"""Ways to launch a run, and which of them a stage's config goes with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from model.parallel.mesh import ParallelConfig, launched_processes, launched_sharding

Sharding = Literal["whole", "fsdp1", "fsdp2", "deepspeed"]
Misfit = tuple[str, str]


@dataclass(frozen=True)
class Launch:
    """How a run is launched.

    Args:
        processes: of the run; 0 if not known.
        sharding: what spreads weights over them; `whole` if each holds all.
    """

    processes: int = 0
    sharding: Sharding = "whole"

    @staticmethod
    def of(accelerator: Accelerator) -> Launch:
        """As processes that have met know it."""
        kind = accelerator.distributed_type
        sharding: Sharding = "whole"
        if kind == DistributedType.DEEPSPEED:
            sharding = "deepspeed"
        elif kind == DistributedType.FSDP:
            sharding = "fsdp2" if accelerator.is_fsdp2 else "fsdp1"
        return Launch(accelerator.num_processes, sharding)

    @staticmethod
    def here() -> Launch:
        """As a launcher left it to this process, before it has met the others."""
        return Launch(launched_processes(), launched_sharding())

    @staticmethod
    def read(file: Path) -> Launch:
        """As a config file of accelerate says.

        Raises:
            ValueError: if there is no such file.
        """
        if not file.is_file():
            raise ValueError(f"{file}: no such file, expected a config file of accelerate")
        told = load_config_from_file(str(file))
        sharding: Sharding = "whole"
        if told.distributed_type == DistributedType.DEEPSPEED:
            sharding = "deepspeed"
        elif told.distributed_type == DistributedType.FSDP:
            sharding = "fsdp2" if told.fsdp_config.get("fsdp_version") == 2 else "fsdp1"
        return Launch(told.num_processes, sharding)


class Shared(Protocol):
    """What a stage's config says about processes; as in `TrainConfig`."""

    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def backend(self) -> str: ...
    @property
    def micro_sequences(self) -> int: ...
    @property
    def max_sequences(self) -> int: ...


def misfit(
    config: Shared, launch: Launch, *, num_experts: int = 0, expert_width: int = 0
) -> Misfit | None:
    """The first key of a stage that does not go with a launch, and what does; None if all go.

    Args:
        num_experts, expert_width: of the model; 0 if not known yet.

    Example:
        >>> from align.loop import TrainConfig
        >>> config = TrainConfig(parallel=ParallelConfig(sequence=2))
        >>> misfit(config, Launch(4)), misfit(config, Launch(4, "deepspeed"))[0]
        (None, 'backend')
    """
    parallel = config.parallel
    found = parallel.misfit(launch.processes, num_experts=num_experts, expert_width=expert_width)
    if found:
        return f"parallel.{found[0]}", found[1]
    return _unsharded(config, launch.sharding)


def _unsharded(config: Shared, sharding: Sharding) -> Misfit | None:
    if sharding == "whole":
        return None
    if config.backend == "trl":
        return "backend", "expected native where weights are sharded; use ddp.yaml"
    if sharding == "deepspeed":
        return "backend", "DeepSpeed is not supported; use fsdp2.yaml or ddp.yaml"
    if sharding == "fsdp1":
        return "backend", "FSDP 1 is not supported; set fsdp_version: 2 or use ddp.yaml"
    return None


def check(config: Shared, launch: Launch) -> None:
    """Raises ValueError for what `misfit` finds."""
    config.parallel.check(launch.processes)
    found = _unsharded(config, launch.sharding)
    if found:
        raise ValueError(f"{found[0]}: {found[1]}")


def idle(config: Shared, launch: Launch) -> str:
    """Says that a step has fewer microbatches than processes to compute them; "" if it may not.

    Example:
        >>> from align.loop import TrainConfig
        >>> idle(TrainConfig(batch_sequences=16, micro_sequences=16), Launch(2))
        '1 of 2 processes idle: a step is 1 microbatch or less; set micro_sequences to 8'
    """
    rows = config.parallel.rows_at_once(launch.processes)
    microbatches = math.ceil(config.max_sequences / config.micro_sequences)
    if microbatches >= rows or config.backend == "trl":
        return ""
    spare = (rows - microbatches) * config.parallel.sequence
    told = f"{spare} of {launch.processes} processes idle: a step is {microbatches} "
    told += f"microbatch{'es' * (microbatches > 1)} or less; "
    if config.max_sequences < rows:
        return told + f"it has {config.max_sequences} sequences or less, too few for so many"
    return told + f"set micro_sequences to {config.max_sequences // rows}"
