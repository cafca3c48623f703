"""Which ranks work together: two views of the same processes, on torch's DeviceMesh.

    rows:     data x shard x sequence    the ranks of `sequence` share one packed row
    experts:  replica x expert           the ranks of `expert` share the experts of each layer
              (x tensor)                 those of `tensor` share the width of each expert

In both the last axis is the innermost, so that neighbours, which talk most, share a host. Processes
belong to accelerate; `shard` is what it spreads parameters over (FSDP), and to its data parallelism
every rank is one of data x shard x sequence.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

ROWS = ("data", "shard", "sequence")
EXPERTS = ("replica", "expert", "tensor")


class ParallelConfig(BaseModel):
    """How many processes share a row of tokens, and how many the experts; 1 shares nothing.

    Example:
        >>> ParallelConfig(sequence=2).rows_at_once(8)
        4
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence: int = Field(default=1, ge=1)
    """Processes that share one packed row; divides the number of processes."""
    expert: int = Field(default=1, ge=1)
    """Processes that share the experts of each layer; divides the number of processes. FSDP shards
    experts over those that hold the same ones."""
    expert_tensor: int = Field(default=1, ge=1)
    """Processes that share the inner width of each expert where `expert` is above 1; expert *
    expert_tensor divides the number of processes."""
    router: Literal["row", "global"] = "row"
    """Tokens that the experts' capacity and balance loss count: those of one packed row, or those
    of all rows that the processes compute at once (the report's global router)."""

    @model_validator(mode="after")
    def _width_beside_experts(self) -> Self:
        if self.expert_tensor > 1 and self.expert == 1:
            raise ValueError(
                f"parallel.expert_tensor = {self.expert_tensor} with parallel.expert = 1, expected "
                "expert above 1: whole experts are shared first; set expert or leave "
                "expert_tensor at 1"
            )
        return self

    def rows_at_once(self, num_processes: int) -> int:
        """Rows that so many processes compute at once."""
        return num_processes // self.sequence

    def place(self, rank: int) -> int:
        """Which of those rows a process has a part in."""
        return rank // self.sequence

    def check(self, num_processes: int, *, num_experts: int = 0, expert_width: int = 0) -> None:
        """Refuses sizes that do not divide.

        Args:
            num_processes: all processes; 0 if not known yet.
            num_experts: experts a layer; 0 if not known yet.
            expert_width: F of the model; 0 if not known yet.

        Raises:
            ValueError: naming the divisors that work.

        Example:
            >>> ParallelConfig(sequence=3).check(4)
            Traceback (most recent call last):
            ValueError: parallel.sequence = 3, expected a divisor of the 4 processes: 1, 2, 4
        """
        found = self.misfit(num_processes, num_experts=num_experts, expert_width=expert_width)
        if found:
            name, expected = found
            size = self.model_dump()[name]
            raise ValueError(f"parallel.{name} = {size}, {expected}")

    def misfit(
        self, num_processes: int, *, num_experts: int = 0, expert_width: int = 0
    ) -> tuple[str, str] | None:
        """The key whose size does not divide, and what was expected; None if all do."""
        processes = (num_processes, f"the {num_processes} processes")
        experts = (num_experts, f"the model's {num_experts} experts")
        left = (
            num_processes // self.expert,
            f"the {num_processes // self.expert} processes that parallel.expert leaves",
        )
        width = (expert_width, f"the model's expert width {expert_width}")
        rules = (
            ("sequence", self.sequence, [processes]),
            ("expert", self.expert, [processes, experts]),
            ("expert_tensor", self.expert_tensor, [left, width]),
        )
        for name, size, divided in rules:
            if any(number % size for number, _ in divided):
                known = [(number, what) for number, what in divided if number]
                told = " and of ".join(what for _, what in known)
                good = _listed(math.gcd(*(number for number, _ in known)))
                return name, f"expected a divisor of {told}: {good}"
        return None


def launched_processes() -> int:
    """Processes that this one was launched with, itself counted; 0 if by no launcher."""
    return int(os.environ.get("WORLD_SIZE", "0"))


def launched_sharding() -> Literal["whole", "fsdp1", "fsdp2", "deepspeed"]:
    """What `accelerate launch` was told to spread weights with, before the processes have met."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "deepspeed"
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp2" if os.environ.get("FSDP_VERSION", "1") == "2" else "fsdp1"
    return "whole"


def _listed(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


@dataclass(frozen=True)
class Axis:
    """This process's place among the ranks that it works with along one axis.

    Args:
        size: ranks on the axis; rank: own place, 0 to size - 1.
        group: what torch's collectives take; None on an axis of one rank.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        # a copied model talks to the same ranks; a process group cannot be copied
        return self


ALONE = Axis()


@dataclass(frozen=True)
class Mesh:
    """The axes of this process.

    Args:
        world: all ranks.
        sequence: the ranks that share its row.
        expert: the ranks that hold the other experts.
        tensor: the ranks that hold the other parts of its experts' width.
        replica: the ranks that hold the same as it of the experts.
        experts: replica x expert (x tensor, if that is shared) as torch knows it; None if nothing
            is shared.
    """

    world: Axis = ALONE
    sequence: Axis = ALONE
    expert: Axis = ALONE
    tensor: Axis = ALONE
    replica: Axis = ALONE
    experts: DeviceMesh | None = None


def open_mesh(config: ParallelConfig, *, device_type: str, is_sharded: bool = False) -> Mesh:
    """The axes of this process; called by all processes together, once the default group stands.

    Args:
        device_type: `cpu` or `cuda`.
        is_sharded: whether accelerate spreads parameters over the ranks (FSDP).

    Raises:
        ValueError: as `ParallelConfig.check`.

    Example:
        >>> open_mesh(ParallelConfig(), device_type="cpu").sequence.size
        1
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    config.check(world)
    if world == 1 or config == ParallelConfig():
        return Mesh()
    rows = world // config.sequence
    shape = (1, rows, config.sequence) if is_sharded else (rows, 1, config.sequence)
    own = init_device_mesh(device_type, shape, mesh_dim_names=ROWS)
    inner = (config.expert,) if config.expert_tensor == 1 else (config.expert, config.expert_tensor)
    experts = init_device_mesh(
        device_type,
        (world // math.prod(inner), *inner),
        mesh_dim_names=EXPERTS[: 1 + len(inner)],
    )
    return Mesh(
        world=Axis(world, dist.get_rank(), dist.group.WORLD),
        sequence=_axis(own, "sequence"),
        expert=_axis(experts, "expert"),
        tensor=_axis(experts, "tensor") if len(inner) == 2 else ALONE,
        replica=_axis(experts, "replica"),
        experts=experts,
    )


def _axis(mesh: DeviceMesh, name: str) -> Axis:
    size = mesh[name].size()
    return Axis(size, mesh.get_local_rank(name), mesh.get_group(name)) if size > 1 else ALONE
