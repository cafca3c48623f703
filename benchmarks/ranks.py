"""Processes that time something together, and what they share: device, clock, synthetic rows.

A benchmark is started by torchrun, or starts its own processes (`run_on`). One process speaks.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from model import HybridConfig, HybridForCausalLM, Packed
from model.parallel.mesh import Axis

PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """The processes, and this one among them."""

    world: Axis
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def say(self, line: str) -> None:
        if self.world.rank == 0:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def meet(self) -> None:
        self.wait()
        if self.world.size > 1:
            dist.barrier()

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """Most memory that was in use since `clear`, the largest of all ranks; 0 on a CPU."""
        own = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0
        return self.largest(own)

    def largest(self, number: float) -> float:
        if self.world.size == 1:
            return number
        told = torch.tensor([number], dtype=torch.float64, device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return float(told)

    def seconds(
        self, work: Callable[[], object], passes: int, *, warm_ups: int = 1, alone: bool = False
    ) -> float:
        """Median on the wall, of the slowest rank.

        Args:
            alone: the first rank works, the others wait.
        """
        times = [0.0]
        if not alone or self.world.rank == 0:
            for _ in range(warm_ups):
                work()
            times = []
            for _ in range(passes):
                self.wait()
                if not alone and self.world.size > 1:
                    dist.barrier()
                start = time.perf_counter()
                work()
                self.wait()
                times.append(time.perf_counter() - start)
        self.meet()
        return self.largest(statistics.median(times))


def run_on(ranks: int, work: Callable[[Ranks, Any], None], options: Any) -> None:
    """Calls work(ranks, options) on every process; starts them unless a launcher did."""
    if "WORLD_SIZE" in os.environ:
        _work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None, work, options)
    elif ranks == 1:
        # no process to meet, so no network either
        _work(0, 1, None, work, options)
    else:
        with tempfile.TemporaryDirectory() as folder:
            # by file: a host without names would be asked for its own by a TCP store
            given = (ranks, f"file://{folder}/store", work, options)
            torch.multiprocessing.spawn(_work, given, nprocs=ranks)


def _work(
    rank: int, size: int, store: str | None, work: Callable[[Ranks, Any], None], options: Any
) -> None:
    is_cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if is_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if size == 1:
        work(Ranks(Axis(), device), options)
        return
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        init_method=store,
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
        device_id=device if is_cuda else None,
    )
    try:
        work(Ranks(Axis(size, rank, dist.group.WORLD), device), options)
    finally:
        dist.destroy_process_group()


def build(config: HybridConfig, ranks: Ranks, dtype: torch.dtype | None = None) -> nn.Module:
    """A model of random weights, the same on every rank, in training."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    with torch.device(ranks.device):
        torch.set_default_dtype(dtype or ranks.dtype)
        model = HybridForCausalLM(config)
        torch.set_default_dtype(default)
    return model.train()


def row(lengths: Sequence[int], vocabulary: int, ranks: Ranks, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Packed(tokens, positions, tuple(lengths)).to(ranks.device)


def mean_loss(model: nn.Module, packed: Packed) -> Tensor:
    """Next-token loss of the row and the router's losses."""
    out = model(packed=packed, targets=packed.tokens.roll(-1))
    loss: Tensor = out.aux_loss - out.logprobs.mean()
    return loss
