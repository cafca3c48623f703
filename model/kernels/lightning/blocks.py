"""Lightning attention in blocks, as plain batched matmuls without a loop: the CPU form.

Each sequence is cut into blocks of B tokens; no block holds two sequences. Inside a block the
quadratic form with decay, between blocks one state per block:

    o_i   = sum_{j<=i} exp(-s (i-j)) (q_i . k_j) v_j  +  exp(-s (i+1)) q_i S_n
    S_n   = sum_{m<n} exp(-s B (n-m-1)) L_m  +  exp(-s B n) S_0
    L_m   = sum_j exp(-s (len_m - 1 - j)) k_j^T v_j

The sum over earlier blocks is a matmul with a small matrix of decays, one for all sequences of like
length, so that the number of calls does not grow with the number of sequences or blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Blocks:
    """Where each token and each block lies.

    Args:
        size: tokens a block, B.
        rows: [T] int64, row of each token in the blocked layout [N * B]; None if it is the same.
        sizes: [N] tokens that each block really holds.
        sequences: [N] sequence of each block.
        ranks: [N] number of the block in its sequence.
        last: [S] last block of each sequence.
        alike: groups of sequences with more than one block: (first block and block count of each
            [S', 2], largest block count).
    """

    size: int
    rows: Tensor | None
    sizes: Tensor
    sequences: Tensor
    ranks: Tensor
    last: Tensor
    alike: tuple[tuple[Tensor, int], ...]

    @property
    def num_blocks(self) -> int:
        return self.sizes.numel()


def plan_blocks(lengths: Sequence[int], device: torch.device) -> Blocks:
    """The block size that costs least for these lengths, and the layout that follows."""
    size = min(BLOCK_SIZES, key=lambda b: sum(-(-n // b) * b * (b + 64) for n in lengths))
    length = torch.tensor(lengths)
    counts = (length + size - 1) // size
    first = counts.cumsum(0) - counts
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    ranks = torch.arange(int(counts.sum())) - first[sequences]
    sizes = (length[sequences] - ranks * size).clamp(max=size)
    rows = None
    if bool((length % size).any()):
        start = length.cumsum(0) - length
        owner = torch.repeat_interleave(torch.arange(len(lengths)), length)
        rows = (torch.arange(int(length.sum())) - start[owner] + first[owner] * size).to(device)
    last = first + counts - 1
    return Blocks(
        size,
        rows,
        sizes.to(device),
        sequences.to(device),
        ranks.to(device),
        last.to(device),
        _alike(first, counts, device),
    )


def to_blocks(x: Tensor, blocks: Blocks) -> Tensor:
    """[T, H, D] -> [N, H, B, D], zeros where a block has no token."""
    if blocks.rows is not None:
        room = x.new_zeros(blocks.num_blocks * blocks.size, *x.shape[1:])
        x = room.index_copy(0, blocks.rows, x)
    return x.view(blocks.num_blocks, blocks.size, *x.shape[1:]).transpose(1, 2)


def from_blocks(x: Tensor, blocks: Blocks) -> Tensor:
    """[N, H, B, D] -> [T, H, D]."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if blocks.rows is None else x.index_select(0, blocks.rows)


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
    dtype = v.dtype
    blocks = plan_blocks(lengths, q.device)
    # fp32: the state sums thousands of terms, and bf16 keeps 8 significant bits
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (to_blocks(x.to(wide), blocks) for x in (q, k, v))
    slopes = slopes.to(wide)
    index = torch.arange(blocks.size, device=q.device)
    distance = (index[:, None] - index[None, :]).to(wide)
    inside = torch.exp(-slopes[:, None, None] * distance.clamp(min=0)) * (distance >= 0)

    out = (q @ k.transpose(-1, -2) * inside) @ v
    many = blocks.num_blocks > len(lengths)
    if not many and initial_state is None and not with_final:
        return from_blocks(out, blocks).to(dtype), None

    left = (blocks.sizes[:, None] - 1 - index[None, :]).clamp(min=0).to(wide)
    key_decay = torch.exp(-slopes[None, :, None] * left[:, None, :])
    local = (k * key_decay[..., None]).transpose(-1, -2) @ v
    state = torch.zeros_like(local)
    if many:
        state = _sum_of_earlier(local, slopes, blocks)
    if initial_state is not None:
        faded = torch.exp(-slopes[None, :] * (blocks.ranks[:, None] * blocks.size).to(wide))
        state = state + faded[..., None, None] * initial_state.to(wide)[blocks.sequences]
    if many or initial_state is not None:
        query_decay = torch.exp(-slopes[:, None] * (index[None, :] + 1).to(wide))
        out = out + (q * query_decay[..., None]) @ state
    final = None
    if with_final:
        fade = torch.exp(-slopes[None, :] * blocks.sizes[blocks.last][:, None].to(wide))
        final = fade[..., None, None] * state[blocks.last] + local[blocks.last]
    return from_blocks(out, blocks).to(dtype), final


def _sum_of_earlier(local: Tensor, slopes: Tensor, blocks: Blocks) -> Tensor:
    """[N, H, D, D] local states -> state before each block, from the same sequence only.

    Sequences of like block count R share one [H, R, R] matrix of decays.
    """
    state = torch.zeros_like(local)
    heads = local.shape[1]
    for members, most in blocks.alike:
        rank = torch.arange(most, device=local.device)
        # beyond a sequence's end the last block stands in: it only feeds places left out below
        take = members[:, :1] + torch.minimum(rank[None, :], members[:, 1:] - 1)
        between = rank[:, None] - rank[None, :] - 1
        tokens = (between.clamp(min=0) * blocks.size).to(local.dtype)
        weight = torch.exp(-slopes[:, None, None] * tokens) * (between >= 0)
        # [S, R, H, D, D] -> [H, R, S * D * D]
        flat = local[take].permute(2, 1, 0, 3, 4).reshape(heads, most, -1)
        summed = (weight @ flat).view(heads, most, len(members), *local.shape[2:])
        real = rank[None, :] < members[:, 1:]
        state = state.index_copy(0, take[real], summed.permute(2, 1, 0, 3, 4)[real])
    return state


def _alike(first: Tensor, counts: Tensor, device: torch.device) -> tuple[tuple[Tensor, int], ...]:
    """Sequences of more than one block, grouped by the power of two above their block count."""
    groups = []
    power = torch.ceil(torch.log2(counts.double())).long()
    for value in power[counts > 1].unique().tolist():
        chosen = power == value
        members = torch.stack((first[chosen], counts[chosen]), dim=1)
        groups.append((members.to(device), int(counts[chosen].max())))
    return tuple(groups)
