"""What untrusted code may use, and how many runs share the machine."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Bounds of one run; what passes one is ended and the outcome says which.

    Example:
        >>> Limits(wall_s=2.0).wall_s
        2.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    wall_s: float = Field(default=20.0, gt=0)
    """Longest time from the program's own start, in seconds; waiting for a place is not counted."""
    cpu_s: int = Field(default=10, ge=1)
    """CPU time of each process, in whole seconds."""
    memory_bytes: int = Field(default=1 << 30, ge=64 << 20)
    """Address space of each process, and resident memory of all together (looked at 50 times a
    second, so that several processes can pass it for one look)."""
    max_processes: int = Field(default=32, ge=2)
    """Processes and threads at one time."""
    scratch_bytes: int = Field(default=64 << 20, ge=1 << 20)
    """Size of the scratch folder, which lives in memory, and of any one file."""
    max_files: int = Field(default=1024, ge=16)
    """Files and folders in the scratch folder."""
    max_open_files: int = Field(default=64, ge=16)
    """File descriptors of each process."""
    output_bytes: int = Field(default=1 << 20, ge=1)
    """Longest stdout, and longest stderr, in bytes; what comes after is not kept and ends the
    run."""


class SandboxConfig(BaseModel):
    """How untrusted code is run.

    Example:
        >>> SandboxConfig().allow_unisolated
        False
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    limits: Limits = Field(default_factory=Limits)
    """Bounds of one run."""
    max_parallel: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Runs at one time in this process; more wait for a place. `auto`: one a CPU."""
    allow_unisolated: bool = False
    """Run code even where nothing isolates it: it can then read and write what this user can, and
    reach the network. Only for code that you would run by hand."""

    @property
    def places(self) -> int:
        """Runs at one time, counted."""
        return (os.cpu_count() or 1) if self.max_parallel == "auto" else self.max_parallel
