"""Ways to share one lightning layer's attention over ranks, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.ranks import Ranks
from model.kernels.lightning.op import lightning_attention
from model.lightning import LightningAttention
from model.moe import Experts
from model.parallel.collectives import gather_parts
from model.parallel.expert import ExpertShare
from model.parallel.lasp import LightningShare
from model.parallel.mesh import Axis
from model.parallel.sequence import ShardLengths
from tests.model.parallel.lasp_serial import serial_lasp

Form = Callable[[], Tensor]


def set_overlap(model: nn.Module, overlaps: bool) -> None:
    """Whether lightning layers compute beside what they send."""
    for module in model.modules():
        if isinstance(module, LightningAttention):
            share = getattr(module.begin, "__self__", None)
            if isinstance(share, LightningShare):
                module.begin = replace(share, overlaps=overlaps).begin


def set_halves(model: nn.Module, overlaps: bool) -> None:
    """Whether one half of the tokens travels to its experts beside the other's computation."""
    for module in model.modules():
        if isinstance(module, Experts) and isinstance(module.core, ExpertShare):
            module.core = replace(module.core, overlaps=overlaps)


def forms(ranks: Ranks, slopes: Tensor, tokens: int) -> dict[str, Form]:
    """Each gives this rank's part of the output, after a backward pass."""
    axis = ranks.world
    lengths = ShardLengths([tokens], rank=axis.rank, size=axis.size)
    own = slice(lengths.start, lengths.ends[axis.rank])
    heads, dim = len(slopes), 128 if ranks.device.type == "cuda" else 32
    torch.manual_seed(0)
    whole = [torch.randn(tokens, heads, dim, device=ranks.device).to(ranks.dtype) for _ in range(4)]
    part = [x[own].clone().requires_grad_() for x in whole[:3]]
    grad, slowest = whole[3][own].clone(), float(slopes.min())
    leaves = [x.requires_grad_() for x in whole[:3]]

    def alone() -> Tensor:
        out, _ = lightning_attention(*leaves, slopes, [tokens])
        out.backward(whole[3])
        clear(leaves)
        return out.detach()[own]

    def shared(share: LightningShare) -> Form:
        def work() -> Tensor:
            out, _ = share(*part, slopes, lengths)
            out.backward(grad)
            clear(part)
            return out.detach()

        return work

    def serial() -> Tensor:
        out = serial_lasp(part, slopes, lengths, axis=axis, grad=grad)
        clear(part)
        return out

    def gathered() -> Tensor:
        out = everything(*part, slopes, lengths, axis)
        out.backward(grad)
        clear(part)
        return out.detach()

    plus = LightningShare(axis, slowest)
    return {
        "1 GPU": alone,
        "LASP+": shared(plus),
        "LASP+, no overlap": shared(replace(plus, overlaps=False)),
        "serial LASP": serial,
        "keys gathered": gathered,
    }


def clear(leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def everything(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, lengths: ShardLengths, axis: Axis
) -> Tensor:
    """What ring attention does to a lightning layer: all keys and values go to every rank.

    The same bytes as in a ring, in one collective; states of the parts before are made here again.
    """
    k, v = (gather_parts(x, lengths.sizes, axis) for x in (k, v))
    start = lengths.start
    own = slice(start, start + q.shape[0])
    state = None
    if start:
        _, state = lightning_attention(
            k[:start].detach(), k[:start], v[:start], slopes, [start], with_final=True
        )
    return lightning_attention(q, k[own], v[own], slopes, [q.shape[0]], initial_state=state)[0]
