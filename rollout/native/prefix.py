"""Prompts that begin alike: states kept at fixed borders, pages shared by count.

A lightning state cannot be cut, so what is known of a prompt is known at its borders only, every
`block_tokens`. An entry holds the states there and the pages of everything before. A prompt takes
up the longest entry that it begins with, and is prefilled from there on in the same pieces as it
would be without, so that a hit changes no bit.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model import DecodeCache
from rollout.native.sequence import Group


@dataclass(frozen=True)
class Entry:
    """States [L, H, D, D] fp32 at a border, and the pages before it."""

    length: int
    states: Tensor
    pages: tuple[int, ...]


class Prefixes:
    """Known beginnings of prompts, the least recently used dropped first.

    Args:
        max_entries: borders remembered; 0 remembers none.
        block_tokens: distance of borders, a multiple of the cache's page.
    """

    def __init__(self, max_entries: int, block_tokens: int) -> None:
        self.max_entries = max_entries
        self.block_tokens = block_tokens
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()
        self.num_hit_tokens = 0

    def enter(self, group: Group, cache: DecodeCache) -> int:
        """Fills a new root with the longest known beginning; its length in tokens."""
        # the experts of tokens that are not computed would be missing
        if not self.entries or group.request.return_experts:
            return 0
        found = None
        # at least one token is left to give the logits
        for key in self._keys(group.request.prompt[:-1]):
            if key not in self.entries:
                break
            self.entries.move_to_end(key)
            found = self.entries[key]
        if found is None:
            return 0
        cache.hold(group.root, found.pages)
        cache.states[:, group.root] = found.states
        cache.lengths[group.root] = found.length
        self.num_hit_tokens += found.length
        return found.length

    def put(self, group: Group, length: int, cache: DecodeCache) -> None:
        """Remembers the first `length` tokens of a prompt, which its root holds just now."""
        if not self.max_entries or length % self.block_tokens:
            return
        *_, key = self._keys(group.request.prompt[:length])
        if key in self.entries:
            return
        while len(self.entries) >= self.max_entries:
            self.drop_oldest(cache)
        pages = tuple(cache.tables[group.root][: length // cache.page_tokens])
        for page in pages:
            cache.users[page] += 1
        self.entries[key] = Entry(length, cache.states[:, group.root].clone(), pages)

    def drop_oldest(self, cache: DecodeCache) -> bool:
        """Forgets one entry; whether there was one."""
        if not self.entries:
            return False
        _, entry = self.entries.popitem(last=False)
        cache.release(entry.pages)
        return True

    def num_droppable(self, cache: DecodeCache) -> int:
        """Pages that nobody but the entries holds."""
        held: dict[int, int] = {}
        for entry in self.entries.values():
            for page in entry.pages:
                held[page] = held.get(page, 0) + 1
        return sum(cache.users[page] == count for page, count in held.items())

    def clear(self, cache: DecodeCache | None) -> None:
        """Forgets all: the weights have changed."""
        if cache is None:
            self.entries.clear()
        while cache is not None and self.drop_oldest(cache):
            pass

    def _keys(self, prompt: tuple[int, ...]) -> Iterator[bytes]:
        """A digest of everything up to each border, shortest first."""
        digest = hashlib.blake2b(digest_size=16)
        for end in range(self.block_tokens, len(prompt) + 1, self.block_tokens):
            block = torch.tensor(prompt[end - self.block_tokens : end], dtype=torch.int64)
            digest.update(block.numpy().tobytes())
            yield digest.copy().digest()
