"""Lightning attention in blocks, as plain batched matmuls without a loop: the CPU form.

Each sequence is cut into blocks of B tokens; no block holds two sequences. Inside a block the
quadratic form with decay, between blocks one state per block:

    o_i   = sum_{j<=i} exp(-s (i-j)) (q_i . k_j) v_j  +  exp(-s (i+1)) q_i S_n
    S_n   = sum_{m<n} exp(-s B (n-m-1)) L_m  +  exp(-s B n) S_0
    L_m   = sum_j exp(-s (len_m - 1 - j)) k_j^T v_j

The sum over earlier blocks is a matmul with a small matrix of decays, one for all sequences of like
length, so that the number of calls does not grow with the number of sequences or blocks. Backward
is written out: it makes the scores inside the blocks again, and keeps q, k, v and the states.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Group:
    """Sequences of more than one block whose block counts lie under one power of two.

    Args:
        take: [S', R] int64, the block of each rank; None if all N blocks lie in this order.
        real: [S', R] bool, false where a sequence has no such rank and its last block stands in.
        shape: S' and R.
    """

    take: Tensor | None
    real: Tensor
    shape: tuple[int, int]


@dataclass(frozen=True)
class Blocks:
    """Where each token and each block lies.

    Args:
        size: tokens a block, B.
        rows: [T] int64, row of each token in the blocked layout [N * B]; None if it is the same.
        tokens: [N * B] int64, token of each row, any where it is empty; None with rows.
        empty: int64, the rows that hold no token; None with rows.
        sizes: [N] tokens that each block really holds.
        sequences: [N] sequence of each block.
        ranks: [N] number of the block in its sequence.
        last: [S] last block of each sequence.
        groups: the sequences of more than one block.
    """

    size: int
    rows: Tensor | None
    tokens: Tensor | None
    empty: Tensor | None
    sizes: Tensor
    sequences: Tensor
    ranks: Tensor
    last: Tensor
    groups: tuple[Group, ...]

    @property
    def num_blocks(self) -> int:
        return self.sizes.numel()


@functools.lru_cache(maxsize=16)
def plan_blocks(lengths: tuple[int, ...], dim: int, device: torch.device) -> Blocks:
    """The block size that costs least for these lengths and this D, and the layout that follows."""
    size = min(BLOCK_SIZES, key=lambda b: sum(_cost(n, b, dim) for n in lengths))
    # a tensor first made in inference mode could never be saved for a later backward
    with torch.inference_mode(False):
        length = torch.tensor(lengths)
        counts = (length + size - 1) // size
        first = counts.cumsum(0) - counts
        sequences = torch.repeat_interleave(torch.arange(len(lengths)), counts)
        ranks = torch.arange(int(counts.sum())) - first[sequences]
        sizes = (length[sequences] - ranks * size).clamp(max=size)
        rows = tokens = empty = None
        if bool((length % size).any()):
            start = length.cumsum(0) - length
            owner = torch.repeat_interleave(torch.arange(len(lengths)), length)
            index = torch.arange(int(length.sum()))
            rows = (index - start[owner] + first[owner] * size).to(device)
            tokens = torch.full((int(counts.sum()) * size,), -1).to(device)
            tokens[rows] = index.to(device)
            empty = (tokens < 0).nonzero()[:, 0]
            tokens.clamp_(min=0)
        return Blocks(
            size,
            rows,
            tokens,
            empty,
            sizes.to(device),
            sequences.to(device),
            ranks.to(device),
            (first + counts - 1).to(device),
            _groups(first, counts, device),
        )


def _cost(length: int, size: int, dim: int) -> float:
    """About the operations of one sequence, with a number moved counted as 40."""
    inside, outside = 4 * size * dim, 4 * dim * dim
    carried = 2 * length * (dim / size) ** 2 + 40 * dim * dim / size
    return -(-length // size) * size * (inside + outside + carried)


def _groups(first: Tensor, counts: Tensor, device: torch.device) -> tuple[Group, ...]:
    groups = []
    power = torch.ceil(torch.log2(counts.double())).long()
    for value in power[counts > 1].unique().tolist():
        chosen = power == value
        own, start = counts[chosen, None], first[chosen, None]
        rank = torch.arange(int(own.max()))[None, :]
        # beyond a sequence's end the last block stands in: it only feeds places left out
        take, real = start + torch.minimum(rank, own - 1), rank < own
        whole = torch.equal(take.flatten(), torch.arange(int(counts.sum())))
        shape = (take.shape[0], take.shape[1])
        groups.append(Group(None if whole else take.to(device), real.to(device), shape))
    return tuple(groups)


def to_blocks(x: Tensor, blocks: Blocks) -> Tensor:
    """[T, H, D] -> [H, N, B, D], dense, zeros where a block has no token."""
    x = x.transpose(0, 1)
    if blocks.tokens is not None and blocks.empty is not None:
        # head by head: on a CPU five times as fast as rows of all heads, which then are turned
        x = x.index_select(1, blocks.tokens).index_fill_(1, blocks.empty, 0)
    return x.contiguous().unflatten(1, (blocks.num_blocks, blocks.size))


def from_blocks(x: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
    """[H, N, B, D] -> [T, H, D], heads outermost in memory."""
    x = x.to(dtype).flatten(1, 2)
    x = x if blocks.rows is None else x.index_select(1, blocks.rows)
    return x.transpose(0, 1)


class _Decays(NamedTuple):
    """Powers of each head's decay.

    Args:
        inside: [H, 1, B, B], from key to query of one block, 0 where the key comes later.
        query: [H, 1, B, 1], from the state before the block to the query.
        key: [H, N, B, 1] or [H, 1, B, 1], from the key to the block's end.
    """

    inside: Tensor
    query: Tensor
    key: Tensor


def _decays(slopes: Tensor, blocks: Blocks) -> _Decays:
    slope = slopes[:, None, None, None]
    index = torch.arange(blocks.size, device=slopes.device)
    distance = (index[:, None] - index[None, :]).to(slopes.dtype)
    inside = torch.exp(-slope * distance.clamp(min=0)) * (distance >= 0)
    query = torch.exp(-slope * (index[:, None] + 1).to(slopes.dtype))
    sizes = blocks.sizes[:1] if blocks.rows is None else blocks.sizes
    left = (sizes[:, None, None] - 1 - index[:, None]).clamp(min=0).to(slopes.dtype)
    return _Decays(inside, query, torch.exp(-slope * left))


def lightning_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    lengths: Sequence[int],
    *,
    initial_state: Tensor | None = None,
    with_final: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Same numbers as `lightning_reference`; arguments checked by `op.lightning_attention`."""
    blocks = plan_blocks(tuple(lengths), q.shape[-1], q.device)
    return _Lightning.apply(q, k, v, initial_state, slopes, blocks, with_final)


class _Lightning(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        initial: Tensor | None,
        slopes: Tensor,
        blocks: Blocks,
        with_final: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.blocks, ctx.dtypes = blocks, (q.dtype, k.dtype, v.dtype)
        ctx.initial_dtype = None if initial is None else initial.dtype
        # fp32: the state sums thousands of terms, and bf16 keeps 8 significant bits
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (to_blocks(x.to(wide), blocks) for x in (q, k, v))
            initial = None if initial is None else initial.to(wide)
            slopes = slopes.to(wide)
            out, state, final = _forward(q, k, v, initial, slopes, blocks, with_final)
        ctx.save_for_backward(q, k, v, state, slopes)
        return from_blocks(out, blocks, ctx.dtypes[2]), final

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, final_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, state, slopes = ctx.saved_tensors
        blocks = ctx.blocks
        with torch.autocast(q.device.type, enabled=False):
            grad = torch.zeros_like(q) if grad is None else to_blocks(grad.to(q.dtype), blocks)
            if final_grad is not None:
                final_grad = final_grad.to(q.dtype).transpose(0, 1)
            *grads, to_state = _backward(q, k, v, state, slopes, blocks, grad, final_grad)
            to_initial = None
            if ctx.needs_input_grad[3] and to_state is not None:
                shares = to_state.mul_(_fade_of_initial(slopes, blocks))
                to_initial = shares.new_zeros(blocks.last.numel(), *shares[:, 0].shape)
                to_initial.index_add_(0, blocks.sequences, shares.transpose(0, 1))
                to_initial = to_initial.to(ctx.initial_dtype)
        pairs = zip(grads, ctx.dtypes, strict=True)
        return *(from_blocks(x, blocks, dtype) for x, dtype in pairs), to_initial, *[None] * 3


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    slopes: Tensor,
    blocks: Blocks,
    with_final: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Output [H, N, B, D], states before the blocks [H, N, D, D], final states [S, H, D, D]."""
    decays = _decays(slopes, blocks)
    out = (q @ k.mT).mul_(decays.inside) @ v
    state = final = None
    if not blocks.groups and initial is None and not with_final:
        return out, None, None
    local = (k * decays.key).mT @ v
    if blocks.groups:
        state = _sum_over_blocks(local, slopes, blocks, later=False)
    if initial is not None:
        faded = _fade_of_initial(slopes, blocks) * initial.transpose(0, 1)[:, blocks.sequences]
        state = faded if state is None else state.add_(faded)
    if state is not None:
        _add_product(out, q * decays.query, state)
    if with_final:
        final = local[:, blocks.last]
        if state is not None:
            final.addcmul_(_fade_of_last(slopes, blocks), state[:, blocks.last])
        final = final.transpose(0, 1).contiguous()
    return out, state, final


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    slopes: Tensor,
    blocks: Blocks,
    grad: Tensor,
    final_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v [H, N, B, D] and of the states before the blocks."""
    decays = _decays(slopes, blocks)
    to_v = (q @ k.mT).mul_(decays.inside).mT @ grad
    to_scores = (grad @ v.mT).mul_(decays.inside)
    to_q, to_k = to_scores @ k, to_scores.mT @ q
    to_state = to_local = None
    if state is not None:
        grad = grad * decays.query
        _add_product(to_q, grad, state.mT)
        to_state = q.mT @ grad
        if final_grad is not None:
            to_state[:, blocks.last] += _fade_of_last(slopes, blocks) * final_grad
        if blocks.groups:
            to_local = _sum_over_blocks(to_state, slopes, blocks, later=True)
    if final_grad is not None:
        if to_local is None:
            to_local = q.new_zeros(*q.shape[:2], q.shape[3], q.shape[3])
        to_local[:, blocks.last] += final_grad
    if to_local is not None:
        _add_product(to_k, v * decays.key, to_local.mT)
        _add_product(to_v, k * decays.key, to_local)
    return to_q, to_k, to_v, to_state


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b for [H, N, ., .] each."""
    total.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))


def _fade_of_initial(slopes: Tensor, blocks: Blocks) -> Tensor:
    """[H, N, 1, 1]: what is left of the initial state before each block."""
    tokens = (blocks.ranks * blocks.size).to(slopes.dtype)
    return torch.exp(-slopes[:, None] * tokens)[..., None, None]


def _fade_of_last(slopes: Tensor, blocks: Blocks) -> Tensor:
    """[H, S, 1, 1]: what is left of the state before the last block at its end."""
    tokens = blocks.sizes[blocks.last].to(slopes.dtype)
    return torch.exp(-slopes[:, None] * tokens)[..., None, None]


def _sum_over_blocks(x: Tensor, slopes: Tensor, blocks: Blocks, *, later: bool) -> Tensor:
    """[H, N, D, D] -> decayed sum over the earlier (or later) blocks of each block's sequence."""
    total = torch.zeros_like(x)
    for group in blocks.groups:
        rank = torch.arange(group.shape[1], device=x.device)
        between = rank[:, None] - rank[None, :] - 1
        between = between.T if later else between
        tokens = (between.clamp(min=0) * blocks.size).to(x.dtype)
        weight = torch.exp(-slopes[:, None, None] * tokens) * (between >= 0)
        own = x if group.take is None else x[:, group.take.flatten()]
        if later and group.take is not None:
            own.mul_(group.real.flatten()[:, None, None])
        own = own.view(x.shape[0], *group.shape, -1)
        # [H, 1, R, R] x [H, S', R, D * D]
        summed = (weight[:, None] @ own).view(x.shape[0], -1, *x.shape[2:])
        if group.take is None:
            return summed
        total[:, group.take[group.real]] = summed[:, group.real.flatten()]
    return total
