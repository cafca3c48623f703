"""Experts shared by ranks: each holds E / ranks of every layer's, and tokens travel to them.

    rows by expert -> all-to-all -> the experts held here, weighted -> all-to-all back -> summed

Where ranks share an expert's width F too, those of one part of the experts join their rows, each
computes its part of silu(g) * u and of the product behind it, and the outputs are summed.

Everything else stays as data parallelism, DDP or FSDP, has it. An expert's gradient arrives summed
over the ranks that share the experts; what is left is the sum over those that hold the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from model.kernels.experts.places import Places, combine, sort_places, spread
from model.moe import Experts
from model.parallel.collectives import (
    Voyage,
    all_gather,
    end_exchange,
    exchange,
    gather_parts,
    scatter_parts,
    start_exchange,
)
from model.parallel.mesh import ALONE, EXPERTS, Axis, Mesh


@dataclass(frozen=True)
class ExpertShare:
    """Sends each token to the ranks of its experts; takes the place of an expert layer's core.

    Args:
        core: computes the experts of one rank, as `expert_layer`.
        overlaps: whether one half of the tokens travels while the other is computed.
        tensor: the ranks that share the width of the same experts.
    """

    axis: Axis
    core: Callable[..., Tensor]
    overlaps: bool = True
    tensor: Axis = ALONE

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
        low = x
        if torch.is_autocast_enabled(x.device.type):
            # what the experts would round to anyway, at half the bytes
            low = x.to(torch.get_autocast_dtype(x.device.type))
        # every rank cuts, however few its tokens; not where a checkpoint would run the first half's
        # experts again only to come to the second's
        cuts = 2 if self.overlaps and not in_pieces else 1
        sizes = [len(x) - len(x) // 2, len(x) // 2] if cuts == 2 else [len(x)]
        held = len(gate_up)
        places = [sort_places(part, held * self.axis.size) for part in chosen.split(sizes)]
        counts = _Counts(places, held, axis=self.axis, tensor=self.tensor)
        halves = [
            _Half(*part, self.axis)
            for part in zip(low.split(sizes), weights.split(sizes), places, strict=True)
        ]
        for half, table in zip(halves, counts.tables(), strict=True):
            half.depart(table)
        for half in halves:
            rows, scale = half.arrive()
            expert, joined = half.expert[:, None], half.joined
            if self.tensor.size > 1:
                rows, scale, expert = (
                    gather_parts(x, joined, self.tensor) for x in (rows, scale, expert)
                )
            out = self.core(rows, gate_up, down, expert, scale, in_pieces=in_pieces)
            if self.tensor.size > 1:
                out = scatter_parts(out, joined, self.tensor)
            half.go_back(out)
        found = [half.come_back() for half in halves]
        return (found[0] if cuts == 1 else torch.cat(found)).to(x.dtype)


class _Table(NamedTuple):
    """How many rows travel where.

    Args:
        send, receive: rows to and from each rank.
        joined: rows that come to each of the ranks that share the width.
        expert: [rows that come], which of the experts here each is for.
    """

    send: list[int]
    receive: list[int]
    joined: list[int]
    expert: Tensor


class _Counts:
    """Rows of each part for each expert, told by every rank to every other."""

    def __init__(self, parts: Sequence[Places], held: int, *, axis: Axis, tensor: Axis) -> None:
        self.ranks = axis.size
        # [ranks, parts, held]: rows to each rank's experts, and rows from each rank to those here
        counts = [part.ends.diff(prepend=part.ends.new_zeros(1)) for part in parts]
        going = torch.stack([count.view(self.ranks, held) for count in counts], dim=1)
        self.coming = exchange(going, [1] * self.ranks, [1] * self.ranks, axis)
        told = torch.cat([going.sum(2).t(), self.coming.sum(2).t()], dim=1)
        if tensor.size > 1:
            came = all_gather(self.coming.sum((0, 2)), tensor)
            told = torch.cat([told, came.t()], dim=1)
        self.told = _start_reading(told)

    def tables(self) -> list[_Table]:
        """Of each part; the host waits for the device."""
        ranks, held = self.ranks, self.coming.shape[2]
        own = torch.arange(held, device=self.coming.device).repeat(ranks)
        tables = []
        for n, row in enumerate(self.told()):
            send, receive, joined = row[:ranks], row[ranks : 2 * ranks], row[2 * ranks :]
            came = self.coming[:, n].flatten()
            expert = own.repeat_interleave(came, output_size=sum(receive))
            tables.append(_Table(send, receive, joined, expert))
        return tables


def _start_reading(x: Tensor) -> Callable[[], list[list[int]]]:
    """What gives x on the host; until then the device goes on with what is launched after it."""
    if not x.is_cuda:
        return x.tolist
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[list[int]]:
        copied.synchronize()
        return host.tolist()

    return read


class _Half:
    """A part of the tokens on its way to its experts and back."""

    def __init__(self, x: Tensor, weights: Tensor, places: Places, axis: Axis) -> None:
        self.x, self.weights, self.places, self.axis = x, weights, places, axis
        # before the host knows how many leave, so that the device has something to do meanwhile
        with torch.no_grad():
            self.rows = spread(x, places)

    def depart(self, table: _Table) -> None:
        self.expert, self.joined, count = table.expert, table.joined, sum(table.send)
        self.there = [Voyage(table.send, table.receive, self.axis) for _ in range(2)]
        self.back = Voyage(table.receive, table.send, self.axis)
        rows = _Spread.apply(self.x, self.rows[:count], self.places)
        scale = self.weights.flatten().index_select(0, self.places.place[:count])[:, None]
        self.sent = [start_exchange(*pair) for pair in zip((rows, scale), self.there, strict=True)]

    def arrive(self) -> tuple[Tensor, Tensor]:
        rows, scale = map(end_exchange, self.sent, self.there)
        return rows, scale

    def go_back(self, out: Tensor) -> None:
        self.out = start_exchange(out, self.back)

    def come_back(self) -> Tensor:
        return _Gathered.apply(end_exchange(self.out, self.back), self.places, len(self.x))


class _Spread(torch.autograd.Function):
    """[T, C] -> a row for each place [token, k] by expert, which the caller has made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Places) -> Tensor:
        ctx.places, ctx.tokens = places, len(x)
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return combine(grad, ctx.places, ctx.tokens), None, None


class _Gathered(torch.autograd.Function):
    """The way back: rows of places [token, k], those of a token summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Places, tokens: int) -> Tensor:
        # not by save_for_backward: a checkpoint would compute the experts again to come here
        ctx.places, ctx.count = places, len(rows)
        return combine(rows, places, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return spread(grad, ctx.places)[: ctx.count], None, None


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
        mesh: replica x expert, or replica x expert x tensor.
    """
    rank, size = mesh.get_local_rank("expert"), mesh["expert"].size()
    for name, whole in list(module.named_parameters(recurse=False)):
        own = whole.detach().chunk(size)[rank]
        placements: list[Placement] = [Replicate(), Shard(0)]
        if mesh.ndim == 3:
            own, along = _width(name, own, mesh)
            placements.append(along)
        # a copy, so that the memory of the others' experts is given back
        placed = DTensor.from_local(
            own.clone(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )
        setattr(module, name, nn.Parameter(placed, requires_grad=whole.requires_grad))


def _width(name: str, weight: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Placement]:
    """This rank's part of the width F of [E', 2F, C] or [E', C, F]."""
    rank, size = mesh.get_local_rank("tensor"), mesh["tensor"].size()
    if name == "down_proj":
        return weight.chunk(size, dim=2)[rank], Shard(2)
    gate, up = (half.chunk(size, dim=1)[rank] for half in weight.chunk(2, dim=1))
    # the same stretch of gate and of up
    return torch.cat([gate, up], dim=1), _StridedShard(1, split_factor=2)


def shared_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are sharded over an expert axis, by name."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) and "expert" in (
            parameter.device_mesh.mesh_dim_names or ()
        ):
            yield name, parameter


def shared_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold such parameters, which FSDP has to leave as they are."""
    own = {parameter for _, parameter in shared_experts(model)}
    return [m for m in model.modules() if not own.isdisjoint(m.parameters(recurse=False))]


def spread_over_replicas(model: nn.Module, mesh: Mesh) -> None:
    """Shards (FSDP2) trained experts over the ranks that hold the same ones, along C.

    So no rank keeps gradients and optimizer states that another one keeps too. Experts under
    adapters, and a C that does not divide, stay as they are. Call it before optimizers see the
    parameters.
    """
    if mesh.expert.size == 1 or mesh.replica.size == 1:
        return
    assert mesh.experts is not None, "made with the expert axis"
    held = mesh.experts[EXPERTS[1 : mesh.experts.ndim]]
    for module in model.modules():
        if not isinstance(module, Experts) or not module.gate_up_proj.requires_grad:
            continue
        if module.gate_up_proj.shape[2] % mesh.replica.size:
            continue
        for name, whole in list(module.named_parameters(recurse=False)):
            assert isinstance(whole, DTensor), "shared by shard_experts"
            placed = DTensor.from_local(
                local(whole.detach()),
                held,
                whole.placements[1:],
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
            setattr(module, name, nn.Parameter(placed))
        along = {module.gate_up_proj: Shard(2), module.down_proj: Shard(1)}
        fully_shard(module, mesh=mesh.experts["replica"], shard_placement_fn=along.__getitem__)


def leave_out_of_ddp(model: nn.Module) -> bool:
    """Tells DDP, which is about to wrap `model`, that each rank has experts of its own.

    Returns: whether anything that is trained is left to DDP, which refuses a model otherwise.
    """
    names = {name for name, _ in shared_experts(model)}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return any(p.requires_grad for name, p in model.named_parameters() if name not in names)


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
        alike = _alike_over(parameter)
        for axis, name in ((mesh.replica, "replica"), (mesh.tensor, "tensor")):
            if axis.size > 1 and name in alike:
                # of an adapter, ranks that share the width have the gradient of their part each
                dist.all_reduce(grad, group=axis.group)
        # FSDP has made a mean over the ranks that it sharded over
        grad.div_(mesh.world.size if "replica" in alike else mesh.world.size / mesh.replica.size)


def _alike_over(parameter: nn.Parameter) -> set[str]:
    """Names of the axes whose ranks all hold the same of a shared parameter."""
    assert isinstance(parameter, DTensor), "of shared_experts"
    names = parameter.device_mesh.mesh_dim_names or ()
    pairs = zip(names, parameter.placements, strict=True)
    return {name for name, placement in pairs if placement.is_replicate()}


def clip_gradients(model: nn.Module, mesh: Mesh, limit: float) -> Tensor:
    """Scales all gradients so that their global norm is at most `limit`; gives the norm before.

    Args:
        limit: inf clips nothing.
    """
    # by the number of parts that ranks hold of them
    by_parts: dict[int, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            by_parts.setdefault(_num_parts(parameter), []).append(local(parameter.grad))
    squares = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for parts, grads in by_parts.items():
        # each part is held, and so counted, by as many ranks
        times = mesh.world.size / parts
        squares += torch.nn.utils.get_total_norm(grads).double().square() / times
    dist.all_reduce(squares, group=mesh.world.group)
    norm = squares.sqrt()
    share = (limit / (norm + 1e-6)).clamp(max=1.0)
    for grads in by_parts.values():
        for grad in grads:
            grad.mul_(share.to(grad.dtype))
    return norm


def _num_parts(parameter: nn.Parameter) -> int:
    if not isinstance(parameter, DTensor):
        return 1
    mesh, placements = parameter.device_mesh, parameter.placements
    return math.prod(mesh.size(n) for n, p in enumerate(placements) if not p.is_replicate())
