"""One answer per id: asked again, while it is made or after, a request gets the same one."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass(eq=False)
class _Kept:
    digest: bytes
    task: asyncio.Task[bytes]
    num_askers: int = 0


class ReusedIdError(ValueError):
    """The id was another request's."""


class WithdrawnError(RuntimeError):
    """The answer is not wanted any more."""


class Answers:
    """The latest answers by id.

    An answer in the making outlives an asker whose connection broke by `linger_s`, in which it may
    ask again; after that nobody wants it, and it is cancelled.

    Args:
        max_bytes: of finished answers that are kept.
        linger_s: seconds; infinite makes every answer to its end.
    """

    def __init__(self, max_bytes: int, *, linger_s: float) -> None:
        self._max_bytes = max_bytes
        self._linger_s = linger_s
        self._bytes = 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    async def once(self, key: str, body: bytes, make: Callable[[], Awaitable[bytes]]) -> bytes:
        """The answer of `key`, made now unless it was before.

        Raises:
            ReusedIdError: if the key came with another body.
            WithdrawnError: if it was withdrawn meanwhile.
        """
        digest = hashlib.sha256(body).digest()
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _Kept(digest, asyncio.ensure_future(make()))
            kept.task.add_done_callback(lambda done: self._note(key, done))
        if kept.digest != digest:
            raise ReusedIdError(f"id {key!r} was another request's; choose a new one")
        kept.num_askers += 1
        try:
            return await asyncio.shield(kept.task)
        except asyncio.CancelledError:
            # of the answer, not of this asker
            if kept.task.cancelled():
                raise WithdrawnError(f"id {key!r} was withdrawn") from None
            raise
        finally:
            kept.num_askers -= 1
            if not kept.num_askers and not kept.task.done() and self._linger_s < math.inf:
                loop = asyncio.get_running_loop()
                loop.call_later(self._linger_s, self._forget, kept)

    def withdraw(self, key: str) -> None:
        """Stops making an answer; one that is made, or was never asked for, is left alone."""
        kept = self._kept.get(key)
        if kept is not None:
            kept.task.cancel()

    def _forget(self, kept: _Kept) -> None:
        if not kept.num_askers:
            kept.task.cancel()

    def _note(self, key: str, done: asyncio.Task[bytes]) -> None:
        if done.cancelled() or done.exception() is not None:
            # refused, not answered: the next try is made anew
            del self._kept[key]
            return
        self._bytes += len(done.result())
        while self._bytes > self._max_bytes:
            oldest = next((name for name, kept in self._kept.items() if kept.task.done()), None)
            if oldest is None:
                return
            self._bytes -= len(self._kept.pop(oldest).task.result())
