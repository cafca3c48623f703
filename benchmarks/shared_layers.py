"""Ways to share one layer's attention over ranks, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MethodType

import torch
from torch import Tensor, nn

from benchmarks.ranks import Ranks
from model import Packed
from model.kernels.attention.op import packed_attention
from model.kernels.lightning.op import lightning_attention
from model.lightning import LightningAttention
from model.moe import Experts, Router, router_load
from model.parallel.collectives import gather_parts
from model.parallel.expert import ExpertShare
from model.parallel.lasp import LightningShare
from model.parallel.mesh import Axis
from model.parallel.ring import attend_by_ring
from model.parallel.sequence import ShardLengths
from model.parallel.softmax import attend_by_heads, attend_by_keys
from tests.model.parallel.lasp_serial import serial_lasp

Form = Callable[[], Tensor]


def set_overlap(model: nn.Module, overlaps: bool) -> None:
    """Whether lightning layers compute beside what they send."""
    for module in model.modules():
        if isinstance(module, LightningAttention) and isinstance(module.begin, MethodType):
            share = module.begin.__self__
            assert isinstance(share, LightningShare), "put there by parallelize"
            module.begin = replace(share, overlaps=overlaps).begin


def set_halves(model: nn.Module, overlaps: bool) -> None:
    """Whether one half of the tokens travels to its experts beside the other's computation."""
    for module in model.modules():
        if isinstance(module, Experts) and isinstance(module.core, ExpertShare):
            module.core = replace(module.core, overlaps=overlaps)


def make_even(model: nn.Module, packed: Packed) -> None:
    """Takes from random routers what all tokens have in common, which sends most to few experts.

    A router that was trained with a balance loss is as even.
    """

    def level(router: Router, given: tuple[Tensor, ...]) -> None:
        common = given[0].float().mean(0)
        weight = router.weight.data
        along = (weight.float() @ common)[:, None] * common / common.square().sum()
        weight.copy_(weight.float() - along)

    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_pre_hook(level) for router in routers]
    with torch.no_grad():
        model(packed=packed)
    for hook in hooks:
        hook.remove()


def busiest(router_logits: Sequence[Tensor], top_k: int, ranks: int) -> float:
    """Rows of the rank with most of them over those of an even share, the mean of the layers."""
    share = router_load(router_logits, top_k).share
    return float((share.unflatten(1, (ranks, -1)).sum(2).amax(1) * ranks).mean())


@dataclass(frozen=True)
class Shared:
    """One row of one document, whole and this rank's part: inputs, and a gradient of the output."""

    lengths: ShardLengths
    whole: list[Tensor]
    part: list[Tensor]
    grads: tuple[Tensor, Tensor]

    @staticmethod
    def make(ranks: Ranks, tokens: int, heads: tuple[int, int, int], dim: int) -> Shared:
        """Args: heads: of q, of k and of v."""
        axis = ranks.world
        lengths = ShardLengths([tokens], rank=axis.rank, size=axis.size)
        own = slice(lengths.start, lengths.ends[axis.rank])
        torch.manual_seed(0)
        whole = [
            torch.randn(tokens, count, dim, device=ranks.device, dtype=ranks.dtype)
            for count in (*heads, heads[0])
        ]
        return Shared(
            lengths,
            [x.requires_grad_() for x in whole[:3]],
            [x.detach()[own].clone().requires_grad_() for x in whole[:3]],
            (whole[3], whole[3][own].clone()),
        )

    def alone(self, attend: Callable[..., Tensor]) -> Form:
        def work() -> Tensor:
            out = attend(*self.whole)
            out.backward(self.grads[0])
            clear(self.whole)
            return out.detach()[self.lengths.start : self.lengths.ends[self.lengths.rank]]

        return work

    def together(self, attend: Callable[..., Tensor]) -> Form:
        def work() -> Tensor:
            out = attend(*self.part)
            out.backward(self.grads[1])
            clear(self.part)
            return out.detach()

        return work


def lightning(ranks: Ranks, slopes: Tensor, tokens: int, dim: int) -> dict[str, Form]:
    """Each gives this rank's part of the output, after a backward pass."""
    axis, heads = ranks.world, len(slopes)
    row = Shared.make(ranks, tokens, (heads, heads, heads), dim)
    lengths = row.lengths
    plus = LightningShare(axis, float(slopes.min()))

    def serial() -> Tensor:
        out = serial_lasp(row.part, slopes, lengths, axis=axis, grad=row.grads[1])
        clear(row.part)
        return out

    return {
        "1 GPU": row.alone(lambda *qkv: lightning_attention(*qkv, slopes, [tokens])[0]),
        "LASP+": row.together(lambda *qkv: plus(*qkv, slopes, lengths)[0]),
        "serial LASP": serial,
        "keys gathered": row.together(lambda *qkv: everything(*qkv, slopes, lengths, axis)),
    }


def softmax(ranks: Ranks, heads: int, kv_heads: int, tokens: int, dim: int) -> dict[str, Form]:
    """As `lightning`."""
    axis = ranks.world
    row = Shared.make(ranks, tokens, (heads, kv_heads, kv_heads), dim)
    lengths = row.lengths
    given = {"axis": axis, "window": None}
    return {
        "1 GPU": row.alone(lambda *qkv: packed_attention(*qkv, [tokens])),
        "heads for tokens": row.together(lambda *qkv: attend_by_heads(*qkv, lengths, **given)),
        "ring, zig-zag": row.together(lambda *qkv: attend_by_ring(*qkv, lengths, axis=axis)),
        "keys gathered": row.together(lambda *qkv: attend_by_keys(*qkv, lengths, **given)),
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
