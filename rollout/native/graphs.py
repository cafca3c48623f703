"""Decode steps and padded pieces of prompts as CUDA graphs, one for each size and kind.

A step launches some two hundred kernels, which takes the host longer than the device needs to run
them; a graph launches them at once. Sizes are few (`bucket`): rows beyond the samples cost what
one more row of a matrix product costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# runs before a capture: libraries choose and kernels are compiled in them
WARM_UP_RUNS = 2

T = TypeVar("T")


def bucket(samples: int) -> int:
    """Rows of the smallest batch for so many samples.

    Example:
        >>> [bucket(n) for n in (1, 3, 9, 70, 257)]
        [1, 4, 16, 96, 320]
    """
    if samples <= 8:
        return 1 << (samples - 1).bit_length()
    step = 8 if samples <= 64 else 32 if samples <= 256 else 64
    return -(-samples // step) * step


class Graphs(Generic[T]):
    """Captured steps by key; all of them share one pool of memory, since one runs at a time."""

    def __init__(self) -> None:
        self._captured: dict[object, tuple[torch.cuda.CUDAGraph, T]] = {}
        self._pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __contains__(self, key: object) -> bool:
        return key in self._captured

    def capture(self, key: object, step: Callable[[], T]) -> None:
        """Runs `step` a few times and keeps it; what it changes is the caller's to put right."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = step()
        self._captured[key] = graph, out

    def replay(self, key: object) -> T:
        """Runs a captured step; its tensors hold until the next replay."""
        graph, out = self._captured[key]
        graph.replay()
        return out


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Where the weights lie and which adapters are on: a graph holds for one of these."""
    adapters = [
        (m.merged, m.disable_adapters, tuple(m.active_adapters))
        for m in model.modules()
        if isinstance(m, BaseTunerLayer)
    ]
    return *(p.data_ptr() for p in model.parameters()), *adapters
