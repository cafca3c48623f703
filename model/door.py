"""The door between padded calls and the packed inside.

A padded call is unpadded on entry and padded on exit; a packed call, as TRL's and transformers'
collators emit it (`position_ids` that restart, or `cu_seq_lens_q`), is read for its borders. What
cannot be honoured exactly is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.packed import Packed


@dataclass(frozen=True)
class Door:
    """How a padded call became packed, and the way back.

    Args:
        packed: the real tokens.
        shape: (batch, length) of the call.
        rows: [T] int64, place of each packed token in the flattened call; None if all are real.
        members: batch row of each sequence, for a call that continues a cache.
    """

    packed: Packed
    shape: tuple[int, int]
    rows: Tensor | None
    members: tuple[int, ...]

    def unpad(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def repad(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...], zeros where the call had padding."""
        if self.rows is not None:
            room = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:])
            x = room.index_copy(0, self.rows, x)
        return x.view(*self.shape, *x.shape[1:])


def open_door(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    past: Sequence[int] | None = None,
) -> Door:
    """Finds the sequences of a call in transformers' form.

    Args:
        input_ids: [B, L] int64.
        attention_mask: [B, M], M >= L, 1 for real tokens; its last L columns speak of input_ids.
        position_ids: [B, L]; a position that does not follow its neighbour starts a sequence.
        cu_seqlens: [S + 1], borders in the flattened call; overrules position_ids.
        past: tokens that each batch row's cache holds; None without a cache.

    Raises:
        ValueError: if the borders are wrong, contradict each other, or cannot be honoured.
    """
    batch, length = input_ids.shape
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} dimensions, expected 2 [batch, length]; "
            "masks of other shapes cannot be honoured by lightning layers: pack the documents"
        )
    if cu_seqlens is not None:
        return _from_borders(input_ids, attention_mask, position_ids, cu_seqlens, past)
    if attention_mask is not None:
        _check_mask(attention_mask, (batch, length), past)
        return _from_mask(input_ids, attention_mask, position_ids, past)
    if position_ids is not None and past is None:
        return _from_positions(input_ids, position_ids)
    rows = tuple(range(batch))
    start = torch.tensor(past if past is not None else [0] * batch, device=input_ids.device)
    positions = start[:, None] + torch.arange(length, device=input_ids.device)[None, :]
    if position_ids is not None:
        _check_continues(position_ids.expand(batch, length), positions)
    packed = Packed(input_ids.flatten(), positions.flatten(), (length,) * batch)
    return Door(packed, (batch, length), None, rows)


def check_form(
    packed: Packed | None,
    *,
    padded: Sequence[Tensor | None],
    only_padded: Sequence[object | None],
    only_packed: Sequence[bool],
) -> None:
    """Refuses a call that mixes the packed and the padded form.

    Raises:
        ValueError: if both forms or none came, or an argument of the form that did not come.
    """
    if (packed is not None) + sum(x is not None for x in padded) != 1:
        raise ValueError("give exactly one of packed, input_ids and inputs_embeds")
    if packed is not None and any(x is not None for x in only_padded):
        raise ValueError(
            "attention_mask, position_ids, past_key_values, labels and cu_seq_lens_q belong to the "
            "padded form; a packed call takes packed and targets"
        )
    if packed is None and any(only_packed):
        raise ValueError(
            "targets, temperature and with_entropy belong to packed calls; give labels instead, "
            "or packed=Packed.from_sequences(...)"
        )


def check_hints(
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Refuses borders that are given only in a form that is not read.

    Raises:
        ValueError: if `cu_seq_lens_k` differs from `cu_seqlens`, or if `seq_idx` comes alone.
    """
    if cu_seq_lens_k is not None and (
        cu_seqlens is None or not torch.equal(cu_seqlens, cu_seq_lens_k)
    ):
        raise ValueError(
            "cu_seq_lens_k differs from cu_seq_lens_q: keys and queries are the same tokens here; "
            "give both alike or cu_seq_lens_q alone"
        )
    if seq_idx is not None and cu_seqlens is None and position_ids is None:
        raise ValueError(
            "seq_idx without position_ids or cu_seq_lens_q: the borders of documents are read "
            "from those two; let the collator return one of them"
        )


def own_labels(
    labels: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Labels with -100 where no token of the same sequence predicts: padding and first tokens.

    Args:
        labels: [B, L] int64, unshifted; the rest as in `open_door`.

    Example:
        >>> own_labels(torch.tensor([[5, 6, 7]]), None, torch.tensor([[0, 1, 0]]), None).tolist()
        [[-100, 6, -100]]
    """
    silent = torch.zeros_like(labels, dtype=torch.bool)
    silent[:, 0] = True
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1][cu_seqlens.diff() > 0].long()
        silent = silent.flatten().index_fill(0, starts, True).view_as(labels)
    elif attention_mask is not None:
        real = attention_mask[:, -labels.shape[1] :].bool()
        silent[:, 1:] = ~(real[:, 1:] & real[:, :-1])
    elif position_ids is not None:
        positions = position_ids.expand_as(labels)
        silent[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return labels.masked_fill(silent, -100)


def _check_continues(given: Tensor, positions: Tensor) -> None:
    if not torch.equal(given, positions):
        raise ValueError(
            f"position_ids start at {int(given.flatten()[0])}, but the cache continues at "
            f"{int(positions.flatten()[0])}; leave position_ids out, the cache knows them"
        )


def _check_mask(attention_mask: Tensor, shape: tuple[int, int], past: Sequence[int] | None) -> None:
    batch, length = shape
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} for input_ids {shape}: "
            "expected as many rows, and as many columns or more"
        )
    if attention_mask.shape[1] > length:
        seen = attention_mask[:, :-length].bool().sum(1).tolist()
        held = list(past) if past is not None else "no cache"
        if seen != held:
            raise ValueError(
                f"attention_mask speaks of {seen} tokens before input_ids, but the cache holds "
                f"{held}; mask exactly what the cache holds, or input_ids alone"
            )


def _from_mask(
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None,
    past: Sequence[int] | None,
) -> Door:
    batch, length = input_ids.shape
    real = attention_mask[:, -length:].bool()
    starts = real & ~torch.nn.functional.pad(real, (1, 0))[:, :-1]
    runs = starts.sum(1).tolist()
    for row, count in enumerate(runs):
        if count > 1:
            raise ValueError(
                f"attention_mask row {row} has {count} runs of 1, expected one; a hole in a "
                "sequence cannot be honoured by lightning layers: pack the documents instead"
            )
    lengths = real.sum(1).tolist()
    members = tuple(row for row in range(batch) if lengths[row])
    if not members:
        raise ValueError("attention_mask is all 0: no token to compute; drop the call")
    rows = real.flatten().nonzero()[:, 0]
    held = torch.tensor(past if past is not None else [0] * batch, device=input_ids.device)
    positions = (held[:, None] + real.cumsum(1) - 1).flatten()[rows]
    given = None if position_ids is None else position_ids.expand(batch, length).flatten()[rows]
    if given is not None and past is not None:
        _check_continues(given, positions)
    elif given is not None:
        step = given.diff() - positions.diff()
        border = positions[1:] == 0
        if bool((step[~border] != 0).any()):
            raise ValueError(
                "position_ids restart inside an attention_mask run: borders given in both forms; "
                "drop the attention_mask of a packed call"
            )
    packed = Packed(input_ids.flatten()[rows], positions, tuple(lengths[row] for row in members))
    return Door(packed, (batch, length), None if len(rows) == real.numel() else rows, members)


def _from_positions(input_ids: Tensor, position_ids: Tensor) -> Door:
    batch, length = input_ids.shape
    position_ids = position_ids.expand(batch, length)
    follows = torch.zeros_like(position_ids, dtype=torch.bool)
    follows[:, 1:] = position_ids[:, 1:] == position_ids[:, :-1] + 1
    begins = (~follows).flatten()
    # a row may start anywhere (rotary positions are relative), a later border only at 0
    inner = begins.view(batch, length)[:, 1:] & (position_ids[:, 1:] != 0)
    if bool(inner.any()):
        row, column = inner.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids[{row}, {column + 1}] = {int(position_ids[row, column + 1])} neither "
            f"follows {int(position_ids[row, column])} nor restarts at 0; a document of a packed "
            "call starts at position 0"
        )
    starts = begins.nonzero()[:, 0].tolist()
    lengths = tuple(
        after - start for start, after in zip(starts, [*starts[1:], batch * length], strict=True)
    )
    packed = Packed(input_ids.flatten(), position_ids.flatten(), lengths)
    return Door(packed, (batch, length), None, ())


def _from_borders(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor,
    past: Sequence[int] | None,
) -> Door:
    total = input_ids.numel()
    borders = cu_seqlens.tolist()
    if past is not None:
        raise ValueError("cu_seq_lens_q with a cache: continue a cache by rows, not packed")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("cu_seq_lens_q with a padded attention_mask: give one of the two")
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != total:
        raise ValueError(
            f"cu_seq_lens_q runs from {borders[0] if borders else 'nothing'} to "
            f"{borders[-1] if borders else 'nothing'}, expected from 0 to {total} tokens"
        )
    pairs = list(itertools.pairwise(borders))
    lengths = tuple(after - before for before, after in pairs if after != before)
    if any(after < before for before, after in pairs):
        raise ValueError(f"cu_seq_lens_q = {borders} must not fall")
    own = torch.cat([torch.arange(n) for n in lengths]).to(input_ids.device)
    if position_ids is not None and not torch.equal(position_ids.flatten(), own):
        raise ValueError(
            "position_ids do not restart at 0 at the borders of cu_seq_lens_q: the two disagree "
            "about where documents begin"
        )
    batch, length = input_ids.shape
    return Door(Packed(input_ids.flatten(), own, lengths), (batch, length), None, ())
