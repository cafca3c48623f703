"""What goes into the queue of the scoring API, what comes out, and why something is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from reward.scorer import Encoded
from reward.types import Item, Score
from reward.wire import ItemError


@dataclass(frozen=True)
class Task:
    """One item to be judged.

    Args:
        encode: gives its tokens where the scorer's own way does not fit (text that is rendered
            already); a ValueError means a wrong item.
    """

    item: Item
    encode: Callable[[], Encoded] | None = None


@dataclass(frozen=True)
class Judged:
    """What became of one item.

    Args:
        overall: the heads' gate-weighted total; None where no reward model read the item.
        num_tokens: that the reward model read.
    """

    score: Score
    overall: float | None
    num_tokens: int


@dataclass(frozen=True)
class Limits:
    """How much may be under way; numbers >= 1.

    Args:
        batch_tokens: tokens per forward; a longer item is a forward of its own.
        item_tokens: longest item; "model" is as long as the reward model takes. Longer ones are
            refused, never cut.
        queue_items: items under way.
        queue_tokens: tokens under way.
        rule_threads: rules that may block at once.

    Raises: ValueError for a number below 1.
    """

    batch_tokens: int = 16_384
    item_tokens: int | Literal["model"] = "model"
    queue_items: int = 65_536
    queue_tokens: int = 4_194_304
    rule_threads: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value != "model" and value < 1:
                raise ValueError(f"Limits.{name} = {value}, expected 1 or more")


class QueueFullError(RuntimeError):
    """No room now.

    Args:
        retry_s: whole seconds after which there should be.
    """

    def __init__(self, message: str, retry_s: int) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class NeverFitsError(ValueError):
    """More at once than the queue holds when empty."""


class BrokenError(RuntimeError):
    """The reward model can answer nobody any more; the process has to be started anew."""


class WrongItemsError(ValueError):
    """Items that cannot be judged whatever the load, each with its reason."""

    def __init__(self, items: Sequence[ItemError]) -> None:
        super().__init__("; ".join(f"item {one.index}: {one.message}" for one in items))
        self.items = tuple(items)
