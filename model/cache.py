"""What a decoding model remembers: lightning states in slots, softmax keys and values in pages.

A slot is one sequence. Its lightning states are a fixed amount of memory, fp32 (fp64 of a model in
fp64); its keys and values lie in pages of `page_tokens`, which a fork shares with its source until
one of them writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from model.config import HybridConfig
from model.kernels.lightning.plan import FirstRows
from model.packed import Packed, sent
from model.step import CacheStep, DecodeStep, PieceStep, Snapshot


class DecodeCache(Cache):
    """One object for the whole model.

    Args:
        num_slots: sequences held at once.
        num_pages: pages of keys and values, shared by all slots.
        page_tokens: tokens a page.
        grows: whether pages are added when none is free (transformers' `generate` does not say
            how long it will run); otherwise running out is an error.

    Example:
        >>> from model.config import preset
        >>> cache = DecodeCache(preset("tiny"), num_slots=2, num_pages=4)
        >>> slot = cache.allocate()
        >>> cache.lengths[slot], cache.num_free_pages
        (0, 4)
    """

    is_croppable = False

    def __init__(
        self,
        config: HybridConfig,
        *,
        num_slots: int,
        num_pages: int,
        page_tokens: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        grows: bool = False,
    ) -> None:
        super().__init__(layers=[])
        kinds = config.layer_types
        self.lightning = {n: i for i, n in enumerate(_numbers(kinds, "linear_attention"))}
        softmax = [n for n in range(len(kinds)) if n not in self.lightning]
        self.softmax = {n: i for i, n in enumerate(softmax)}
        heads, kv_heads, size = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        # fp32: bf16 states lose accuracy that shows in benchmarks (vLLM issue 19592)
        wide = torch.promote_types(dtype, torch.float32)
        self.states = torch.zeros(
            len(self.lightning), num_slots, heads, size, size, dtype=wide, device=device
        )
        self.pages = torch.zeros(
            len(self.softmax), 2, num_pages, page_tokens, kv_heads, size, dtype=dtype, device=device
        )
        self.page_tokens = page_tokens
        self.grows = grows
        self.lengths = [0] * num_slots
        self.tables: list[list[int]] = [[] for _ in range(num_slots)]
        self.users = [0] * num_pages
        self.free_pages = list(range(num_pages - 1, -1, -1))
        self.free_slots = list(range(num_slots - 1, -1, -1))
        # slots whose pages have changed since they were sent to `table`
        self._unsent: set[int] = set()

    @property
    def num_free_pages(self) -> int:
        return len(self.free_pages)

    @property
    def num_free_slots(self) -> int:
        return len(self.free_slots)

    def allocate(self) -> int:
        """An empty slot: length 0, states zero.

        Raises:
            RuntimeError: if every slot is taken.
        """
        if not self.free_slots:
            raise RuntimeError(
                f"all {len(self.lengths)} cache slots are taken; free one or make num_slots larger"
            )
        slot = self.free_slots.pop()
        self.states[:, slot] = 0
        return slot

    def fork(self, slot: int) -> int:
        """A new slot with the same past: states copied, pages shared until one of them writes.

        Raises:
            ValueError: if the slot is not allocated.
            RuntimeError: if every slot is taken.
        """
        self._check_taken((slot,))
        new = self.allocate()
        self.states[:, new] = self.states[:, slot]
        self.lengths[new] = self.lengths[slot]
        self.tables[new] = list(self.tables[slot])
        self._unsent.add(new)
        for page in self.tables[new]:
            self.users[page] += 1
        return new

    def free(self, slot: int) -> None:
        """Gives the slot back, and every page that nobody else holds.

        Raises:
            ValueError: if the slot is not allocated.
        """
        self._check_taken((slot,))
        self.release(self.tables[slot])
        self.tables[slot] = []
        self.lengths[slot] = 0
        self.free_slots.append(slot)

    def pages_needed(self, slot: int, new_tokens: int) -> int:
        """Pages that must be free before `slot` can take `new_tokens` more."""
        table, held = self.tables[slot], self.lengths[slot]
        fresh = -(-(held + new_tokens) // self.page_tokens) - len(table)
        shared_tail = held % self.page_tokens and self.users[table[-1]] > 1
        return fresh + bool(shared_tail)

    def fill(self, slot: int) -> None:
        """Gives an empty slot a page, so that it can stand for rows that hold nothing."""
        self.tables[slot].append(self._take())
        self._unsent.add(slot)

    def save(self, slot: int) -> Snapshot:
        """What the slot holds, on the host; the slot stays as it is.

        Raises:
            ValueError: if the slot is not allocated.
        """
        self._check_taken((slot,))
        table = torch.tensor(self.tables[slot], dtype=torch.int64).to(self.pages.device)
        return Snapshot(
            self.lengths[slot],
            self.states[:, slot].to("cpu", copy=True),
            self.pages.index_select(2, table).to("cpu"),
        )

    def load(self, saved: Snapshot, *, like: int = -1, shared: int = 0) -> int:
        """A new slot that holds what was saved.

        Args:
            like: a slot whose first `shared` pages are the same tokens' and full; they are shared
                instead of copied.

        Raises:
            RuntimeError: if no slot or too few pages are free.
        """
        fresh = saved.num_pages - shared
        if fresh > len(self.free_pages):
            raise RuntimeError(
                f"{fresh} pages are needed, {len(self.free_pages)} of {len(self.users)} are free; "
                "make num_pages larger or run fewer sequences at once"
            )
        slot = self.allocate()
        self.states[:, slot] = saved.states.to(self.states.device)
        self.lengths[slot] = saved.length
        self.hold(slot, self.tables[like][:shared] if shared else [])
        own = [self._take() for _ in range(fresh)]
        self.tables[slot] += own
        place = torch.tensor(own, dtype=torch.int64).to(self.pages.device)
        self.pages.index_copy_(2, place, saved.pages[:, :, shared:].to(self.pages.device))
        return slot

    def release(self, pages: Sequence[int]) -> None:
        """Gives back pages that were held without a slot; those of nobody else are free."""
        for page in pages:
            self._release(page)

    def hold(self, slot: int, pages: Sequence[int]) -> None:
        """Gives `slot` full pages that others hold, behind those that it has."""
        for page in pages:
            self.users[page] += 1
        self.tables[slot] += pages
        self._unsent.add(slot)

    def begin(self, slots: Sequence[int], packed: Packed) -> CacheStep:
        """Makes room for sequence i of `packed` in `slots[i]` and says where everything lies.

        Raises:
            ValueError: if slots repeat, are not allocated or do not match the sequences, or if a
                sequence does not start where its slot ends (looked at on a CPU only).
            RuntimeError: if too few pages are free; nothing has changed then.
        """
        lengths = packed.lengths
        if len(set(slots)) != len(slots) or len(slots) != len(lengths):
            raise ValueError(
                f"slots = {tuple(slots)} for {len(lengths)} sequences: expected one slot each, "
                "no slot twice"
            )
        self._check_taken(slots)
        self._check_starts(slots, packed)
        past = [self.lengths[slot] for slot in slots]
        self._check_room(slots, lengths)
        for slot, length in zip(slots, lengths, strict=True):
            self._reserve(slot, length)
        size = self.page_tokens
        most = max(len(self.tables[slot]) for slot in slots)
        table = torch.tensor([self._row(slot, most) for slot in slots])
        places = torch.cat(
            [torch.arange(held, held + length) for held, length in zip(past, lengths, strict=True)]
        )
        owner = torch.repeat_interleave(torch.arange(len(slots)), torch.tensor(lengths))
        rows = table[owner, places // size] * size + places % size
        device = self.states.device
        return CacheStep(
            cache=self,
            slots=tuple(slots),
            lengths=lengths,
            held=tuple(past),
            past=sent(torch.tensor(past), device),
            rows=sent(rows, device),
            table=sent(table, device),
            index=sent(torch.tensor(slots), device),
            is_fresh=not any(past),
        )

    def begin_decode(self, slots: Sequence[int], new_tokens: int = 1) -> None:
        """Makes room for one token or more in each of `slots`, in the device's table too.

        Raises:
            RuntimeError: if too few pages are free; nothing has changed then.
        """
        needy = self.needy(slots) if new_tokens == 1 else slots
        if new_tokens > 1 or len(needy) > len(self.free_pages):
            self._check_room(needy, (new_tokens,) * len(needy))
        for slot in needy:
            self._reserve(slot, new_tokens)
        self._send_tables([slot for slot in slots if slot in self._unsent])

    def needy(self, slots: Sequence[int]) -> list[int]:
        """Those that cannot take a token without a page more."""
        size, lengths, tables, users = self.page_tokens, self.lengths, self.tables, self.users
        return [s for s in slots if not lengths[s] % size or users[tables[s][-1]] > 1]

    def decode_step(
        self, index: Tensor, lengths: Tensor, count: Tensor | None = None
    ) -> DecodeStep:
        """A step of slots that `begin_decode` made room for; index and lengths as in `DecodeStep`,
        count [1] of the rows' first slot as in `PieceStep`."""
        at = self.states, self.pages, self.lightning, self.softmax, self.table, index, lengths
        return DecodeStep(*at) if count is None else PieceStep(*at, FirstRows(index[:1], count))

    @cached_property
    def table(self) -> Tensor:
        """[num_slots, num_pages] int32 on the device: pages of each slot, as `begin_decode` left
        them."""
        shape = len(self.lengths), len(self.users)
        return torch.zeros(shape, dtype=torch.int32, device=self.states.device)

    def _send_tables(self, slots: Sequence[int]) -> None:
        if not slots:
            return
        most = max(len(self.tables[slot]) for slot in slots)
        rows = torch.tensor([self._row(slot, most) for slot in slots], dtype=torch.int32)
        device = self.states.device
        index = sent(torch.tensor(slots), device)
        self.table[:, :most].index_copy_(0, index, sent(rows, device))
        self._unsent.difference_update(slots)

    def count(self, slots: Sequence[int], new_tokens: int = 1) -> None:
        """Counts tokens of each slot as held, once every layer has seen them."""
        for slot in slots:
            self.lengths[slot] += new_tokens

    def _check_starts(self, slots: Sequence[int], packed: Packed) -> None:
        # on a device the comparison would make every decoding step wait for it
        if packed.positions.device.type != "cpu":
            return
        begins = packed.positions[packed.cu_seqlens[:-1]].tolist()
        held = [self.lengths[slot] for slot in slots]
        if begins != held:
            raise ValueError(
                f"packed.positions begin at {begins}, but slots {tuple(slots)} hold {held} tokens; "
                "start each sequence at the length of its slot"
            )

    def _check_taken(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if not 0 <= slot < len(self.lengths) or slot in self.free_slots:
                raise ValueError(f"slot {slot} is not allocated; take it from allocate() or fork()")

    def _check_room(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Refused as a whole and before anything moves, so that the caller may try fewer slots."""
        wanted = sum(self.pages_needed(s, n) for s, n in zip(slots, lengths, strict=True))
        tails = Counter(self.tables[s][-1] for s in slots if self.lengths[s] % self.page_tokens)
        # where every holder of a shared page writes, the last of them needs no copy
        wanted -= sum(1 < n == self.users[page] for page, n in tails.items())
        if wanted > len(self.free_pages) and not self.grows:
            raise RuntimeError(
                f"{sum(lengths)} new tokens in slots {tuple(slots)} need {wanted} pages of "
                f"{self.page_tokens} tokens, {len(self.free_pages)} of {len(self.users)} are free; "
                "make num_pages larger or run fewer sequences at once"
            )

    def _row(self, slot: int, most: int) -> list[int]:
        table = self.tables[slot]
        return table + table[-1:] * (most - len(table))

    def _reserve(self, slot: int, new_tokens: int) -> None:
        table, held = self.tables[slot], self.lengths[slot]
        self._unsent.add(slot)
        if held % self.page_tokens and self.users[table[-1]] > 1:
            # the last page is shared and would be written: take a copy of it first
            page = self._take()
            self.pages[:, :, page] = self.pages[:, :, table[-1]]
            self._release(table[-1])
            table[-1] = page
        while len(table) * self.page_tokens < held + new_tokens:
            table.append(self._take())

    def _take(self) -> int:
        if not self.free_pages:
            self._grow()
        page = self.free_pages.pop()
        self.users[page] = 1
        return page

    def _release(self, page: int) -> None:
        self.users[page] -= 1
        if not self.users[page]:
            self.free_pages.append(page)

    def _grow(self) -> None:
        more = max(len(self.users), 1)
        shape = list(self.pages.shape)
        shape[2] = more
        self.pages = torch.cat((self.pages, self.pages.new_zeros(shape)), dim=2)
        self.free_pages = list(range(len(self.users) + more - 1, len(self.users) - 1, -1))
        self.users += [0] * more

    # What transformers' `generate` asks of a cache.

    def __len__(self) -> int:
        return len(self.lightning) + len(self.softmax)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by the longest slot: every layer has seen the same tokens."""
        return max(self.lengths)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, which is transformers' word for no limit."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Slot i becomes a copy of slot beam_idx[i], as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        taken = len(self.lengths)
        self.batch_select_indices(torch.arange(taken).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps and orders slots by index; a slot named twice is forked. All slots are in use."""
        wanted = [int(index) for index in indices]
        tables = [list(self.tables[slot]) for slot in wanted]
        for page in (page for table in tables for page in table):
            self.users[page] += 1
        for page in (page for table in self.tables for page in table):
            self._release(page)
        self.states = self.states[:, indices.to(self.states.device)]
        self.lengths = [self.lengths[slot] for slot in wanted]
        self.tables = tables
        self.free_slots = []

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent state cannot forget its last tokens.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"cannot crop {tokens_to_remove} tokens: a lightning state cannot forget; fork the "
            "slot before the tokens that may be taken back"
        )


def _numbers(kinds: Sequence[str], kind: str) -> list[int]:
    return [number for number, name in enumerate(kinds) if name == kind]
