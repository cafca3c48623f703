"""Experts shared by ranks: each holds E / ranks of every layer's, and tokens travel to them.

    rows by expert -> all-to-all -> the experts held here, weighted -> all-to-all back -> summed

Everything else stays as data parallelism has it. An expert's gradient arrives summed over the ranks
that share the experts; what is left is the sum over those that hold the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from model.moe import Experts
from model.parallel.collectives import all_gather, exchange
from model.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class ExpertShare:
    """Sends each token to the ranks of its experts; takes the place of an expert layer's core.

    Args:
        core: computes the experts of one rank, as `expert_layer`.
    """

    axis: Axis
    core: Callable[..., Tensor]

    def __call__(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        chosen: Tensor,
        weights: Tensor,
        *,
        in_pieces: bool = False,
    ) -> Tensor:
        """As `expert_layer`; gate_up and down are sharded over the ranks on their first dim."""
        gate_up, down = local(gate_up), local(down)
        held, ranks = gate_up.shape[0], self.axis.size
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=held * ranks + 1)[: held * ranks]
        # [ranks, held]: rows to each rank's experts, and rows from each rank to those held here
        going = counts.view(ranks, held)
        coming = exchange(going, [1] * ranks, [1] * ranks, self.axis)
        send, receive = torch.stack([going.sum(1), coming.sum(1)]).tolist()
        order = order[: sum(send)]
        low = x
        if torch.is_autocast_enabled(x.device.type):
            # what the experts would round to anyway, at half the bytes
            low = x.to(torch.get_autocast_dtype(x.device.type))
        rows = exchange(_Spread.apply(low, order, chosen.shape[1]), send, receive, self.axis)
        scale = weights.flatten().index_select(0, order)[:, None]
        scale = exchange(scale, send, receive, self.axis)
        expert = torch.arange(held, device=x.device).repeat(ranks)
        expert = expert.repeat_interleave(coming.flatten(), output_size=sum(receive))
        out = self.core(rows, gate_up, down, expert[:, None], scale, in_pieces=in_pieces)
        back = exchange(out, receive, send, self.axis)
        return _Gathered.apply(back, order, chosen.shape).to(x.dtype)


class _Spread(torch.autograd.Function):
    """[T, C] -> a row for each place [token, k] of `order`; backward adds in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.shape = (x.shape[0], top_k)
        return x.index_select(0, order // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return _sum_places(grad, order, ctx.shape), None, None


class _Gathered(torch.autograd.Function):
    """The way back: rows of places [token, k], those of a token summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
        # not by save_for_backward: a checkpoint would compute the experts again to come here
        ctx.order, ctx.top_k = order, shape[1]
        return _sum_places(rows, order, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.order // ctx.top_k), None, None


def _sum_places(rows: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
    """Each place has one row or none, so that no two are added to one address at once."""
    room = rows.new_zeros(shape[0] * shape[1], rows.shape[1]).index_copy_(0, order, rows)
    return room.view(*shape, rows.shape[1]).sum(1)


@dataclass(frozen=True)
class CountedDrop:
    """Drops over a capacity that is counted over all ranks of an axis (the global router).

    First come, first served in the order of the ranks: what one process would drop of their tokens
    laid end to end.
    """

    axis: Axis

    def __call__(self, chosen: Tensor, num_experts: int, factor: float) -> Tensor:
        """As `drop_over_capacity`."""
        flat = chosen.flatten()
        hits = nn.functional.one_hot(flat, num_experts)
        counts = torch.cat([hits.sum(0), hits.new_full((1,), flat.numel())])
        every = all_gather(counts, self.axis)
        capacity = (factor * every[:, -1].sum().double() / num_experts).ceil()
        place = hits.cumsum(0) + every[: self.axis.rank, :-1].sum(0)
        place = place.gather(1, flat[:, None])[:, 0]
        return flat.masked_fill(place > capacity, num_experts).view_as(chosen)


def local(weight: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank holds, with gradients."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def shard_experts(module: Experts, mesh: DeviceMesh) -> None:
    """Keeps this rank's experts only; the full tensors must be alike on all ranks.

    Args:
        mesh: replica x expert.
    """
    rank, size = mesh.get_local_rank("expert"), mesh["expert"].size()
    for name, whole in list(module.named_parameters(recurse=False)):
        # a copy, so that the memory of the others' experts is given back
        own = whole.detach().chunk(size)[rank].clone()
        placed = DTensor.from_local(own, mesh, [Replicate(), Shard(0)], run_check=False)
        setattr(module, name, nn.Parameter(placed, requires_grad=whole.requires_grad))


def shared_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are sharded over an expert axis, by name."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and "expert" in (
            parameter.device_mesh.mesh_dim_names or ()
        ):
            yield name, parameter


def leave_out_of_ddp(model: nn.Module) -> None:
    """Tells DDP, which is about to wrap `model`, that each rank has experts of its own."""
    names = [name for name, _ in shared_experts(model)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def average_expert_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Makes of expert gradients what DDP makes of all others: the mean over all ranks.

    Call it once an update, after the last backward. An expert that met no token counts as zero.
    """
    for _, parameter in shared_experts(model):
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = local(parameter.grad)
        if mesh.replica.size > 1:
            dist.all_reduce(grad, group=mesh.replica.group)
        grad.div_(mesh.world.size)


def clip_gradients(model: nn.Module, mesh: Mesh, limit: float) -> Tensor:
    """Scales all gradients so that their global norm is at most `limit`; gives the norm before.

    Args:
        limit: inf clips nothing.
    """
    own = {name for name, _ in shared_experts(model)}
    named = [(n, local(p.grad)) for n, p in model.named_parameters() if p.grad is not None]
    norms = [
        torch.nn.utils.get_total_norm([g for n, g in named if (n in own) == is_own])
        for is_own in (True, False)
    ]
    squares = norms[0].double().square()
    dist.all_reduce(squares, group=mesh.expert.group)
    norm = (squares + norms[1].double().square()).sqrt()
    share = (limit / (norm + 1e-6)).clamp(max=1.0)
    for _, grad in named:
        grad.mul_(share.to(grad.dtype))
    return norm
